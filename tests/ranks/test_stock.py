"""With a codec that commutes with a sum and period 1: what stock Horovod gives, to the bit."""

from __future__ import annotations

import horovod.torch as horovod
import numpy as np
import pytest
import torch

import pqasgd_horovod.torch as hvd
from pqasgd_horovod.averaging.statistics import ring_allreduce_nbytes
from pqasgd_horovod.errors import ArgumentError
from tests.ranks.common import (
    WithSparseGradient,
    assert_equal,
    assert_replicas_equal,
    everybody,
    floats,
    horovods_sparse_path,
    loss_of,
    make_model,
    sgd,
    train,
    wrap,
)


def train_both(ours_options, stock_options, loop=train):
    models = [make_model(), make_model()]
    ours = wrap(models[0], **ours_options)
    stock = horovod.DistributedOptimizer(sgd(models[1]), models[1].named_parameters(), **stock_options)
    for model, optimizer in zip(models, (ours, stock), strict=True):
        loop(model, optimizer, range(5))
    assert_as_stock(floats(models[0]), floats(models[1]))
    return ours


def assert_as_stock(ours, stock):
    """To the bit on two ranks; on more Horovod adds in an order that depends on what it happens to fuse."""
    if hvd.size() <= 2:
        assert_equal(ours, stock)
    for name, value in ours.items():
        np.testing.assert_allclose(value, stock[name], rtol=1e-3, atol=1e-3, err_msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": (hvd.Compression.fp16, horovod.Compression.fp16)},
        {"gradient_predivide_factor": 2.0},
        {"groups": 2},
        {"op": horovod.Sum},
    ],
    ids=str,
)
def test_period_one_without_loss_is_stock_horovod(options):
    split = {key: value if isinstance(value, tuple) else (value, value) for key, value in options.items()}
    ours, stock = ({key: value[i] for key, value in split.items()} for i in (0, 1))
    optimizer = train_both(ours, stock)
    stats = optimizer.communication_stats()
    num_elements = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    expected = 2 * (hvd.size() - 1) * 4 * num_elements // hvd.size() * 5
    assert stats["steps"] == 5
    assert abs(stats["uncompressed_bytes"] - expected) <= 5
    if hvd.size() > 1:
        assert stats["compression_ratio"] == pytest.approx(2.0 if "compression" in options else 1.0, rel=1e-3)


@pytest.mark.parametrize(
    ("dtype", "compression", "nbytes"),
    [(torch.float64, "none", 8), (torch.float16, "none", 2), (torch.float64, "fp16", 2)],
    ids=str,
)
def test_bytes_are_those_of_what_travels(dtype, compression, nbytes):
    model = make_model(dtype, norm=False)
    optimizer = wrap(model, compression=getattr(hvd.Compression, compression))
    train(model, optimizer, range(1))
    num_elements = sum(p.numel() for p in model.parameters())
    assert optimizer.communication_stats()["bytes_sent"] == 2 * (hvd.size() - 1) * nbytes * num_elements // hvd.size()


@horovods_sparse_path
@pytest.mark.parametrize(
    ("sparse_as_dense", "compression", "nbytes"), [(False, "none", 4), (True, "none", 4), (True, "fp16", 2)]
)
def test_bytes_of_sparse_gradients_are_those_of_an_allgather(sparse_as_dense, compression, nbytes):
    model = WithSparseGradient()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"compression": getattr(hvd.Compression, compression), "sparse_as_dense": sparse_as_dense}
    optimizer = wrap(model, inner, **options)
    for step in range(4):
        model.words.sparse = step < 3  # at last it is dense, and reduced
        model.train_one_step(optimizer)
    stats = optimizer.communication_stats()
    sparse, dense = 50 * 40, 40 * 40 + 40
    own, total = model.gathered_nbytes(hvd.rank()), sum(map(model.gathered_nbytes, range(hvd.size())))
    gathers = 0 if sparse_as_dense else 3
    reduced = gathers * ring_allreduce_nbytes(dense, hvd.size(), nbytes)
    reduced += (4 - gathers) * ring_allreduce_nbytes(dense + sparse, hvd.size(), nbytes)
    assert stats["bytes_sent"] == reduced + gathers * (hvd.size() - 1) * own
    assert stats["bytes_received"] == reduced + gathers * (total - own)
    assert stats["uncompressed_bytes"] == ring_allreduce_nbytes(4 * (dense + sparse), hvd.size())


def test_horovods_own_compressors_are_understood():
    train_both({"compression": horovod.Compression.fp16}, {"compression": horovod.Compression.fp16})


def test_a_compressor_of_the_users_own_works_as_in_horovod():
    class Halving(horovod.compression.Compressor):
        @staticmethod
        def compress(tensor):
            return tensor / 2, None

        @staticmethod
        def decompress(tensor, ctx):
            return tensor * 2

    train_both({"compression": Halving}, {"compression": Halving})


def test_ours_works_in_stock_horovod():
    model = make_model()
    optimizer = horovod.DistributedOptimizer(sgd(model), model.named_parameters(), compression=hvd.Compression.fp16)
    train(model, optimizer, range(2))
    assert_equal_parameters_everywhere(model)


def assert_equal_parameters_everywhere(model):
    mine = {name: p.detach().numpy() for name, p in model.named_parameters()}
    for other in everybody(mine):
        assert_equal(mine, other)


def test_clipping_between_synchronize_and_step():
    def loop(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.synchronize()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            with optimizer.skip_synchronize():
                optimizer.step()

    train_both({}, {}, loop)


def test_added_parameters_are_synchronized_too():
    model, extra = make_model(), torch.nn.Linear(30, 5)
    hvd.broadcast_parameters(extra.state_dict(), root_rank=0)
    optimizer = wrap(model)
    optimizer.add_param_group({"params": list(extra.parameters())})
    assert optimizer.param_groups[1]["lr"] == 0.1
    for step in range(3):
        optimizer.zero_grad(set_to_none=False)
        (loss_of(model, step) + loss_of(extra, step)).backward()
        optimizer.step()
    assert_equal_parameters_everywhere(model)
    assert_replicas_equal(extra)


def test_everything_of_horovod_torch_is_here():
    ours = set(dir(hvd))
    assert {name for name in dir(horovod) if not name.startswith("_")} <= ours
    assert hvd.allreduce is horovod.allreduce
    assert horovod.DistributedOptimizer is not hvd.DistributedOptimizer
    assert horovod.Compression is not hvd.Compression


def test_step_hooks_and_schedulers_run_once_for_each_step():
    for options in ({}, {"compression": hvd.Compression.quantize(bits=4)}, {"period": 2}):
        model = make_model()
        optimizer = wrap(model, **options)
        calls = []
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append(1))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
            scheduler.step()
        assert len(calls) == 3
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)


def test_wrapping_twice_is_refused():
    model = make_model()
    with pytest.raises(ArgumentError, match="already"):
        hvd.DistributedOptimizer(wrap(model), model.named_parameters())
