"""Momentum and second moments at an average."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pqasgd_horovod.torch as hvd
from pqasgd_horovod.errors import ArgumentError

from .common import (
    ByHand,
    assert_equal,
    assert_it_resumes,
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


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=1e-2, amsgrad=True)


def moments_of(model, optimizer):
    return {
        f"{key} of {name}": value.numpy().copy()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
        if key != "step"
    }


def average_by_hand(by_hand):
    """The mean of each moment over the ranks, added up in rank order in float32."""
    everywhere = [moments_of(*pair) for pair in zip(by_hand.models, by_hand.optimizers, strict=True)]
    for model, optimizer in zip(by_hand.models, by_hand.optimizers, strict=True):
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state[parameter].items():
                if key != "step":
                    mean = np.zeros(value.shape, np.float32)
                    for moments in everywhere:
                        mean += moments[f"{key} of {name}"] * np.float32(1 / hvd.size())
                    value.copy_(torch.from_numpy(mean))


@several_ranks
@pytest.mark.parametrize("policy", ["average", "reset"])
@pytest.mark.parametrize("inner", [sgd, adam])
def test_it_is_local_sgd_with_these_moments_by_hand(inner, policy):
    model = make_model()
    averaging = hvd.PeriodicAveraging(period=2, moments=policy)
    optimizer = wrap(model, inner(model), averaging=averaging)
    by_hand = ByHand(model, inner)
    for step in range(6):
        train(model, optimizer, range(step, step + 1))
        by_hand.step(step)
        if step % 2 == 0:
            continue
        by_hand.average()
        if policy == "average":
            average_by_hand(by_hand)
        else:
            by_hand.optimizers = [inner(replica) for replica in by_hand.models]
        mine = moments_of(model, optimizer)
        assert_equal(mine, moments_of(by_hand.models[0], by_hand.optimizers[0]))
        for other in everybody(mine):
            assert_equal(mine, other)
        if policy == "average":
            assert mine
            assert all((value >= 0).all() for name, value in mine.items() if "sq" in name)
    assert_equal(floats(model), floats(by_hand.models[hvd.rank()]))


@several_ranks
@pytest.mark.parametrize("inner", [sgd, adam])
def test_a_layer_that_one_rank_does_not_use_keeps_its_own_moments(inner):
    model = make_model()
    averaging = hvd.PeriodicAveraging(period=2, moments="average")
    optimizer = wrap(model, inner(model), compression=hvd.Compression.eden(4), averaging=averaging)
    unused = [model.fc1.weight, model.fc1.bias]

    def steps(numbers, left_out):
        for step in numbers:
            optimizer.zero_grad()
            loss_of(model, step).backward()
            if left_out and hvd.rank() == 0:
                for parameter in unused:
                    parameter.grad = None
            optimizer.step()
            assert not optimizer._averager.steps_since_average or step % 2 == 0

    steps(range(4), left_out=True)
    assert_replicas_equal(model)
    assert not [parameter for parameter in unused if hvd.rank() == 0 and optimizer.state[parameter]]
    mine = {name: value for name, value in moments_of(model, optimizer).items() if "fc1" not in name}
    assert mine
    for other in everybody(mine):
        assert_equal(mine, other)
    steps(range(4, 6), left_out=False)
    mine = moments_of(model, optimizer)
    assert any("fc1" in name for name in mine)
    for other in everybody(mine):
        assert_equal(mine, other)


@pytest.mark.parametrize("policy", ["average", "reset"])
def test_training_resumes_bit_exactly(policy):
    averaging = hvd.PeriodicAveraging(period=2, moments=policy)
    assert_it_resumes({"compression": hvd.Compression.eden(2), "averaging": averaging}, saved_after=3, steps=7)


@several_ranks
def test_a_new_optimizer_of_adagrad_does_not_begin_with_nothing():
    model = make_model()
    averaging = hvd.PeriodicAveraging(period=2, moments="reset")
    optimizer = wrap(model, torch.optim.Adagrad(model.parameters(), lr=0.1), averaging=averaging)
    train(model, optimizer, range(3))
    entry = optimizer.state[model.fc1.weight]
    assert float(entry["step"]) == 1
    assert bool(entry["sum"].any())


@pytest.mark.parametrize("policy", ["average", "reset"])
def test_a_history_of_steps_is_no_moment(policy):
    model = make_model()
    inner = torch.optim.LBFGS(model.parameters())
    with pytest.raises(ArgumentError, match=f"moments is '{policy}' and the optimizer is LBFGS"):
        wrap(model, inner, averaging=hvd.PeriodicAveraging(period=2, moments=policy))
