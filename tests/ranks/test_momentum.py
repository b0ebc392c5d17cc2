"""Momentum correction in PyTorch: where it is allowed, momentum SGD where nothing is dropped, saved and resumed."""

from __future__ import annotations

import itertools

import pytest
import torch

import pqasgd_horovod.torch as hvd
from pqasgd_horovod.errors import ArgumentError

from .common import (
    WithSparseGradient,
    assert_equal,
    assert_it_resumes,
    assert_raises_everywhere,
    assert_replicas_equal,
    everybody,
    floats,
    make_model,
    several_ranks,
    sgd,
    train,
    wrap,
)

OPTIONS = {"compression": hvd.Compression.topk(0.05), "feedback": hvd.MomentumCorrection(0.9, warmup_steps=6)}


def plain(model: torch.nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@several_ranks
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_training_resumes_bit_exactly_in_the_middle_of_the_warm_up(clip_norm, monkeypatch):
    monkeypatch.setattr(f"{__package__}.common.sgd", plain)
    feedback = hvd.MomentumCorrection(0.9, clip_norm=clip_norm, warmup_steps=6)
    saved = assert_it_resumes({**OPTIONS, "feedback": feedback}, saved_after=4, steps=8)
    assert set(saved["residual"]) == {"fc1.weight", "fc2.weight"}
    assert set(saved["velocity"]) == {name for name, _ in make_model().named_parameters()}
    assert len({values["fc1.weight"].numpy().tobytes() for values in everybody(saved["velocity"])}) == hvd.size()


@several_ranks
def test_a_broadcast_leaves_every_rank_its_own_velocity():
    model = make_model(norm=False)
    optimizer = wrap(model, plain(model), **OPTIONS)
    train(model, optimizer, range(3))
    before = {name: values.numpy() for name, values in optimizer.state_dict()["pqasgd"]["velocity"].items()}
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    after = {name: values.numpy() for name, values in optimizer.state_dict()["pqasgd"]["velocity"].items()}
    assert_equal(after, before)
    train(model, optimizer, range(3, 5))
    assert_replicas_equal(model)


def test_where_everything_is_sent_it_is_momentum_sgd():
    """Density 1 without masking; on one rank any density. The mean of momenta is the momentum of the mean."""
    model, whole = make_model(norm=False), make_model(norm=False)
    options = {"compression": hvd.Compression.topk(1.0), "feedback": hvd.MomentumCorrection(0.9, masking=False)}
    optimizer = wrap(model, plain(model), **options)
    stock = hvd.DistributedOptimizer(
        torch.optim.SGD(whole.parameters(), lr=0.1, momentum=0.9), whole.named_parameters()
    )
    train(model, optimizer, range(5))
    train(whole, stock, range(5))
    for name, values in floats(model).items():
        torch.testing.assert_close(torch.from_numpy(values), whole.state_dict()[name], rtol=1e-4, atol=1e-6)


@several_ranks
def test_warming_up_sends_more_and_less_and_less():
    model = make_model(norm=False)
    optimizer = wrap(model, plain(model), **OPTIONS)
    sent = [0]
    for step in range(8):
        train(model, optimizer, range(step, step + 1))
        sent.append(optimizer.communication_stats()["bytes_sent"])
    each = [after - before for before, after in itertools.pairwise(sent)]
    assert each[0] == each[1] > each[2] > each[3]  # 25 %, 6.25 %, 5 %
    assert len(set(each[3:])) == 1
    assert_replicas_equal(model)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (sgd, "momentum=0.9"),
        (lambda model: torch.optim.AdamW(model.parameters()), r"betas\[0\]=0.9"),
    ],
)
def test_an_optimizer_with_momentum_is_refused(make, name):
    model = make_model()
    with pytest.raises(ArgumentError, match=f"optimizer has {name} with feedback=MomentumCorrection"):
        wrap(model, make(model), **OPTIONS)


def test_a_parameter_group_with_momentum_is_refused():
    model, more = make_model(), torch.nn.Linear(3, 3)
    optimizer = wrap(model, plain(model), **OPTIONS)
    with pytest.raises(ArgumentError, match=r"optimizer has momentum=0\.5"):
        optimizer.add_param_group({"params": more.parameters(), "momentum": 0.5})
    optimizer.add_param_group({"params": more.parameters()})


def test_it_is_for_gradients():
    model = make_model()
    text = assert_raises_everywhere(ArgumentError, lambda: wrap(model, plain(model), **OPTIONS, period=2))
    assert "it is for gradients, period=1" in text


def test_sparse_gradients_have_to_be_sent_as_dense():
    model = WithSparseGradient()
    optimizer = wrap(model, plain(model), **OPTIONS)
    text = assert_raises_everywhere(ArgumentError, lambda: model.train_one_step(optimizer))
    assert "['words.weight'] are sparse" in text
    model = WithSparseGradient()
    other = wrap(model, plain(model), **OPTIONS, sparse_as_dense=True)
    model.train_one_step(other)
