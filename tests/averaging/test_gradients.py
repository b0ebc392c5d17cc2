"""Quantized gradients on arrays, many ranks in one process."""

from __future__ import annotations

import numpy as np
import pytest

from pqasgd_horovod import codecs
from pqasgd_horovod.averaging import ExchangeConfig, GradientAverager
from pqasgd_horovod.errors import DesynchronizedError, NonFiniteError
from pqasgd_horovod.exchange.carriers.threads import run_ranks
from pqasgd_horovod.keys import derive_key
from tests.averaging.arrays import decoded_mean, make_views

SHAPES = {"a": (2000, "float32"), "b": (5, "float32"), "c": (3000, "float64"), "d": (1500, "float16")}
CODEC = codecs.maxscale(bits=3)


def make_averager(carrier, sum_over_ranks=False, **options):
    config = ExchangeConfig(CODEC, **options)
    return GradientAverager(carrier, config, name="test", sum_over_ranks=sum_over_ranks, check_consistency=True)


@pytest.mark.parametrize("sum_over_ranks", [False, True])
def test_gradients_become_the_mean_of_decoded_gradients(sum_over_ranks):
    def program(carrier):
        averager = make_averager(carrier, sum_over_ranks, method="allgather")
        views = make_views(SHAPES, seed=carrier.rank)
        averager.prepare(views)
        averager.finish()
        return {view.name: view.array for view in views}

    results = run_ranks(3, program)
    inputs = [{view.name: view.array for view in make_views(SHAPES, seed=rank)} for rank in range(3)]
    for index, names, codec in ((0, ("a", "c", "d"), CODEC), (1, ("b",), codecs.none())):
        vectors = [np.concatenate([arrays[name].astype(np.float32) for name in names]) for arrays in inputs]
        keys = [derive_key(index, rank, 0, 0, 0) for rank in range(3)]
        expected = decoded_mean(vectors, None, ExchangeConfig(codec), keys)
        if sum_over_ranks:
            expected *= np.float32(3)
        start = 0
        for name in names:
            part = expected[start : start + SHAPES[name][0]]
            start += SHAPES[name][0]
            for result in results:
                np.testing.assert_array_equal(result[name], part.astype(result[name].dtype), err_msg=name)


@pytest.mark.parametrize("bucket_cap_mb", [16.0, 0.004])
@pytest.mark.parametrize("method", ["allgather", "two_phase"])
def test_the_order_in_which_gradients_come_does_not_matter(method, bucket_cap_mb):
    def program(carrier, shuffled):
        averager = make_averager(carrier, method=method, bucket_cap_mb=bucket_cap_mb)
        views = make_views(SHAPES, seed=carrier.rank)
        averager.prepare(views)
        names = list(SHAPES)
        for step in range(3):
            if shuffled:
                np.random.default_rng([step, carrier.rank]).shuffle(names)
            for name in names[: len(names) - step]:
                averager.ready(name)
            averager.finish()
        return [view.array for view in views]

    ordered, shuffled = (run_ranks(2, lambda carrier, s=shuffled: program(carrier, s)) for shuffled in (False, True))
    for one, other in zip(ordered + shuffled, [ordered[0]] * 4, strict=True):
        for x, y in zip(one, other, strict=True):
            np.testing.assert_array_equal(x, y)


def test_a_bucket_leaves_as_soon_as_it_is_complete():
    def program(carrier):
        averager = make_averager(carrier, bucket_cap_mb=0.004, method="allgather")
        averager.prepare(make_views(SHAPES, seed=0))
        begun = []
        for channel in averager._channels:
            begin = channel.exchange.begin
            channel.exchange.begin = lambda bucket, *args, begin=begin, **kw: (
                begun.append(bucket),
                begin(bucket, *args, **kw),
            )
        averager.ready("a")
        first = len(begun)
        averager.ready("a")  # a second time changes nothing
        averager.ready("c")
        second = len(begun)
        averager.finish()
        return first, second, len(begun)

    for first, second, total in run_ranks(2, program):
        assert 0 < first < second < total


def test_nan_raises_everywhere_and_leaves_the_gradients():
    def program(carrier):
        averager = make_averager(carrier)
        views = make_views(SHAPES, seed=carrier.rank)
        averager.prepare(views)
        if carrier.rank == 0:
            views[1].array[0] = np.inf
        before = [view.array.copy() for view in views]
        with pytest.raises(NonFiniteError) as caught:
            averager.finish()
        for array, view in zip(before, views, strict=True):
            np.testing.assert_array_equal(array, view.array)
        views[1].array[0] = 0
        averager.finish()
        return str(caught.value)

    texts = run_ranks(2, program)
    assert texts[0] == texts[1]


def test_counters_that_differ_raise_everywhere():
    def program(carrier):
        averager = make_averager(carrier)
        averager.prepare(make_views(SHAPES, seed=0))
        averager.steps += carrier.rank
        averager.finish()

    errors = run_ranks(2, program, return_exceptions=True)
    assert [type(error) for error in errors] == [DesynchronizedError] * 2
    assert str(errors[0]) == str(errors[1])


def test_the_step_is_saved_since_it_keys_the_noise():
    def program(carrier):
        averager = make_averager(carrier)
        views = make_views(SHAPES, seed=carrier.rank)
        averager.prepare(views)
        averager.finish()
        resumed = make_averager(carrier)
        resumed.load_state_dict(averager.state_dict())
        fresh = make_averager(carrier)
        outcomes = []
        for candidate in (averager, resumed, fresh):
            views = make_views(SHAPES, seed=10 + carrier.rank)
            candidate.prepare(views)
            candidate.finish()
            outcomes.append(views[0].array)
        return outcomes

    for straight, resumed, fresh in run_ranks(2, program):
        np.testing.assert_array_equal(straight, resumed)
        assert not np.array_equal(straight, fresh)
