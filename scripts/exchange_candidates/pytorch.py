"""Stock Horovod and ours in PyTorch, and raw MPI."""

from __future__ import annotations

from typing import Any

import horovod.torch as horovod
import numpy as np
import torch
from mpi4py import MPI

import pqasgd_horovod.torch as hvd
from exchange_candidates import BITS, Candidate, bytes_per_round, nothing, ring_bytes, scaled_shapes
from pqasgd_horovod import codecs


def candidates(scale: float) -> list[Candidate]:
    """Make everything that is compared, on tensors of ResNet-50's shapes; ``scale`` < 1 shortens them."""
    torch.set_num_threads(1)  # each rank has a host of its own in this play, but they share the cores of one
    horovod.init()
    generator = torch.Generator().manual_seed(0)  # the same model on every rank
    tensors = [torch.randn(shape, generator=generator) for shape in scaled_shapes(scale)]
    total = sum(tensor.numel() for tensor in tensors)
    size = horovod.size()
    world = MPI.COMM_WORLD

    def stock(name: str, compression: Any, itemsize: int) -> Candidate:
        # As Horovod's optimizer does it: everything asynchronous, by name, then synchronized.
        def run() -> None:
            handles = []
            for index, tensor in enumerate(tensors):
                compressed, context = compression.compress(tensor)
                handles.append((horovod.allreduce_async_(compressed, name=f"{name}.{index}"), context))
            for handle, context in handles:
                compression.decompress(horovod.synchronize(handle), context)

        return Candidate(name, run, nothing, lambda: ring_bytes(total, itemsize, size))

    def ours(bits: int) -> Candidate:
        # Every second step averages. Without gradients SGD changes nothing, so that step is the average alone.
        parameters = [torch.nn.Parameter(tensor.clone()) for tensor in tensors]
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(parameters, lr=0.1),
            named_parameters=[(f"bits{bits}.{index}", parameter) for index, parameter in enumerate(parameters)],
            compression=hvd.Compression.quantize(bits=bits),
            averaging=hvd.PeriodicAveraging(period=2, buffers="local"),
        )

        def prepare() -> None:
            optimizer.step()
            with torch.no_grad():  # as if the ranks had made different local steps
                torch._foreach_mul_([*parameters], 1.01 + 0.01 * horovod.rank())

        return Candidate(
            f"ours {bits} bits", optimizer.step, prepare, lambda: bytes_per_round(optimizer.communication_stats())
        )

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
        stock("stock fp32", horovod.Compression.none, 4),
        stock("stock fp16", horovod.Compression.fp16, 2),
        *(ours(bits) for bits in BITS),
        *(raw(bits) for bits in BITS if bits < 8),
    ]
