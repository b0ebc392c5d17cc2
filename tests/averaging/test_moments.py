"""The inner optimizer's moments at an average, many ranks in one process."""

from __future__ import annotations

import numpy as np
import pytest

from pqasgd_horovod import codecs
from pqasgd_horovod.averaging import (
    ExchangeConfig,
    Nesterov,
    PeriodicAverager,
    PeriodicAveraging,
    PostLocal,
    SparseAveraging,
)
from pqasgd_horovod.errors import ArgumentError, NonFiniteError
from pqasgd_horovod.exchange.carriers.threads import run_ranks
from tests.averaging.arrays import ArrayView, make_views
from tests.averaging.test_periodic import move

SHAPES = {"w": (3000, "float32"), "b": (7, "float32"), "d": (2000, "float64")}


class FakeMoments:
    """Arrays in the place of an optimizer's state."""

    def __init__(self):
        self.present = []
        self.resets = 0

    def views(self):
        return list(self.present)

    def reset(self):
        self.resets += 1


def make(carrier, policy, codec=None, period=2, **options):
    averaging = PeriodicAveraging(period=period, moments=policy, **options)
    moments = FakeMoments()
    config = ExchangeConfig(codecs.eden(bits=4) if codec is None else codec)
    averager = PeriodicAverager(carrier, averaging, config, name="t", check_consistency=True, moments=moments)
    return averager, moments


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("outer", [{}, {"outer": Nesterov(0.7, 0.9)}], ids=["replace", "nesterov"])
def test_what_all_ranks_have_becomes_its_mean_and_the_rest_stays_local(size, outer):
    def program(carrier):
        averager, moments = make(carrier, "average", **outer)
        views = make_views(SHAPES, seed=1)
        averager.prepare(views)
        squares = [
            ArrayView(f"square of {name}", np.random.default_rng([carrier.rank, i]).random(n).astype(dtype) ** 8)
            for i, (name, (n, dtype)) in enumerate(SHAPES.items())
        ]
        late = ArrayView("late", np.full(5, 1.0 + carrier.rank, np.float32))
        moments.present = squares[::-1] + ([late] if carrier.rank == 0 else [])
        before = [view.array.copy() for view in squares]
        for step in range(2):
            move(views, carrier.rank, step)
            averager.count_step()
        after, alone = [view.array.copy() for view in squares], late.array.copy()
        moments.present = [late, *squares]
        move(views, carrier.rank, 2)
        averager.count_step()
        averager.flush()
        return before, after, alone, late.array, averager.state_dict()["anchor"].keys(), averager.rounds

    results = run_ranks(size, program)
    for i, name in enumerate(SHAPES):
        total = np.zeros(SHAPES[name][0], np.float32)
        for before, *_ in results:
            total += before[i].astype(np.float32) * np.float32(1 / size)
        for _, after, *_ in results:
            np.testing.assert_array_equal(after[i], total)
            assert (after[i] >= 0).all()
    for rank, (_, _, alone, late, saved, rounds) in enumerate(results):
        np.testing.assert_array_equal(alone, 1.0 + rank)
        np.testing.assert_allclose(late, np.mean([1.0 + r for r in range(size)]), rtol=1e-6)
        assert set(saved) == set(SHAPES)
        assert rounds == 2


def test_their_bytes_are_those_of_float32():
    def sent(policy):
        def program(carrier):
            averager, moments = make(carrier, policy, period=2)
            views = make_views({"w": (4096, "float32")}, seed=1)
            averager.prepare(views)
            moments.present = [ArrayView("moment of w", np.ones(4096, np.float32))]
            for step in range(4):
                move(views, carrier.rank, step)
                averager.count_step()
            return averager.communication_stats()["bytes_sent"]

        return run_ranks(2, program)

    of_parameters = 64 + 4 * (4 + 512)
    assert sent("local") == sent("reset") == [2 * of_parameters] * 2
    assert sent("average") == [2 * (of_parameters + 64 + 4 * 4096)] * 2


def test_they_are_reset_after_each_average_but_not_by_a_rank_alone():
    def program(carrier):
        averager, moments = make(carrier, "reset")
        views = make_views(SHAPES, seed=1)
        averager.prepare(views)
        seen = []
        for _ in range(5):
            averager.count_step()
            seen.append(moments.resets)
        averager.flush()
        return [*seen, moments.resets]

    assert run_ranks(2, program) == [[0, 1, 1, 2, 2, 3]] * 2
    assert program(None) == [0] * 6


def test_a_moment_that_is_not_finite_is_an_error_on_all_ranks_and_changes_nothing():
    def program(carrier):
        averager, moments = make(carrier, "average", period=1, outer=Nesterov(1.0, 0.0))
        views = make_views(SHAPES, seed=1)
        averager.prepare(views)
        moment = ArrayView("moment of w", np.ones(3000, np.float32))
        moment.array[2] = np.nan if carrier.rank else 2.0
        moments.present = [moment]
        move(views, carrier.rank, 0)
        before = views[0].array.copy()
        with pytest.raises(NonFiniteError) as caught:
            averager.count_step()
        np.testing.assert_array_equal(views[0].array, before)
        moment.array[2] = 4.0
        averager.count_step()
        return str(caught.value), moment.array[2]

    first, second = run_ranks(2, program)
    assert first == second
    assert "moment of w" in first[0] or "rank 1" in first[0]
    assert first[1] == 4.0


@pytest.mark.parametrize(
    ("make_strategy", "text"),
    [
        (lambda: PeriodicAveraging(2, moments="mean"), "moments is 'mean'; it must be one of 'local', 'average'"),
        (lambda: PeriodicAveraging(1, moments="average"), "moments is 'average' with period=1"),
        (
            lambda: PeriodicAveraging(1, moments="reset", selection=SparseAveraging(4).selection),
            "moments is 'reset' with selection=Rotation",
        ),
    ],
)
def test_values_that_are_not_allowed(make_strategy, text):
    with pytest.raises(ArgumentError, match=text):
        make_strategy()


def test_a_strategy_with_moments_round_trips():
    strategy = PeriodicAveraging(PostLocal(4), moments="reset")
    assert PeriodicAveraging.from_config(strategy.config()) == strategy
