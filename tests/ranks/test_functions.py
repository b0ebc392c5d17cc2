"""compressed_allreduce, the carrier, and the compressors."""

from __future__ import annotations

import json

import horovod.torch as horovod
import numpy as np
import pytest
import torch

import pqasgd_horovod.torch as hvd
from pqasgd_horovod import codecs
from pqasgd_horovod.errors import ArgumentError, CollectiveTimeoutError, NonFiniteError
from tests.ranks.common import assert_raises_everywhere, everybody, make_model, several_ranks

COMPRESSIONS = [
    hvd.Compression.none,
    hvd.Compression.fp16,
    hvd.Compression.bf16,
    hvd.Compression.quantize(bits=3),
    hvd.Compression.maxscale(bits=4),
    hvd.Compression.qsgd(bits=8),
    hvd.Compression.terngrad(),
    hvd.Compression.eden(bits=2, rounding="stochastic"),
    hvd.Compression.natural(),
    hvd.Compression.signsgd(),
    hvd.Compression.onebit(block_size=512),
    hvd.Compression.topk(density=0.1, values=hvd.Compression.eden(bits=4)),
    hvd.Compression.randomk(density=0.5),
]


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=str)
def test_allreduce_of_a_tensor(compression):
    generator = torch.Generator().manual_seed(hvd.rank())
    tensor = torch.randn(50, 60, generator=generator)
    kept = tensor.clone()
    mean = hvd.compressed_allreduce(tensor, compression=compression, exchange="allgather")
    assert torch.equal(tensor, kept)
    assert mean.shape == tensor.shape
    exact = torch.stack([torch.from_numpy(other) for other in everybody(tensor.numpy())]).mean(dim=0)
    for other in everybody(mean.numpy()):
        np.testing.assert_array_equal(mean.numpy(), other)
    if hvd.size() == 1 or compression == hvd.Compression.none:
        torch.testing.assert_close(mean, exact)
    else:
        assert torch.linalg.norm(mean - exact) < 2 * torch.linalg.norm(exact)
        assert not torch.equal(mean, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_allreduce_of_other_types_orders_and_sizes(dtype):
    tensor = torch.full((4, 6), float(hvd.rank()), dtype=dtype).t()
    expected = sum(range(hvd.size()))
    for op, value in ((hvd.Average, expected / hvd.size()), (hvd.Sum, expected)):
        result = hvd.compressed_allreduce(tensor, compression=hvd.Compression.none, op=op)
        assert result.dtype == dtype
        torch.testing.assert_close(result, torch.full((6, 4), value, dtype=dtype))
    assert hvd.compressed_allreduce(torch.empty(0, 3)).shape == (0, 3)
    assert float(hvd.compressed_allreduce(torch.tensor(3.0), name="scalar")) == pytest.approx(3.0, rel=0.2)


@several_ranks
def test_calls_are_counted_in_each_process_set_by_itself():
    alone = hvd.add_process_set([0])
    pair = hvd.add_process_set([0, 1]) if hvd.size() > 2 else None
    try:
        for subset in filter(None, (alone, pair)):
            if subset.included():
                assert hvd.compressed_allreduce(torch.ones(6), process_set=subset).shape == (6,)
        assert len(set(everybody(float(hvd.compressed_allreduce(torch.ones(6)).sum())))) == 1
    finally:
        for subset in filter(None, (alone, pair)):
            hvd.remove_process_set(subset)


def test_noise_differs_between_calls_and_repeats_with_the_seed():
    if hvd.size() == 1:
        return
    tensor = torch.randn(3000, generator=torch.Generator().manual_seed(hvd.rank()))
    coarse = hvd.Compression.maxscale(bits=2)
    results = [hvd.compressed_allreduce(tensor, coarse, name=name) for name in ("x", "x", "y")]
    assert not torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@several_ranks
def test_allreduce_of_nan():
    tensor = torch.ones(5)
    if hvd.rank() == 1:
        tensor[2] = torch.nan
    assert_raises_everywhere(NonFiniteError, lambda: hvd.compressed_allreduce(tensor))
    assert hvd.compressed_allreduce(tensor, nonfinite="propagate").isnan().all()


def test_allreduce_of_what_it_does_not_take():
    for wrong in (torch.ones(3, dtype=torch.int64), torch.ones(3).to_sparse(), torch.ones(3, dtype=torch.complex64)):
        with pytest.raises(ArgumentError, match="it must be a dense tensor"):
            hvd.compressed_allreduce(wrong)
    with pytest.raises(ArgumentError, match="op is"):
        hvd.compressed_allreduce(torch.ones(3), op=hvd.Max)
    with pytest.raises(ArgumentError, match=r"tensor is a ndarray; it must be a torch\.Tensor"):
        hvd.compressed_allreduce(np.ones(3, np.float32))
    with pytest.raises(ArgumentError, match=r"process_set is \[0\]; it must be an hvd.ProcessSet"):
        hvd.compressed_allreduce(torch.ones(3), process_set=[0])


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=str)
def test_compressors(compression):
    assert isinstance(compression, horovod.compression.Compressor)
    again = compression.from_config(json.loads(json.dumps(compression.config())))
    assert again == compression
    assert hash(again) == hash(compression)
    assert eval(repr(compression), {"Compression": hvd.Compression}) == compression
    assert compression != hvd.Compression.maxscale(bits=5)
    tensor = torch.tensor([1.0, 2.0, -3.0])
    if compression.codec.commutes_with_sum:
        coded, context = compression.compress(tensor)
        assert torch.equal(compression.decompress(coded, context), tensor)
        reduced = horovod.allreduce(tensor, compression=compression, name="stock")
        torch.testing.assert_close(reduced, tensor)
    else:
        with pytest.raises(ArgumentError, match=r"pqasgd_horovod\.torch\.DistributedOptimizer"):
            compression.compress(tensor)


def test_best_quantizer():
    assert hvd.Compression.quantize(bits=4).codec == codecs.quantize(4)


@several_ranks
def test_a_carrier_waits_no_longer_than_it_is_told_and_can_wait_again():
    carrier = hvd.HorovodCarrier()
    if hvd.rank() == 0:
        handle = carrier.allgather("test.late", np.full(3, 7, np.uint8))
        assert not handle.done()
        with pytest.raises(CollectiveTimeoutError, match=r"test\.late"):
            handle.wait(0.2)
    hvd.barrier()
    if hvd.rank() != 0:
        handle = carrier.allgather("test.late", np.full(3 + hvd.rank(), hvd.rank(), np.uint8))
    expected = [7] * 3 + [rank for rank in range(1, hvd.size()) for _ in range(3 + rank)]
    assert handle.wait(20).tolist() == expected
    assert handle.done()


def test_a_carrier_sends_pieces():
    carrier = hvd.HorovodCarrier()
    splits = [rank % 3 for rank in range(hvd.size())]
    payload = np.repeat(np.arange(hvd.size(), dtype=np.uint8), splits)
    payload.flags.writeable = False
    received = carrier.alltoall("test.pieces", payload, splits).wait(20)
    assert received.tolist() == [hvd.rank()] * (splits[hvd.rank()] * hvd.size())


def test_inference_mode_and_the_default_device_do_not_matter():
    """What is sent and received is in host memory, and Horovod resizes it on a thread that is not in inference mode."""
    model = make_model(norm=False)
    options = {"compression": hvd.Compression.eden(bits=4), "period": 3, "exchange": "two_phase"}
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **options)
    inputs, weight = torch.full((2, 30), 1.0 + hvd.rank()), model.fc2.weight
    torch.set_default_device("meta")
    try:
        for _ in range(4):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
        with torch.inference_mode():
            optimizer.flush()
            mean = hvd.compressed_allreduce(weight, compression=hvd.Compression.eden(bits=8), exchange="two_phase")
    finally:
        torch.set_default_device("cpu")
    assert len({values.numpy().tobytes() for values in everybody(weight.detach())}) == 1
    error = (mean - weight.detach()).norm() / weight.detach().norm()
    assert error < 0.02  # two codings of 8 bits: sqrt(2 * 4.1e-5) is 0.009
