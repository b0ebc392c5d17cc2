"""Schedules and outer optimizers in PyTorch: what depends on the learning rate, and what is saved."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pqasgd_horovod.torch as hvd
from pqasgd_horovod.averaging.outer import outer_step
from pqasgd_horovod.errors import DesynchronizedError

from .common import (
    ByHand,
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
    two_ranks,
    wrap,
)


def train_until_average(optimizer, model, steps):
    """Return after which of ``steps`` an average came."""
    averaged = []
    for step in steps:
        before = optimizer.communication_stats()["rounds"]
        train(model, optimizer, range(step, step + 1))
        if optimizer.communication_stats()["rounds"] > before:
            averaged.append(step + 1)
            assert_replicas_equal(model)
    return averaged


def test_post_local_sgd_begins_when_the_learning_rate_drops():
    model = make_model()
    optimizer = wrap(model, compression=hvd.Compression.eden(4), period=hvd.PostLocal(period=3))
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[3], gamma=0.1)
    averaged = []
    for step in range(10):
        averaged += train_until_average(optimizer, model, [step])
        scheduler.step()
    assert averaged == [1, 2, 3, 4, 7, 10]


def test_a_growing_period():
    model = make_model()
    optimizer = wrap(model, compression=hvd.Compression.eden(4), period=hvd.GrowingPeriod(first=1, last=4, every=3))
    assert train_until_average(optimizer, model, range(12)) == [1, 2, 3, 5, 7, 11]


@several_ranks  # a rank alone steps without an outer optimizer
@pytest.mark.parametrize("outer", [hvd.SlowMo(0.5, 0.7), hvd.Nesterov(0.7, 0.9)], ids=str)
def test_the_outer_optimizer_sees_the_mean_of_all_ranks(outer):
    model = make_model(norm=False)
    by_hand = ByHand(model, sgd)
    averaging = hvd.PeriodicAveraging(period=2, outer=outer, buffers="local")
    optimizer = wrap(model, compression=hvd.Compression.none, averaging=averaging)
    momentum = {name: np.zeros_like(value) for name, value in by_hand.anchor.items()}
    for step in range(6):
        before = {name: value.copy() for name, value in by_hand.anchor.items()}
        train(model, optimizer, range(step, step + 1))
        by_hand.step(step)
        if step % 2:
            by_hand.average()
            coefficients = outer.coefficients(1.0)
            for name, value in by_hand.anchor.items():
                delta = value - before[name]
                outer_step(coefficients, momentum[name], delta)
                by_hand.anchor[name] = before[name] + delta
            for replica in by_hand.models:
                for name, value in replica.state_dict().items():
                    value.copy_(torch.from_numpy(by_hand.anchor[name]))
    for name, value in floats(model).items():
        # The mean here is rounded once as a change and once as an anchor: a few bits of numbers below 1.
        np.testing.assert_allclose(value, by_hand.anchor[name], rtol=0, atol=1e-6, err_msg=name)


def test_training_resumes_bit_exactly_with_the_slow_momentum():
    averaging = hvd.PeriodicAveraging(period=hvd.PostLocal(period=3, first_steps=2), outer=hvd.SlowMo(0.5, 0.7))
    saved = assert_it_resumes({"compression": hvd.Compression.eden(2), "averaging": averaging}, saved_after=5, steps=11)
    names = {name for name, _ in make_model().named_parameters()}
    assert set(saved["momentum"]) == (names if hvd.size() > 1 else set())


@two_ranks
def test_learning_rates_that_differ_are_an_error_on_all_ranks():
    model = make_model()
    optimizer = wrap(model, sgd(model, lr=0.1 * (1 + hvd.rank())), period=hvd.PostLocal(period=3))
    loss_of(model, 0).backward()
    text = assert_raises_everywhere(DesynchronizedError, optimizer.step)
    assert "the learning rate is 0.1 on rank 0; 0.2 on rank 1" in text


def test_a_slow_momentum_is_broadcast_with_the_optimizer():
    averaging = hvd.PeriodicAveraging(period=2, outer=hvd.Nesterov(0.7, 0.9))
    model = make_model()
    optimizer = wrap(model, compression=hvd.Compression.eden(4), averaging=averaging)
    train(model, optimizer, range(4))
    state, model_state = optimizer.state_dict(), model.state_dict()
    fresh = make_model()
    optimizer = wrap(fresh, compression=hvd.Compression.eden(4), averaging=averaging)
    if hvd.rank() == 0:
        fresh.load_state_dict(model_state)
        optimizer.load_state_dict(state)
    hvd.broadcast_parameters(fresh.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    train(fresh, optimizer, range(4, 6))
    assert_replicas_equal(fresh)
    momenta = everybody({k: v.numpy().tobytes() for k, v in optimizer.state_dict()["pqasgd"]["momentum"].items()})
    assert all(momentum == momenta[0] for momentum in momenta)
