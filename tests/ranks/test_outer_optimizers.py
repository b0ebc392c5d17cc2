"""Optimizers of torch as the outer one."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

import pqasgd_horovod.torch as hvd
from pqasgd_horovod.errors import ArgumentError, MismatchError

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
    two_ranks,
    wrap,
)

ADAM = functools.partial(torch.optim.Adam, lr=0.01, betas=(0.5, 0.75))
EDEN2 = hvd.Compression.eden(bits=2)


class Replacing(torch.optim.SGD):
    """Leaves its result in other memory, as some optimizers do."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data = parameter.data - group["lr"] * parameter.grad


@several_ranks  # a rank alone steps without an outer optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "outer",
    [
        ADAM,
        lambda params: torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True),
        lambda params: torch.optim.Adafactor(params, lr=0.01),  # which looks at shapes
        lambda params: Replacing(params, lr=0.7),
    ],
    ids=["adam", "nesterov", "adafactor", "replacing"],
)
def test_it_steps_the_anchor_on_the_negative_mean(outer, dtype):
    model = make_model(dtype, norm=False)
    model.fc1.weight.data = model.fc1.weight.data.t().contiguous().t()  # another order in memory
    averaging = hvd.PeriodicAveraging(period=2, outer=outer, buffers="local")
    optimizer = wrap(model, compression=hvd.Compression.none, averaging=averaging)
    by_hand = ByHand(model, sgd)
    anchors = {name: torch.nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    stepped = outer(list(anchors.values()))
    for step in range(6):
        train(model, optimizer, range(step, step + 1))
        by_hand.step(step)
        if step % 2 == 0:
            continue
        for name, anchor in anchors.items():
            mean = np.zeros(anchor.shape, np.float32)
            for replica in by_hand.models:
                change = dict(replica.named_parameters())[name].detach() - anchor.detach()
                mean += change.numpy().astype(np.float32) * np.float32(1 / hvd.size())
            anchor.grad = -torch.from_numpy(mean).to(dtype)
        stepped.step()
        for replica in by_hand.models:
            replica.load_state_dict({name: anchor.detach() for name, anchor in anchors.items()})
        assert_replicas_equal(model)
    for name, value in floats(model).items():
        np.testing.assert_allclose(value, anchors[name].detach().numpy(), rtol=0, atol=1e-6, err_msg=name)


def test_training_resumes_bit_exactly():
    averaging = hvd.PeriodicAveraging(period=2, outer=ADAM)
    saved = assert_it_resumes({"compression": EDEN2, "averaging": averaging}, saved_after=5, steps=9)
    if hvd.size() > 1:
        assert set(saved["outer"]["state"]) == {name for name, _ in make_model().named_parameters()}
        assert int(saved["outer"]["state"]["fc1.weight"]["step"]) == 3
    else:
        assert saved["outer"] is None or not saved["outer"]["state"]


def test_its_state_is_broadcast_with_the_optimizer():
    averaging = hvd.PeriodicAveraging(period=2, outer=ADAM)
    model = make_model()
    optimizer = wrap(model, compression=EDEN2, averaging=averaging)
    train(model, optimizer, range(4))
    state, model_state = optimizer.state_dict(), model.state_dict()
    fresh = make_model()
    optimizer = wrap(fresh, compression=EDEN2, averaging=averaging)
    if hvd.rank() == 0:
        fresh.load_state_dict(model_state)
        optimizer.load_state_dict(state)
    hvd.broadcast_parameters(fresh.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    train(fresh, optimizer, range(4, 6))
    assert_replicas_equal(fresh)


@several_ranks
def test_a_parameter_that_is_added_begins_anew_and_the_others_go_on():
    model = make_model()
    inner = torch.optim.SGD([p for name, p in model.named_parameters() if "out" not in name], lr=0.1)
    averaging = hvd.PeriodicAveraging(period=2, outer=ADAM)
    optimizer = wrap(model, inner, compression=EDEN2, averaging=averaging)
    train(model, optimizer, range(3))
    optimizer.add_param_group({"params": list(model.out.parameters())})
    train(model, optimizer, range(3, 6))
    state = optimizer.state_dict()["pqasgd"]["outer"]["state"]
    assert {name: int(entry["step"]) for name, entry in state.items() if "weight" in name and "norm" not in name} == {
        "fc1.weight": 3,
        "fc2.weight": 3,
        "out.weight": 2,
    }
    assert_replicas_equal(model)


class OfAnotherMachine(torch.optim.SGD):
    """Rounds in another way on each rank."""

    def step(self, closure=None):
        super().step()
        with torch.no_grad():
            self.param_groups[0]["params"][0].mul_(1 + 2**-22 * hvd.rank())


@two_ranks
def test_other_arithmetic_on_a_rank_is_found():
    model = make_model()
    averaging = hvd.PeriodicAveraging(period=2, outer=lambda params: OfAnotherMachine(params, lr=0.7))
    optimizer = wrap(model, compression=EDEN2, averaging=averaging)
    train(model, optimizer, range(1))
    loss_of(model, 1).backward()
    assert "replicas differ after an average" in assert_raises_everywhere(MismatchError, optimizer.step)


@two_ranks
def test_other_settings_on_a_rank_are_an_error_on_all():
    model = make_model()
    outer = functools.partial(torch.optim.SGD, lr=0.5 + hvd.rank())
    averaging = hvd.PeriodicAveraging(period=2, outer=outer)
    text = assert_raises_everywhere(MismatchError, lambda: wrap(model, averaging=averaging))
    assert "averaging.outer.optimizer.lr: it is " in text


@several_ranks
def test_a_state_of_another_outer_optimizer_is_refused():
    model = make_model()
    optimizer = wrap(model, averaging=hvd.PeriodicAveraging(period=2, outer=ADAM))
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    other = wrap(model, averaging=hvd.PeriodicAveraging(period=2, outer=torch.optim.Adam))
    with pytest.raises(ArgumentError, match=r"averaging.outer was .*betas.* and is"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("outer", "text"),
    [
        (lambda params: None, "which returned a NoneType; it must return a torch optimizer"),
        (hvd.SlowMo, "it must be a callable that is given parameters"),
        (torch.optim.LBFGS, "which steps without a closure"),
        (lambda params: torch.optim.SGD(params, lr=-1.0), "raised ValueError: Invalid learning rate"),
    ],
)
def test_what_is_no_outer_optimizer(outer, text):
    model = make_model()
    with pytest.raises(ArgumentError, match=text):
        wrap(model, averaging=hvd.PeriodicAveraging(period=2, outer=outer))


def test_parts_of_tensors_are_refused():
    with pytest.raises(ArgumentError, match=r"selection=Rotation.*an optimizer steps whole tensors"):
        hvd.SparseAveraging(period=4, outer=ADAM)


def test_all_ranks_hold_the_same_state():
    averaging = hvd.PeriodicAveraging(period=2, outer=ADAM)
    model = make_model()
    optimizer = wrap(model, compression=EDEN2, averaging=averaging)
    train(model, optimizer, range(4))
    outer = optimizer.state_dict()["pqasgd"]["outer"] or {"state": {}}
    mine = {f"{n} {k}": v.numpy() for n, entry in outer["state"].items() for k, v in entry.items()}
    for other in everybody(mine):
        assert_equal(mine, other)
