"""These tests run on two nodes of two ranks each, two names of this machine: tests/test_ranks.py starts them."""

import pytest
import torch

import pqasgd_horovod.torch as hvd

hvd.init(process_sets="dynamic")
torch.set_num_threads(1)
# The first optimizer imports much of torch, which takes seconds: do it before anything is timed.
torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0).step()


@pytest.fixture(autouse=True)
def same_start():
    """Begin each test together, with the same random numbers on every rank."""
    torch.manual_seed(0)
    hvd.barrier()
