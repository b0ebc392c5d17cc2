"""Stock Horovod and ours in PyTorch, and raw MPI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import horovod.torch as horovod
import numpy as np
import torch
from mpi4py import MPI

import pqasgd_horovod.torch as hvd
from exchange_candidates import BITS, Candidate, bytes_per_round, nothing, ring_bytes, scaled_shapes
from pqasgd_horovod import codecs


def start() -> None:
    """Start Horovod, on one thread: each rank has a host of its own in this play, but they share the cores of one."""
    torch.set_num_threads(1)
    horovod.init()


def stock(name: str, tensors: Sequence[torch.Tensor], compression: Any, itemsize: int) -> Candidate:
    """Return stock Horovod's average, as its optimizer makes it: all asynchronous, by name, then synchronized."""

    def run() -> None:
        handles = []
        for index, tensor in enumerate(tensors):
            compressed, context = compression.compress(tensor)
            handles.append((horovod.allreduce_async_(compressed, name=f"{name}.{index}"), context))
        for handle, context in handles:
            compression.decompress(horovod.synchronize(handle), context)

    total = sum(tensor.numel() for tensor in tensors)
    return Candidate(name, run, nothing, lambda: ring_bytes(total, itemsize, horovod.size()))


def ours(name: str, tensors: Sequence[torch.Tensor], **options: Any) -> Candidate:
    """Return an average by our optimizer, which takes ``options``.

    Every second step averages. Without gradients SGD changes nothing, so that step is the average alone.
    """
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in tensors]
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=0.1),
        named_parameters=[(f"{name}.{index}", parameter) for index, parameter in enumerate(parameters)],
        averaging=hvd.PeriodicAveraging(period=2, buffers="local"),
        **options,
    )

    def prepare() -> None:
        optimizer.step()
        with torch.no_grad():  # as if the ranks had made different local steps
            torch._foreach_mul_([*parameters], 1.01 + 0.01 * horovod.rank())

    return Candidate(name, optimizer.step, prepare, lambda: bytes_per_round(optimizer.communication_stats()))


def candidates(scale: float) -> list[Candidate]:
    """Make everything that is compared, on tensors of ResNet-50's shapes; ``scale`` < 1 shortens them."""
    start()
    generator = torch.Generator().manual_seed(0)  # the same model on every rank
    tensors = [torch.randn(shape, generator=generator) for shape in scaled_shapes(scale)]
    total = sum(tensor.numel() for tensor in tensors)
    size = horovod.size()
    world = MPI.COMM_WORLD

    def raw(bits: int) -> Candidate:
        sent = np.zeros(codecs.quantize(bits).payload_nbytes(total), np.uint8)
        received = np.zeros(size * sent.size, np.uint8)
        return Candidate(
            f"raw MPI, bytes of {bits} bits",
            lambda: world.Allgather(sent, received),
            nothing,
            lambda: (size - 1) * sent.size,
        )

    return [
        stock("stock fp32", tensors, horovod.Compression.none, 4),
        stock("stock fp16", tensors, horovod.Compression.fp16, 2),
        *(ours(f"ours {bits} bits", tensors, compression=hvd.Compression.quantize(bits=bits)) for bits in BITS),
        *(raw(bits) for bits in BITS if bits < 8),
    ]
