"""Whose running statistics everybody takes over, many ranks in one process."""

from __future__ import annotations

import numpy as np
import pytest

from pqasgd_horovod import codecs
from pqasgd_horovod.averaging import ExchangeConfig, PeriodicAverager, PeriodicAveraging, SparseAveraging
from pqasgd_horovod.errors import NonFiniteError
from pqasgd_horovod.exchange.carriers.threads import run_ranks
from tests.averaging.arrays import make_views


class Layer:
    """Statistics that count what they have seen."""

    def __init__(self, name, size, count, value):
        self.name, self.nbytes, self.description = name, 4 * size, f"float32 [{size}]"
        self.batches, self.values = count, np.full(size, value, np.float32)

    def count(self):
        return self.batches

    def pack(self):
        return self.values.tobytes()

    def is_finite(self, packed):
        return bool(np.isfinite(packed.view(np.float32)).all())

    def adopt(self, count, packed):
        self.batches, self.values = count, packed.copy().view(np.float32)


def average(carrier, layers, averaging, rounds=1, **options):
    averager = PeriodicAverager(carrier, averaging, ExchangeConfig(codecs.none(), **options), name="t")
    views = make_views({"w": (2000, "float32")}, seed=1)
    averager.prepare(views, counted=layers)
    sent = []
    for _ in range(rounds):
        views[0].array += np.float32(carrier.rank)
        try:
            averager.count_step()
        except NonFiniteError as error:
            return str(error), views[0].array, averager
        sent.append(averager.communication_stats()["bytes_sent"])
    return sent, views[0].array, averager


COUNTS = [(3, 7, 0), (5, 7, 0), (5, 6, 0)]  # of each rank, for each layer: the winners are ranks 1, 0 and 0


def make_layers(rank):
    return [Layer(f"norm{i}", 4 + i, count, 10 * rank + i + 0.1) for i, count in enumerate(COUNTS[rank])]


def test_each_layer_takes_those_of_the_lowest_rank_with_the_largest_count():
    def program(carrier):
        layers = make_layers(carrier.rank)
        sent, _, _ = average(carrier, layers, PeriodicAveraging(period=1, buffers="max_count"))
        plain, _, _ = average(carrier, [], PeriodicAveraging(period=1))
        return [(layer.batches, layer.values) for layer in layers], sent[0] - plain[0]

    for rank, (layers, nbytes) in enumerate(run_ranks(3, program)):
        for (batches, values), (winner, count, first) in zip(
            layers, [(1, 5, 0.1), (0, 7, 1.1), (0, 0, 2.1)], strict=True
        ):
            assert batches == count
            np.testing.assert_array_equal(values, np.float32(10 * winner + first))
        won = {0: 4 * (5 + 6), 1: 4 * 4, 2: 0}[rank]
        assert nbytes == 2 * (3 * 8 + won)


def test_in_a_rotation_they_travel_with_the_last_part():
    def program(carrier):
        layers = make_layers(carrier.rank)
        strategy = SparseAveraging(period=2, buffers="max_count")
        average(carrier, layers, strategy, rounds=1)
        before = layers[0].batches
        average(carrier, layers, strategy, rounds=2)
        return before, layers[0].batches

    assert run_ranks(3, program) == [(3, 5), (5, 5), (5, 5)]


def test_statistics_that_are_not_finite_are_an_error_on_all_ranks_and_change_nothing():
    def program(carrier):
        layers = make_layers(carrier.rank)
        if carrier.rank == 1:
            layers[0].values[1] = np.inf
        strategy = PeriodicAveraging(period=1, buffers="max_count")
        text, parameters, averager = average(carrier, layers, strategy)
        expected = make_views({"w": (2000, "float32")}, seed=1)[0].array + np.float32(carrier.rank)
        np.testing.assert_array_equal(parameters, expected)
        assert [layer.batches for layer in layers] == list(COUNTS[carrier.rank])
        layers[0].values[:] = 1.0
        averager.count_step()
        return text, layers[0].batches

    results = run_ranks(3, program)
    assert results == [results[0]] * 3
    assert results[0][1] == 5
    assert "norm0 are NaN or Inf on rank 1" in results[0][0]


@pytest.mark.parametrize("size", [2, 3])
def test_not_finite_and_propagated(size):
    def program(carrier):
        layers = make_layers(carrier.rank)
        layers[0].values[1] = np.inf
        average(carrier, layers, PeriodicAveraging(period=1, buffers="max_count"), nonfinite="propagate")
        return layers[0].values[1]

    assert run_ranks(size, program) == [np.inf] * size
