"""Training steps in PyTorch, eight of them with one average or none: what of the exchange a delay hides."""

from __future__ import annotations

import time
from collections.abc import Callable

import horovod.torch as horovod
import torch
from mpi4py import MPI

import pqasgd_horovod.torch as hvd
from exchange_candidates import Candidate, bytes_per_round, nothing, scaled_shapes

BITS = 4
PERIOD = 8
BOUNDARY = 2  # of the steps that are timed, after which the average begins: it is applied within them
DELAYS = (0, 2, 4)
STEP_SECONDS = 0.05  # three steps are about the exchange of ResNet-50 at 4 bits on 1 Gbit/s


def _on_this_core(seconds: float) -> Callable[[], None]:
    """Return work for about ``seconds``, the same on every rank: products of matrices, as in a network."""
    matrix = torch.randn(256, 256)

    def multiply(times: int) -> None:
        for _ in range(times):
            torch.mm(matrix, matrix)

    multiply(20)
    begin = time.perf_counter()
    multiply(100)
    times = round(100 * seconds / (time.perf_counter() - begin))
    times = MPI.COMM_WORLD.allreduce(max(1, times), MPI.MAX)
    return lambda: multiply(times)


def _elsewhere(seconds: float) -> Callable[[], None]:
    """Return a wait of ``seconds``: as if an accelerator, or other cores, did the work."""
    return lambda: time.sleep(seconds)


def candidates(scale: float) -> list[Candidate]:
    """Make everything that is compared, on tensors of ResNet-50's shapes; ``scale`` < 1 makes all of it less."""
    torch.set_num_threads(1)  # each rank has a host of its own in this play, but they share the cores of one
    horovod.init()
    generator = torch.Generator().manual_seed(0)  # the same model on every rank
    tensors = [torch.randn(shape, generator=generator) for shape in scaled_shapes(scale)]

    def train(compute: Callable[[], None], step: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(PERIOD):
                compute()
                step()

        return run

    def ours(delay: int, where: str, compute: Callable[[], None]) -> Candidate:
        # Without gradients SGD changes nothing: what a step takes is the computation, and what averages cost.
        parameters = [torch.nn.Parameter(tensor.clone()) for tensor in tensors]
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(parameters, lr=0.1),
            named_parameters=[(f"{where}{delay}.{index}", parameter) for index, parameter in enumerate(parameters)],
            compression=hvd.Compression.quantize(bits=BITS),
            averaging=hvd.PeriodicAveraging(period=PERIOD, delay=delay, buffers="local"),
        )
        for _ in range(PERIOD - BOUNDARY):
            optimizer.step()

        def prepare() -> None:
            with torch.no_grad():  # as if the ranks had made different local steps
                torch._foreach_mul_([*parameters], 1.01 + 0.01 * horovod.rank())

        return Candidate(
            f"{PERIOD} steps {where}, delay {delay}",
            train(compute, optimizer.step),
            prepare,
            lambda: bytes_per_round(optimizer.communication_stats()),
        )

    found: list[Candidate] = []
    for where, make in (("on this core", _on_this_core), ("elsewhere", _elsewhere)):
        compute = make(STEP_SECONDS * scale)
        found.append(Candidate(f"{PERIOD} steps {where}, alone", train(compute, nothing), nothing, lambda: 0))
        found += [ours(delay, where, compute) for delay in DELAYS]
    return found
