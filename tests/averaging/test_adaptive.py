"""A period that follows how far the replicas drift apart: alike on all ranks, whatever they see by themselves."""

from __future__ import annotations

import numpy as np
import pytest

from pqasgd_horovod import codecs, native
from pqasgd_horovod.averaging import (
    AdaptivePeriod,
    ExchangeConfig,
    PeriodicAverager,
    PeriodicAveraging,
    SlowMo,
)
from pqasgd_horovod.averaging.schedule import FixedPeriod, Observed, schedule_from_config
from pqasgd_horovod.errors import ArgumentError, DesynchronizedError
from pqasgd_horovod.exchange.carriers.threads import run_ranks

from .arrays import make_views

SHAPES = {"w": (5000, "float32"), "b": (7, "float32"), "h": (2000, "float16"), "d": (2500, "float64")}
SCHEDULE = AdaptivePeriod(first=2, last=6, calibration_steps=6)


def run(
    carrier,
    spread,
    steps,
    schedule=SCHEDULE,
    learning_rate=lambda step: 0.1,
    stop=None,
    shapes=SHAPES,
    codec=codecs.eden(bits=4),  # noqa: B008 - a codec never changes
    **options,
):
    """Train on noise of standard deviation ``spread(step, rank)``; return at which steps an average came, and more."""

    def make():
        averaging = PeriodicAveraging(schedule, **options)
        return PeriodicAverager(carrier, averaging, ExchangeConfig(codec), name="t")

    averager = make()
    views = make_views(shapes, seed=1)
    averager.prepare(views)
    averages, distances = [], []
    for step in range(steps):
        for view in views:
            noise = np.random.default_rng([carrier.rank, step, view.numel]).standard_normal(view.numel)
            view.array += (spread(step, carrier.rank) * noise).astype(view.array.dtype)
        local = [view.array.astype(np.float64) for view in views]
        before = averager.rounds
        averager.count_step(learning_rate(step))
        if averager.rounds > before:
            averages.append(step + 1)
            distances.append((local, averager._pace.distance))
        if step == stop:
            averager.flush()
            state = averager.state_dict()
            averager = make()
            averager.load_state_dict(state)
            averager.prepare(views)
        elif stop is not None and step == -stop:
            averager.flush()
    return averages, distances, [view.array for view in views]


def test_the_period_grows_where_replicas_stay_close_and_shrinks_where_they_part():
    def spread(step, rank):
        return 0.01 if step < 8 or step >= 40 else 0.0005

    results = run_ranks(3, lambda carrier: run(carrier, spread, 80)[0])
    assert results[0] == results[1] == results[2]
    periods = np.diff([0, *results[0]]).tolist()
    assert periods[:3] == [2, 2, 2]
    assert max(periods) > 3  # close
    assert min(periods[periods.index(max(periods)) :]) < max(periods)  # far again


def test_ranks_that_see_different_drift_agree_all_the_same():
    """Each rank by itself would choose another period."""

    def spread(step, rank):
        return 0.01 * (1 + rank) if step < 8 else 0.01 / (1 + 10 * rank)

    results = run_ranks(3, lambda carrier: run(carrier, spread, 60)[:2])
    assert results[0][0] == results[1][0] == results[2][0]
    assert len({distances[-1][1] for _, distances in results}) == 3


@pytest.mark.parametrize("outer", [None, SlowMo(0.5)], ids=["replace", "slowmo"])
def test_the_distance_is_that_of_the_replica_from_the_mean(outer):
    options = {} if outer is None else {"outer": outer}
    results = run_ranks(2, lambda carrier: run(carrier, lambda step, rank: 0.01, 2, **options)[1])
    replicas = [np.concatenate(distances[0][0]) for distances in results]
    for replica, distances in zip(replicas, results, strict=True):
        away = replica - np.mean(replicas, axis=0)
        assert distances[0][1] == pytest.approx(away @ away, rel=0.05)  # the mean is coded


def test_a_learning_rate_of_one_rank_is_an_error_on_all():
    def program(carrier):
        with pytest.raises(DesynchronizedError, match=r"0\.1 on rank 0.*0\.2 on rank 1|rank 0.*0\.1.*rank 1.*0\.2"):
            run(carrier, lambda step, rank: 0.01, 2, learning_rate=lambda step: 0.1 * (1 + carrier.rank))

    run_ranks(2, program)


def test_replicas_that_run_away_are_no_reason_to_part():
    """A squared distance beyond float32 on one rank: it tells infinity, and all go on alike."""

    def program(carrier):
        options = {"shapes": {"w": (5000, "float32")}, "codec": codecs.none()}
        averages, distances, arrays = run(carrier, lambda step, rank: 1e18 if step > 3 and rank else 1.0, 10, **options)
        return averages, [distance for _, distance in distances], arrays[0]

    first, second = run_ranks(2, program)
    assert max(second[1]) > float(np.finfo(np.float32).max)
    assert first[0] == second[0]
    assert first[2].tobytes() == second[2].tobytes()


def test_learning_rates_that_differ_beyond_float32_move_all_ranks_alike():
    """On one rank they are rounded: what is told is what all of them calculate with."""

    def rate(carrier, step):
        return 0.1 / (1 + step) if carrier.rank else float(np.float32(0.1 / (1 + step)))

    def program(carrier):
        options = {"schedule": FixedPeriod(1), "outer": SlowMo(0.9)}
        return run(carrier, lambda step, rank: 0.01, 40, learning_rate=lambda step: rate(carrier, step), **options)[2]

    first, second = run_ranks(2, program)
    for array, other in zip(first, second, strict=True):
        assert array.tobytes() == other.tobytes()


def test_it_resumes_bit_exactly():
    def spread(step, rank):
        return 0.01 if step < 8 else 0.002

    whole = run_ranks(2, lambda carrier: run(carrier, spread, 30, stop=-14)[0::2])
    resumed = run_ranks(2, lambda carrier: run(carrier, spread, 30, stop=14)[0::2])
    for (steps, arrays), (resumed_steps, resumed_arrays) in zip(whole, resumed, strict=True):
        assert steps == resumed_steps
        for array, other in zip(arrays, resumed_arrays, strict=True):
            assert array.tobytes() == other.tobytes()


@pytest.mark.parametrize("threads", [1, 3])
def test_the_core_adds_up_in_one_order(threads):
    values = np.random.default_rng(1).standard_normal((2, 1_000_003)).astype(np.float32)
    source = native.Source.from_arrays([values[0]])
    expected = np.sum((values[0].astype(np.float64) - values[1]) ** 2)
    found = set()
    before = native.get_num_threads()
    for isa in native.available_isas():
        native.force_isa(isa)
        native.set_num_threads(threads)
        found.add(native.distance(source, 0, values[1]))
    native.force_isa(None)
    native.set_num_threads(before)
    assert len(found) == 1
    assert found.pop() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("drift", [-1.0, np.inf, np.nan])
@pytest.mark.parametrize("memory", [(0.0, 0.0), (2.0, 4.0)])
def test_where_there_is_no_distance_nothing_changes(drift, memory):
    seen = Observed(steps=50, has_dropped=False, learning_rate=0.1, drift=drift, period=3, memory=memory)
    assert SCHEDULE.advance(seen) == (3, memory)


@pytest.mark.parametrize(
    "wrong", [{"first": 0}, {"first": 5, "last": 4}, {"calibration_steps": 0}, {"low": 1.5}, {"high": 0.5}]
)
def test_arguments_are_checked(wrong):
    with pytest.raises(ArgumentError, match=list(wrong)[-1]):
        AdaptivePeriod(**wrong)


def test_it_round_trips_through_its_configuration():
    assert schedule_from_config(SCHEDULE.config()) == SCHEDULE
