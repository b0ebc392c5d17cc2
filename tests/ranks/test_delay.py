"""Averages that are applied some steps after they began, on real Horovod."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

import pqasgd_horovod.torch as hvd
from pqasgd_horovod.errors import ArgumentError, CollectiveTimeoutError, DesynchronizedError, NonFiniteError

from .common import (
    ByHand,
    assert_equal,
    assert_it_resumes,
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

EDEN2 = hvd.Compression.eden(bits=2)
DELAYED = hvd.PeriodicAveraging(period=4, delay=2)


@several_ranks
@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
def test_without_loss_it_is_the_recursion_by_hand(exchange):
    model = make_model(norm=False)
    optimizer = wrap(model, averaging=DELAYED, exchange=exchange)
    by_hand, snapshots = ByHand(model, sgd), []
    for step in range(11):
        train(model, optimizer, range(step, step + 1))
        by_hand.step(step)
        if step % 4 == 3:
            snapshots = [floats(replica) for replica in by_hand.models]
        if step % 4 == 1 and snapshots:
            now = [floats(replica) for replica in by_hand.models]
            for replica, snapshot in zip(by_hand.models, snapshots, strict=True):
                replica.load_state_dict({name: torch.from_numpy(value) for name, value in snapshot.items()})
            by_hand.average()
            for replica, values, snapshot in zip(by_hand.models, now, snapshots, strict=True):
                with torch.no_grad():
                    for name, value in replica.state_dict().items():
                        value += torch.from_numpy(values[name] - snapshot[name])
        assert_equal(floats(model), floats(by_hand.models[hvd.rank()]))
    optimizer.flush()
    assert_replicas_equal(model)
    assert optimizer.communication_stats()["rounds"] == 3


@pytest.mark.parametrize(
    "options",
    [
        {"compression": EDEN2, "exchange": "two_phase", "bucket_cap_mb": 0.01},
        {"compression": hvd.Compression.topk(0.1), "feedback": hvd.Feedback()},
        {
            "compression": hvd.Compression.quantize(bits=4),
            "averaging": hvd.PeriodicAveraging(
                3, outer=hvd.Nesterov(0.7, 0.9), selection=hvd.Rotation(2), delay=1, buffers="local"
            ),
        },
    ],
    ids=["two_phase", "feedback", "streaming"],
)
def test_training_resumes_bit_exactly(options):
    """Saved in the window, with statistics of BatchNorm that are averaged too."""
    assert_it_resumes({"averaging": DELAYED, **options}, saved_after=5, steps=12)


@several_ranks
def test_replicas_are_the_same_after_a_flush_only():
    model = make_model()
    optimizer = wrap(model, averaging=DELAYED, compression=EDEN2)
    train(model, optimizer, range(10))
    weights = everybody(floats(model)["fc1.weight"])
    assert not np.array_equal(weights[0], weights[1])
    assert_equal(*(everybody({k: v.copy() for k, v in optimizer._averager._arrays()["anchor"].items()})[:2]))
    optimizer.flush()
    assert_replicas_equal(model)
    assert optimizer.communication_stats()["rounds"] == 3


@several_ranks
def test_nan_is_the_same_error_everywhere_when_it_is_due():
    model = make_model()
    optimizer = wrap(model, averaging=DELAYED, compression=EDEN2)
    train(model, optimizer, range(3))
    loss_of(model, 3).backward()
    if hvd.rank() == 1:
        with torch.no_grad():
            model.fc2.weight[0, 0] = torch.nan
    optimizer.step()
    if hvd.rank() == 1:
        with torch.no_grad():
            model.fc2.weight[0, 0] = 0.0
        optimizer.state[model.fc2.weight]["momentum_buffer"].zero_()
    train(model, optimizer, range(4, 5))
    optimizer.zero_grad()
    text = assert_raises_everywhere(NonFiniteError, optimizer.step)
    assert "rank 1" in text
    train(model, optimizer, range(6, 9))
    assert optimizer.communication_stats()["rounds"] == 1
    optimizer.flush()
    assert_replicas_equal(model)


@several_ranks
def test_a_rank_that_flushes_in_the_window_is_an_error_on_all_ranks():
    model = make_model()
    optimizer = wrap(model, averaging=DELAYED, compression=EDEN2, check_consistency=False)
    train(model, optimizer, range(5))

    def go_on():
        if hvd.rank() == 0:
            optimizer.flush()
        else:
            train(model, optimizer, range(5, 12))

    text = assert_raises_everywhere(DesynchronizedError, go_on)
    assert "flushing after 5 steps and 0 averages on rank 0; averaging after 8 steps and 1 averages on rank" in text


@several_ranks
def test_a_rank_that_saves_alone_is_told_so_and_training_goes_on():
    model = make_model()
    optimizer = wrap(model, averaging=DELAYED, compression=EDEN2, flush_timeout=0.5)
    train(model, optimizer, range(5))
    before = floats(model)
    if hvd.rank() == 0:
        started = time.monotonic()
        with pytest.raises(CollectiveTimeoutError, match=r"optimizer.flush\(\) on every rank first"):
            optimizer.state_dict()
        assert time.monotonic() - started < 5
    assert_equal(before, floats(model))
    hvd.barrier()
    train(model, optimizer, range(5, 9))
    optimizer.flush()
    assert optimizer.communication_stats()["rounds"] == 3
    assert_replicas_equal(model)


def test_parameters_join_and_leave_in_the_window():
    model, extra = make_model(), torch.nn.Linear(30, 50)
    hvd.broadcast_parameters(extra.state_dict(), root_rank=0)
    optimizer = wrap(model, averaging=DELAYED, compression=EDEN2)
    train(model, optimizer, range(5))
    optimizer.add_param_group({"params": list(extra.parameters()), "lr": 0.05})
    for step in range(5, 9):
        optimizer.zero_grad()
        (loss_of(model, step) + loss_of(extra, step)).backward()
        optimizer.step()
    model.fc1.weight.requires_grad_(False)
    elements = optimizer.communication_stats()["num_elements"]
    train(model, optimizer, range(9, 10))
    frozen = model.fc1.weight.detach().clone()
    train(model, optimizer, range(10, 17))
    assert torch.equal(frozen, model.fc1.weight)  # not even the codec's noise
    assert optimizer.communication_stats()["num_elements"] == elements - frozen.numel()
    optimizer.flush()
    assert_replicas_equal(model)
    assert_replicas_equal(extra)


def test_a_step_that_grad_scaler_skips_on_one_rank_counts():
    model = make_model()
    optimizer = wrap(model, averaging=DELAYED, compression=EDEN2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    for step in range(10):
        poisoned = step == 4 and hvd.rank() == hvd.size() - 1
        optimizer.zero_grad()
        loss = loss_of(model, step)
        scaler.scale(loss * torch.inf if poisoned else loss).backward()
        scaler.step(optimizer)
        scaler.update()
    optimizer.flush()
    stats = everybody(optimizer.communication_stats())
    assert {(entry["steps"], entry["rounds"]) for entry in stats} == {(10, 3)}
    assert_replicas_equal(model)


def test_other_collectives_may_run_beside_the_exchange():
    model = make_model()
    optimizer = wrap(model, averaging=DELAYED, compression=EDEN2, bucket_cap_mb=0.001, exchange="two_phase")
    for step in range(12):
        train(model, optimizer, range(step, step + 1))
        assert float(hvd.allreduce(torch.tensor(float(step)), name="metric")) == step
    optimizer.flush()
    assert_replicas_equal(model)


def test_a_delay_as_long_as_the_period_is_refused():
    with pytest.raises(ArgumentError, match="delay is 4; it must be below"):
        hvd.PeriodicAveraging(period=4, delay=4)
