"""Outer optimizers and schedules: the arithmetic, and many ranks in one process that have to agree."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pqasgd_horovod import codecs, native
from pqasgd_horovod.averaging import (
    AdaptivePeriod,
    ExchangeConfig,
    GrowingPeriod,
    MomentumCorrection,
    Nesterov,
    PeriodicAverager,
    PeriodicAveraging,
    PostLocal,
    Replace,
    SlowMo,
    larger_than,
)
from pqasgd_horovod.averaging.outer import Coefficients, outer_step
from pqasgd_horovod.averaging.policy import Rule
from pqasgd_horovod.errors import ArgumentError, DesynchronizedError
from pqasgd_horovod.exchange.carriers.threads import run_ranks
from tests.averaging.arrays import make_views
from tests.averaging.test_periodic import SHAPES, move

FRACTIONS = st.floats(0, 1, width=32)


@given(FRACTIONS, FRACTIONS, FRACTIONS, st.integers(0, 300))
def test_the_core_does_what_the_specification_says(decay, a, b, size):
    for isa in native.available_isas():
        native.force_isa(isa)
        generator = np.random.default_rng(size)
        momentum, delta = generator.standard_normal((2, size)).astype(np.float32)
        wanted_momentum, wanted_delta = momentum.copy(), delta.copy()
        outer_step(Coefficients(decay, a, b), wanted_momentum, wanted_delta)
        native.outer(decay, a, b, momentum, delta)
        np.testing.assert_array_equal(momentum, wanted_momentum)
        np.testing.assert_array_equal(delta, wanted_delta)
    native.force_isa(None)


def run_outer(outer, rates, carrier_size=2):
    """Train on ranks of one process; return the anchor after each average, and the mean change before it."""

    def program(carrier):
        averaging = PeriodicAveraging(period=2, outer=outer)
        averager = PeriodicAverager(carrier, averaging, ExchangeConfig(codecs.none()), name="t", check_consistency=True)
        views = make_views(SHAPES, seed=1)
        averager.prepare(views)
        history = []
        for step, rate in enumerate(rates):
            move(views, carrier.rank, step)
            local = {view.name: view.array.copy() for view in views}
            averager.count_step(rate)
            history.append((local, {view.name: view.array.copy() for view in views}))
        return history

    return run_ranks(carrier_size, program)


def by_hand(outer, rates, name, results):
    """The same in float64: the outer optimizer as its paper writes it, on the mean of the ranks' local replicas."""
    anchor = make_views(SHAPES, seed=1)[list(SHAPES).index(name)].array.astype(np.float64)
    momentum = np.zeros_like(anchor)
    for step, rate in enumerate(rates):
        if step % 2 == 0:
            continue
        mean = np.mean([result[step][0][name].astype(np.float64) for result in results], axis=0)
        if isinstance(outer, SlowMo):
            momentum = outer.beta * momentum + (anchor - mean) / rate
            anchor = anchor - outer.alpha * rate * momentum
        else:
            parameter = torch.nn.Parameter(torch.from_numpy(anchor.copy()))
            optimizer = torch.optim.SGD([parameter], lr=outer.lr, momentum=outer.momentum, nesterov=outer.momentum > 0)
            if step > 1 and outer.momentum:
                optimizer.state[parameter]["momentum_buffer"] = torch.from_numpy(momentum)
            parameter.grad = torch.from_numpy(anchor - mean)
            optimizer.step()
            if outer.momentum:
                momentum = optimizer.state[parameter]["momentum_buffer"].numpy().copy()
            anchor = parameter.detach().numpy().copy()
        np.testing.assert_allclose(results[0][step][1][name], anchor, rtol=0, atol=TOLERANCE[name])


# A few roundings of numbers below 8, in float32 and, for the half-precision tensor, in float16.
TOLERANCE = {"w": 4e-6, "b": 4e-6, "d": 4e-7, "h": 8e-3}


@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize("outer", [SlowMo(0.5, 0.7), SlowMo(0.9), Nesterov(0.7, 0.9), Nesterov(1.0, 0.0)], ids=str)
def test_the_anchor_moves_as_the_paper_says(outer, name):
    rates = [0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.02, 0.02]
    by_hand(outer, rates, name, run_outer(outer, rates))


@pytest.mark.parametrize("outer", [SlowMo(0.0, 1.0), Nesterov(1.0, 0.0)], ids=str)
def test_without_momentum_it_is_replacing(outer):
    rates = [0.1] * 6
    replaced, moved = run_outer(Replace(), rates), run_outer(outer, rates)
    for step in range(6):
        for name in SHAPES:
            np.testing.assert_array_equal(replaced[0][step][1][name], moved[0][step][1][name])


def test_buffers_are_averaged_and_no_more():
    def program(carrier):
        averaging = PeriodicAveraging(period=1, outer=Nesterov(0.7, 0.9))
        averager = PeriodicAverager(carrier, averaging, ExchangeConfig(codecs.none()), name="t")
        views = make_views({"b": (7, "float32"), "w": (2000, "float32")}, seed=1)
        buffers = make_views({"running_mean": (5, "float32")}, seed=10 + carrier.rank)
        averager.prepare(views, buffers)
        averager.count_step(0.1)
        return buffers[0].array.copy()

    wanted = np.mean([make_views({"x": (5, "float32")}, seed=10 + rank)[0].array for rank in range(2)], axis=0)
    for result in run_ranks(2, program):
        np.testing.assert_allclose(result, wanted, rtol=1e-6)


def steps_of_averages(schedule, rates, ranks=2):
    """Return after which steps a world of ranks averages."""

    def program(carrier):
        averager = PeriodicAverager(
            carrier, PeriodicAveraging(period=schedule), ExchangeConfig(codecs.none()), name="t"
        )
        views = make_views({"w": (2000, "float32")}, seed=1)
        averager.prepare(views)
        averaged = []
        for step, rate in enumerate(rates):
            before = averager.rounds
            averager.count_step(rate if isinstance(rate, float) else rate[carrier.rank])
            if averager.rounds > before:
                averaged.append(step + 1)
        return averaged

    results = run_ranks(ranks, program)
    assert all(result == results[0] for result in results)
    return results[0]


def test_post_local_by_steps():
    assert steps_of_averages(PostLocal(period=4, first_steps=3), [0.1] * 14) == [1, 2, 3, 7, 11]


def test_post_local_by_learning_rate():
    rates = [0.05, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.1, 0.1]
    assert steps_of_averages(PostLocal(period=3), rates) == [1, 2, 3, 4, 5, 8]


def test_growing():
    assert steps_of_averages(GrowingPeriod(first=1, last=4, every=4), [0.1] * 20) == [1, 2, 3, 4, 6, 8, 12, 16, 20]


@pytest.mark.parametrize("strategy", [{"period": PostLocal(period=3)}, {"period": 2, "outer": SlowMo(0.5)}], ids=str)
def test_ranks_with_different_learning_rates_are_an_error_on_all_of_them(strategy):
    def program(carrier):
        averager = PeriodicAverager(carrier, PeriodicAveraging(**strategy), ExchangeConfig(codecs.none()), name="t")
        views = make_views({"w": (2000, "float32")}, seed=1)
        averager.prepare(views)
        before = views[0].array.copy()
        rate = 0.1 if carrier.rank else 0.01
        if isinstance(strategy["period"], int):
            averager.count_step(rate)  # the first of two
        with pytest.raises(DesynchronizedError) as caught:
            averager.count_step(rate)
        np.testing.assert_array_equal(views[0].array, before)
        averager.count_step(0.1)  # with the same rate it goes on
        return str(caught.value), averager.rounds

    first, second = run_ranks(2, program)
    assert first == second
    assert "the learning rate is 0.01 on rank 0; 0.1 on rank 1" in first[0]
    assert first[1] == 1


def test_where_nothing_depends_on_the_learning_rate_it_may_differ():
    rates = [(0.1, 0.2), (0.3, 0.4), (0.1, 0.1)]
    assert steps_of_averages(GrowingPeriod(first=1, last=1), rates) == [1, 2, 3]


@pytest.mark.parametrize("outer", [SlowMo(0.5, 0.7), Nesterov(0.7, 0.9)], ids=str)
def test_resuming_is_bit_exact(outer):
    strategy = PeriodicAveraging(period=PostLocal(period=3, first_steps=2), outer=outer)
    rates = [0.1, 0.2, 0.2, 0.2, 0.2, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05]

    def program(carrier):
        def start(views):
            averager = PeriodicAverager(carrier, strategy, ExchangeConfig(codecs.eden(bits=2)), name="t")
            averager.prepare(views)
            return averager

        def steps(averager, views, numbers):
            for step in numbers:
                move(views, carrier.rank, step)
                averager.count_step(rates[step])

        whole = make_views(SHAPES, seed=1)
        steps(start(whole), whole, range(11))
        parts = make_views(SHAPES, seed=1)
        averager = start(parts)
        steps(averager, parts, range(5))
        state = averager.state_dict()
        averager = PeriodicAverager(carrier, strategy, ExchangeConfig(codecs.eden(bits=2)), name="t2")
        averager.load_state_dict(state)
        averager.prepare(parts)
        steps(averager, parts, range(5, 11))
        for one, other in zip(whole, parts, strict=True):
            np.testing.assert_array_equal(one.array, other.array)
        return averager.rounds

    assert run_ranks(2, program) == [5, 5]  # after steps 1, 2, 5, 8 and 11


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SlowMo(beta=1.0), "beta is 1.0; it must be a number from 0 to below 1"),
        (lambda: SlowMo(alpha=0.0), "alpha is 0.0; it must be a number above 0"),
        (lambda: Nesterov(lr=-1), "lr is -1; it must be a number above 0"),
        (lambda: Nesterov(momentum=float("nan")), "momentum is nan; it must be a number from 0 to below 1"),
        (lambda: PostLocal(period=0), "period is 0; it must be a whole number from 1"),
        (lambda: PostLocal(first_steps=-1), "first_steps is -1; it must be a whole number from 0"),
        (lambda: GrowingPeriod(first=8, last=4), "last is 4; it must be at least first, 8"),
        (lambda: SlowMo("half"), "beta is 'half'; it must be a number from 0 to below 1"),
        (lambda: Nesterov(lr=[1.0]), r"lr is \[1.0\]; it must be a number above 0"),
        (lambda: AdaptivePeriod(low="a"), "low is 'a' and high is 1.3; low must be a number from 0 to 1"),
        (lambda: PeriodicAveraging(outer="slowmo"), "outer is 'slowmo'; it must be an outer optimizer"),
        (lambda: PeriodicAveraging(period=1.5), "period is 1.5; it must be a whole number from 1"),
    ],
)
def test_values_that_are_not_allowed(make, text):
    with pytest.raises(ArgumentError, match=text):
        make()


def test_configurations_with_numbers_of_numpy_are_json():
    half, two = np.float32(0.5), np.int64(2)
    makes = [
        AdaptivePeriod(two, np.int64(8), two, half, np.float32(1.5)),
        MomentumCorrection(half, clip_norm=half, warmup_steps=two),
        SlowMo(half, half),
        ExchangeConfig(codecs.none(), small_tensor_threshold=two, bucket_cap_mb=half, seed=two),
        ExchangeConfig(codecs.none(), policy=(Rule(larger_than(two), codecs.eden()),)),
    ]
    for made in makes:
        assert json.loads(json.dumps(made.config())) == made.config()


def test_what_exchanges_gradients():
    assert PeriodicAveraging(period=1).exchanges_gradients
    assert not PeriodicAveraging(period=2).exchanges_gradients
    assert not PeriodicAveraging(period=1, outer=SlowMo()).exchanges_gradients
    assert not PeriodicAveraging(period=PostLocal(period=1)).exchanges_gradients
