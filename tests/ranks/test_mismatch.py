"""Ranks that were given different settings: the same error on all of them, within seconds."""

from __future__ import annotations

import re

import pytest
import torch

import pqasgd_horovod.torch as hvd
from pqasgd_horovod.errors import ArgumentError, DesynchronizedError, MismatchError
from tests.ranks.common import (
    assert_raises_everywhere,
    assert_replicas_equal,
    everybody,
    loss_of,
    make_model,
    several_ranks,
    sgd,
    train,
    wrap,
)

pytestmark = several_ranks

EDEN = hvd.Compression.eden


@pytest.mark.parametrize(
    ("odd", "even", "field"),
    [
        ({"period": 8}, {"period": 4}, "averaging.period"),
        ({"period": 8}, {}, "averaging.period"),
        ({"compression": EDEN(bits=2)}, {"compression": EDEN(bits=4)}, "exchange.codec.bits"),
        ({"compression": EDEN(bits=2)}, {"compression": hvd.Compression.none}, "exchange.codec"),
        ({"seed": 1}, {"seed": 2}, "exchange.seed"),
        ({"exchange": "two_phase"}, {"exchange": "allgather"}, "exchange.method"),
        ({"small_tensor_threshold": 10}, {}, "exchange.small_tensor_threshold"),
        ({"bucket_cap_mb": 1.0}, {}, "exchange.bucket_cap_mb"),
        ({"nonfinite": "propagate"}, {}, "exchange.nonfinite"),
        ({"op": hvd.Sum}, {}, "op"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_settings(odd, even, field):
    model = make_model()
    options = odd if hvd.rank() % 2 else even
    text = assert_raises_everywhere(MismatchError, lambda: wrap(model, **{"compression": EDEN(bits=4), **options}))
    assert field in text
    assert "rank 0" in text or "ranks 0" in text


def test_models():
    wide = torch.nn.Linear(30, 40 + hvd.rank())
    text = assert_raises_everywhere(MismatchError, lambda: wrap(wide, period=2))
    assert "parameters.weight" in text
    assert "[40, 30]" in text


@pytest.mark.parametrize("period", [1, 3])
def test_parameters_in_another_order(period):
    """Names and shapes agree, so nothing else would notice that one layer's numbers land in another."""
    model = make_model()
    parameters = list(model.parameters())
    inner = torch.optim.SGD(parameters[::-1] if hvd.rank() else parameters, lr=0.1)
    text = assert_raises_everywhere(MismatchError, lambda: wrap(model, inner, compression=EDEN(bits=4), period=period))
    assert "parameter_order[0]" in text


def test_inner_optimizers():
    model = make_model()
    inner = torch.optim.AdamW(model.parameters()) if hvd.rank() else sgd(model)
    text = assert_raises_everywhere(MismatchError, lambda: wrap(model, inner, period=2))
    assert "AdamW" in text


def test_an_argument_that_only_one_rank_gets_wrong():
    model = make_model()
    error = ArgumentError if hvd.rank() == 0 else MismatchError
    with pytest.raises(error, match="period is 0"):
        wrap(model, period=0 if hvd.rank() == 0 else 2)
    train(model, wrap(model, period=2), range(2))
    assert_replicas_equal(model)


def test_one_rank_makes_a_step_too_many():
    model = make_model()
    optimizer = wrap(model, compression=EDEN(bits=2), period=3)
    train(model, optimizer, range(1))
    if hvd.rank() == 0:
        train(model, optimizer, range(1, 2))
    text = assert_raises_everywhere(DesynchronizedError, optimizer.flush)
    assert re.search(r"2 steps.* on rank 0; .*1 step", text) or "step is 2 on rank 0; 1 on rank" in text


def test_tensors():
    other = torch.zeros(5 + hvd.rank())
    assert "tensor" in assert_raises_everywhere(MismatchError, lambda: hvd.compressed_allreduce(other))
    bits = EDEN(bits=2 + hvd.rank() % 2)
    assert "codec.bits" in assert_raises_everywhere(
        MismatchError, lambda: hvd.compressed_allreduce(torch.zeros(5), compression=bits)
    )
    assert len(set(everybody(float(hvd.compressed_allreduce(torch.ones(5)).sum())))) == 1


def test_data_differs_between_ranks():
    """Every other test rests on that."""
    assert len(set(everybody(loss_of(make_model(), 0).item()))) == hvd.size()
