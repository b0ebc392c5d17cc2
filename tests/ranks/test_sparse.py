"""Sparse parameter averaging in PyTorch."""

from __future__ import annotations

import numpy as np
import pytest

import pqasgd_horovod.torch as hvd

from .common import (
    assert_it_resumes,
    assert_replicas_equal,
    everybody,
    floats,
    make_model,
    several_ranks,
    train,
    wrap,
)


def averaging(**options):
    return {"compression": hvd.Compression.eden(4), "averaging": hvd.SparseAveraging(period=3, **options)}


@several_ranks
@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
def test_parts_become_the_same_in_turn_and_a_flush_makes_all_of_it_the_same(exchange):
    model = make_model()
    optimizer = wrap(model, **averaging(), exchange=exchange)
    for step in range(7):
        train(model, optimizer, range(step, step + 1))
        replicas = everybody(np.concatenate([value.reshape(-1) for value in floats(model).values()]))
        common = np.mean(replicas[0] == replicas[1])
        assert 0.01 < common < 0.9  # the last part is a short one
    optimizer.flush()
    assert_replicas_equal(model)
    statistics = optimizer.communication_stats()
    assert statistics["rounds"] == 8
    assert statistics["bytes_sent"] > 0


def test_training_resumes_bit_exactly():
    assert_it_resumes(averaging(outer=hvd.Nesterov(0.7, 0.5)), saved_after=5, steps=9)
