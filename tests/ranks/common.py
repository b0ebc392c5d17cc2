"""A model, data that differs between ranks, and comparisons between ranks."""

from __future__ import annotations

import collections
import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import pqasgd_horovod.torch as hvd

several_ranks = pytest.mark.skipif(hvd.size() < 2, reason="needs two ranks: make test-2")
two_ranks = pytest.mark.skipif(hvd.size() != 2, reason="written for two ranks: make test-2")


def make_model(dtype: torch.dtype = torch.float32, norm: bool = True) -> torch.nn.Sequential:
    """Two large weights, small biases, and running statistics."""
    torch.manual_seed(1)
    layers: dict[str, torch.nn.Module] = {"fc1": torch.nn.Linear(30, 60)}
    if norm:
        layers["norm"] = torch.nn.BatchNorm1d(60)
    layers |= {"relu": torch.nn.ReLU(), "fc2": torch.nn.Linear(60, 40), "out": torch.nn.Linear(40, 5)}
    return torch.nn.Sequential(collections.OrderedDict(layers)).to(dtype)


def batch(step: int, rank: int | None = None, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight examples of this rank, or of another."""
    generator = torch.Generator().manual_seed(1000 * step + (hvd.rank() if rank is None else rank))
    return torch.randn(8, 30, generator=generator).to(dtype), torch.randint(0, 5, (8,), generator=generator)


def loss_of(model: torch.nn.Module, step: int, rank: int | None = None) -> torch.Tensor:
    """The loss of a rank's batch."""
    inputs, labels = batch(step, rank, next(model.parameters()).dtype)
    return torch.nn.functional.cross_entropy(model(inputs).float(), labels)


def train(model: torch.nn.Module, optimizer: Any, steps: range, rank: int | None = None) -> None:
    """The ordinary loop."""
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step, rank).backward()
        optimizer.step()


def sgd(model: torch.nn.Module, lr: float = 0.1, **options: Any) -> torch.optim.SGD:
    """The inner optimizer of most tests."""
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3, **options)


def wrap(model: torch.nn.Module, inner: torch.optim.Optimizer | None = None, **options: Any) -> Any:
    """A DistributedOptimizer that checks the replicas after every average."""
    return hvd.DistributedOptimizer(
        sgd(model) if inner is None else inner, model.named_parameters(), **{"check_consistency": True, **options}
    )


def assert_it_resumes(options: dict[str, Any], saved_after: int, steps: int) -> dict[str, Any]:
    """Training that was saved and resumed has the bits of training that was flushed there; return the saved state."""
    whole = make_model()
    optimizer = wrap(whole, **options)
    train(whole, optimizer, range(saved_after))
    optimizer.flush()
    train(whole, optimizer, range(saved_after, steps))
    part = make_model()
    optimizer = wrap(part, **options)
    train(part, optimizer, range(saved_after))
    state = optimizer.state_dict()  # which flushes
    resumed = make_model()
    resumed.load_state_dict(copy.deepcopy(part.state_dict()))
    optimizer = wrap(resumed, **options)
    optimizer.load_state_dict(state)
    train(resumed, optimizer, range(saved_after, steps))
    assert_equal(floats(resumed), floats(whole))
    return state["pqasgd"]


def floats(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Parameters and floating-point buffers, copied, by name."""
    return {
        name: value.detach().clone().to(torch.float32 if value.dtype == torch.bfloat16 else value.dtype).numpy()
        for name, value in model.state_dict().items()
        if value.is_floating_point()
    }


def everybody(value: Any) -> list[Any]:
    """What each rank has, in rank order."""
    return hvd.allgather_object(value, name="test.everybody")


# Horovod makes the sparse mean without saying whether to check it, which torch warns of.
horovods_sparse_path = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")


class WithSparseGradient(torch.nn.Module):
    """An embedding of 50 words, of which rank r uses r + 1 in each step, and a linear layer."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.words = torch.nn.Embedding(50, 40, sparse=True, dtype=dtype)
        self.out = torch.nn.Linear(40, 40)

    def train_one_step(self, optimizer: Any) -> None:
        optimizer.zero_grad()
        self.out(self.words(torch.arange(hvd.rank() + 1)).float()).square().mean().backward()
        optimizer.step()

    def gathered_nbytes(self, rank: int) -> int:
        """What a rank gives to the allgathers of a step: rows of numbers, and an index of 8 bytes for each."""
        return (rank + 1) * (40 * self.words.weight.element_size() + 8)


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """The same bits under the same names."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def assert_replicas_equal(model: torch.nn.Module) -> None:
    """The same bits on every rank."""
    for other in everybody(floats(model)):
        assert_equal(floats(model), other)


def assert_raises_everywhere(error: type[Exception], function: Callable[[], Any], seconds: float = 10.0) -> str:
    """Every rank raises ``error`` with the same text, soon; return the text."""
    started = time.monotonic()
    with pytest.raises(error) as caught:
        function()
    took = time.monotonic() - started
    texts = everybody(str(caught.value))
    assert len(set(texts)) == 1, texts
    assert took < seconds
    return texts[0]


class ByHand:
    """Local SGD of all ranks, computed in one process: plain optimizers, and a mean every ``period`` steps."""

    def __init__(
        self, model: torch.nn.Module, make_optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer]
    ) -> None:
        self.models = [copy.deepcopy(model) for _ in range(hvd.size())]
        self.optimizers = [make_optimizer(replica) for replica in self.models]
        self.anchor = floats(model)

    def step(self, step: int) -> None:
        for rank, (model, optimizer) in enumerate(zip(self.models, self.optimizers, strict=True)):
            optimizer.zero_grad()
            loss_of(model, step, rank).backward()
            optimizer.step()

    def average(self) -> None:
        """Anchor += mean of the changes, added up in rank order in float32; buffers become the mean of their values."""
        weight = np.float32(1 / hvd.size())
        replicas = [floats(model) for model in self.models]
        parameters = dict(self.models[0].named_parameters())
        for name, anchor in self.anchor.items():
            mean = np.zeros(anchor.shape, np.float32)
            for replica in replicas:
                change = replica[name] - anchor if name in parameters else replica[name]
                mean += change.astype(np.float32) * weight
            self.anchor[name] = anchor + mean if name in parameters else mean.astype(anchor.dtype)
        for model in self.models:
            state = model.state_dict()
            for name, value in self.anchor.items():
                state[name].copy_(torch.from_numpy(value))
