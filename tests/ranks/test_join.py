"""``optimizer.join()``: ranks with different numbers of batches, on real ranks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import pqasgd_horovod.torch as hvd
from pqasgd_horovod.errors import ArgumentError, DesynchronizedError

from .common import (
    WithSparseGradient,
    assert_equal,
    assert_raises_everywhere,
    assert_replicas_equal,
    everybody,
    floats,
    loss_of,
    make_model,
    several_ranks,
    sgd,
    train,
    wrap,
)

needs_a_process_set = pytest.mark.skipif(
    hvd.size() < 3, reason="needs a process set that is not all ranks: make test-4"
)


def batches(epoch, rank=None):
    """The steps of a rank's epoch: the higher its number, the more; other ones have most in the second epoch."""
    number = hvd.rank() if rank is None else rank
    return range(100 * epoch, 100 * epoch + 3 + 2 * (number if epoch == 0 else hvd.size() - 1 - number))


def inner_state(optimizer):
    """The optimizer's own state, as arrays."""
    state = optimizer._inner_class.state_dict(optimizer)["state"]
    return {f"{i} {key}": np.asarray(value) for i, own in state.items() for key, value in own.items()}


CODED = {"compression": hvd.Compression.eden(bits=4)}
CONFIGS = {
    "two phases": {"period": 4, **CODED, "exchange": "two_phase"},
    "delay": {"averaging": hvd.PeriodicAveraging(4, delay=2), **CODED},
    "outer optimizer": {"averaging": hvd.PeriodicAveraging(3, outer=lambda params: torch.optim.Adam(params, 0.01))},
    "moments": {"averaging": hvd.PeriodicAveraging(3, moments="average", buffers="max_count")},
    "gradients": {"compression": hvd.Compression.topk(density=0.1), "feedback": hvd.Feedback()},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_uneven_epochs_end_with_the_same_replicas_everywhere(name):
    model = make_model(norm="gradients" not in name)
    optimizer = wrap(model, **CONFIGS[name])
    for epoch in range(2):
        train(model, optimizer, batches(epoch))
        assert optimizer.join() == (hvd.size() - 1 if epoch == 0 else 0)
        assert_replicas_equal(model)
        if "gradients" in name:
            states = everybody(inner_state(optimizer))
            assert len(states[0]) > 0
            for state in states:
                assert_equal(state, states[0])
        state = optimizer.state_dict()  # nothing is left to flush, so no rank waits for another
        if "pqasgd" in state:
            assert len(set(everybody((state["pqasgd"]["steps"], state["pqasgd"]["rounds"])))) == 1


@pytest.mark.parametrize("period", [1, 4])
def test_it_learns_the_data_of_all_ranks(period):
    model = make_model(norm=False)
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), 0.1), period=period, **CODED)

    def mean_loss():
        own = [loss_of(model, step).item() for step in batches(0)]
        return float(np.mean([loss for losses in everybody(own) for loss in losses]))

    before = mean_loss()
    for _ in range(12):
        train(model, optimizer, batches(0))
        optimizer.join()
    assert mean_loss() < 0.9 * before


def mean_by_hand(divide_by_all):
    """One epoch of full SGD of all ranks, computed in one process; the mean is of the ranks that have a batch."""
    model = make_model(norm=False)
    optimizer = sgd(model)
    for step in batches(0, hvd.size() - 1):
        present = [rank for rank in range(hvd.size()) if step in batches(0, rank)]
        optimizer.zero_grad()
        total = sum(loss_of(model, step, rank) for rank in present)
        (total / (hvd.size() if divide_by_all else len(present))).backward()
        optimizer.step()
    return floats(model)


def test_gradients_are_the_mean_over_the_ranks_with_data():
    model = make_model(norm=False)
    optimizer = wrap(model, compression=hvd.Compression.bf16)
    train(model, optimizer, batches(0))
    optimizer.join()
    right, other = mean_by_hand(divide_by_all=False), mean_by_hand(divide_by_all=True)
    for name, value in floats(model).items():
        np.testing.assert_allclose(value, right[name], rtol=0, atol=2e-3)
    if hvd.size() > 1:
        assert max(np.abs(other[name] - right[name]).max() for name in right) > 5e-3


def test_replicas_are_the_mean_over_the_ranks_with_data():
    """One period, longer than any rank's data: each counts once."""
    model = make_model(norm=False)
    start = floats(model)
    replicas = []
    for rank in range(hvd.size()):
        replica = copy.deepcopy(model)
        train(replica, sgd(replica), batches(0, rank), rank)
        replicas.append(floats(replica))
    optimizer = wrap(model, period=100)
    train(model, optimizer, batches(0))
    optimizer.join()
    for name, value in floats(model).items():
        mean = start[name] + sum(replica[name] - start[name] for replica in replicas) / hvd.size()
        np.testing.assert_allclose(value, mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"period": 4}, torch.bfloat16),
        (CODED, torch.bfloat16),
    ],
)
def test_a_rank_without_any_batch_has_the_same_replica(options, dtype):
    model = make_model(dtype, norm=False)
    optimizer = wrap(model, **options)
    train(model, optimizer, range(0 if hvd.rank() == 0 and hvd.size() > 1 else 6))
    assert (optimizer.join() > 0) == (hvd.size() > 1)
    assert_replicas_equal(model)


@needs_a_process_set
@pytest.mark.parametrize("options", [{"period": 4}, CODED])
def test_the_rank_that_is_returned_is_horovods(options):
    some = hvd.add_process_set([0, 2])
    model = make_model(norm=False)
    optimizer = wrap(model, process_set=some, **options)
    if some.included():
        train(model, optimizer, batches(0))
        assert optimizer.join() == 2
    replicas = everybody(floats(model))
    assert_equal(replicas[0], replicas[2])
    hvd.remove_process_set(some)


@several_ranks
def test_who_flushes_while_others_have_joined_is_told_so():
    model = make_model()
    optimizer = wrap(model, period=8)
    train(model, optimizer, range(3 if hvd.rank() else 2))
    text = assert_raises_everywhere(DesynchronizedError, optimizer.flush if hvd.rank() else optimizer.join)
    assert "joining after 2 steps and 0 averages on rank 0; flushing after 3 steps" in text


@several_ranks
def test_gradients_in_flight_are_refused():
    for options in (CODED, {}):
        model = make_model(norm=False)
        optimizer = wrap(model, **options)
        loss_of(model, 0).backward()
        assert "before optimizer.step()" in assert_raises_everywhere(ArgumentError, optimizer.join)
        optimizer.step()


@several_ranks
def test_signs_without_a_scale_are_refused():
    model = make_model(norm=False)
    optimizer = wrap(model, compression=hvd.Compression.signsgd(majority_vote=True))
    text = assert_raises_everywhere(ArgumentError, optimizer.join)
    assert "a rank without data would vote" in text


@pytest.mark.parametrize("feedback", [None, hvd.Feedback()])
def test_rows_of_an_embedding_are_the_mean_of_the_ranks_with_data(feedback):
    """The last rank makes a second step alone, at the same rate as it would without others."""
    model = WithSparseGradient()
    # Owners of shards, in the other exchange, have kept something of the mean before, and it arrives multiplied.
    options = {**CODED, "exchange": "allgather", "feedback": feedback}
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), 0.1), **options)
    last = hvd.rank() == hvd.size() - 1
    model.train_one_step(optimizer)
    before = floats(model)
    alone = WithSparseGradient()
    alone.load_state_dict(model.state_dict())
    plain = torch.optim.SGD(alone.parameters(), 0.1)
    plain.zero_grad()
    if last:
        model.train_one_step(optimizer)
        alone.train_one_step(plain)
    assert optimizer.join() == hvd.size() - 1
    assert_replicas_equal(model)
    if last:
        for name, value in floats(alone).items():
            moved, expected = floats(model)[name] - before[name], value - before[name]
            assert np.linalg.norm(moved - expected) < 0.2 * np.linalg.norm(expected), name


@several_ranks
@pytest.mark.parametrize("options", [{}, {"compression": hvd.Compression.fp16, "num_groups": 2}])
def test_it_is_refused_where_horovod_averages(options):
    """Horovod's own join() ended this very job, in its background loop, after the tests before this file."""
    model = make_model(norm=False)
    optimizer = wrap(model, **options)
    train(model, optimizer, range(2))
    assert "where Horovod averages" in assert_raises_everywhere(ArgumentError, optimizer.join)
    train(model, optimizer, range(2, 3))
    assert_replicas_equal(model)
