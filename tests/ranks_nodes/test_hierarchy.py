"""Two nodes of two ranks: plain numbers inside a node, coded ones between, and the same bits on all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pqasgd_horovod.torch as hvd
from pqasgd_horovod.errors import ArgumentError, MismatchError, NonFiniteError

from ..ranks.common import (
    ByHand,
    assert_it_resumes,
    assert_raises_everywhere,
    assert_replicas_equal,
    everybody,
    floats,
    loss_of,
    make_model,
    sgd,
    train,
    wrap,
)

on_nodes = pytest.mark.skipif(
    hvd.size() != 4 or hvd.local_size() != 2, reason="needs two nodes: horovodrun -np 4 -H localhost:2,127.0.0.1:2"
)
pytestmark = on_nodes
OPTIONS = {"compression": hvd.Compression.eden(2), "hierarchy": "node"}


def test_uncoded_it_is_local_sgd_of_all_ranks():
    model = make_model()
    by_hand = ByHand(model, sgd)
    optimizer = wrap(model, compression=hvd.Compression.none, period=2, hierarchy="node")
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        by_hand.step(step)
        if step % 2:
            by_hand.average()
    for name, value in floats(model).items():
        np.testing.assert_allclose(value, by_hand.anchor[name], atol=1e-5, err_msg=name)
    assert_replicas_equal(model)


@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
@pytest.mark.parametrize("period", [1, 2])
def test_replicas_are_the_same_and_between_nodes_there_are_codes_only(period, exchange):
    model = make_model(norm=False)
    optimizer = wrap(model, **OPTIONS, period=period, exchange=exchange, small_tensor_threshold=0)
    train(model, optimizer, range(6))
    assert_replicas_equal(model)
    everywhere = everybody(optimizer.communication_stats())
    of_node = everywhere[0]["bytes_sent"] + everywhere[1]["bytes_sent"]
    elements, rounds = everywhere[0]["num_elements"], 6 // period
    # Blocks of 1,024 numbers, 2 bits each and a scale; one bucket, and headers in one phase or two.
    blocks = -(-elements // 1024)
    assert rounds * elements // 4 < of_node <= rounds * (blocks * (4 + 256) + 2 * 64 + 2 * 260)
    assert all(stats["bytes_sent_inside_node"] > 4 * rounds * elements / 2 for stats in everywhere)
    assert everywhere[0]["uncompressed_bytes"] == 6 * (2 * 3 * 4 * elements // 4) // 2


@pytest.mark.parametrize(("period", "delay"), [(1, 0), (3, 0), (3, 2)])
def test_training_resumes_bit_exactly_with_the_residuals_of_nodes(period, delay):
    options = {**OPTIONS, "averaging": hvd.PeriodicAveraging(period, delay=delay), "feedback": hvd.Feedback()}
    assert_it_resumes(options, saved_after=4, steps=7)


def test_nan_on_one_rank_is_one_error_on_all():
    model = make_model(norm=False)
    optimizer = wrap(model, **OPTIONS, period=1)
    train(model, optimizer, range(1))
    before = floats(model)

    def step():
        optimizer.zero_grad()
        (loss_of(model, 1) * (float("nan") if hvd.rank() == 3 else 1.0)).backward()
        optimizer.step()

    assert "the node of rank" in assert_raises_everywhere(NonFiniteError, step)
    for name, value in floats(model).items():
        np.testing.assert_array_equal(value, before[name])
    train(model, optimizer, range(2, 3))
    assert_replicas_equal(model)


def test_the_hierarchy_of_one_rank_alone_is_an_error_on_all():
    model = make_model()
    options = {**OPTIONS, "period": 2, "hierarchy": "node" if hvd.rank() == 2 else None}
    assert "hierarchy" in assert_raises_everywhere(MismatchError, lambda: wrap(model, **options))


def test_a_rank_that_fails_at_construction_fails_on_all():
    model = make_model()
    options = {**OPTIONS, "period": 0 if hvd.rank() == 1 else 2}
    with pytest.raises((ArgumentError, MismatchError)) as caught:
        wrap(model, **options)
    assert "period is 0" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"hierarchy": "rack", "period": 2}, "hierarchy is 'rack'"),
        ({"hierarchy": "node", "compression": hvd.Compression.none}, "HOROVOD_HIERARCHICAL_ALLREDUCE"),
    ],
)
def test_what_is_refused(options, text):
    with pytest.raises(ArgumentError, match=text):
        wrap(make_model(), **options)


def test_it_is_for_all_ranks():
    process_set = hvd.add_process_set([0, 3])
    try:
        with pytest.raises(ArgumentError, match="it is for all ranks"):
            hvd.DistributedOptimizer(
                torch.optim.SGD(make_model().parameters(), lr=0.1), process_set=process_set, **OPTIONS, period=2
            )
    finally:
        hvd.remove_process_set(process_set)


def test_residuals_of_nodes_are_not_combined():
    model = make_model()
    optimizer = wrap(model, **OPTIONS, period=2, feedback=hvd.Feedback())
    train(model, optimizer, range(2))
    with pytest.raises(ArgumentError, match="hierarchy"):
        hvd.combine_states(everybody(optimizer.state_dict()))
