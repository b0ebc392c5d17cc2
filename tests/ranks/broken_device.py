"""A job in which one rank's GPU breaks in the middle: ``horovodrun -np 2 python -m tests.ranks.broken_device``.

The GPU is a CPU that runs the kernels thread by thread (tests/native/cuda_on_cpu).
"""

from __future__ import annotations

import torch

import pqasgd_horovod.torch as hvd
from pqasgd_horovod.native.cuda import Device, Library
from pqasgd_horovod.torch import devices
from tests.native.cuda_on_cpu import build


def main() -> None:
    hvd.init()
    kernels = Library(hvd.broadcast_object(build() if hvd.rank() == 0 else None, 0, name="kernels"))
    gpu = Device(0, library=kernels, host_messages="tested")
    devices.device_of = lambda tensor, anchor_device=None: gpu if hvd.rank() == 1 else None
    torch.manual_seed(1)
    model = torch.nn.Linear(60, 50)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), period=2
    )
    for step in range(100):
        if step == 5:
            print("training", flush=True)
            kernels._library.pq_cuda_on_cpu_break(1)
        optimizer.zero_grad()
        model(torch.ones(1, 60)).sum().backward()
        optimizer.step()
    print("not reached", flush=True)


if __name__ == "__main__":
    main()
