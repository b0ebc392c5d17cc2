"""These tests run on as many ranks as a launcher starts (``make test-2``, ``make test-4``), or on one without."""

import os

import pytest

os.environ.setdefault("HOROVOD_DYNAMIC_PROCESS_SETS", "1")

import torch

import pqasgd_horovod.torch as hvd

hvd.init()
torch.set_num_threads(1)
# The first optimizer imports much of torch, which takes seconds: do it before anything is timed.
torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0).step()


@pytest.fixture(autouse=True)
def same_start():
    """Begin each test together, with the same random numbers on every rank."""
    torch.manual_seed(0)
    hvd.barrier()
