"""What an optimizer holds for each parameter: the table of docs/choosing.md."""

from __future__ import annotations

import tracemalloc

import pytest
import torch

import pqasgd_horovod.torch as hvd
from pqasgd_horovod.averaging import channel
from tests.ranks.common import several_ranks

NUM_PARAMETERS = 1_000_000
MESSAGES = 0.1 + (1 + hvd.size()) * 2.1 / 8
"""Bytes for each parameter that 2 bits take, sent and received, and the rest of the process."""


@several_ranks
@pytest.mark.parametrize(
    ("options", "held", "while_it_steps"),
    [
        ({"period": 1}, 4, 4),
        ({"period": 2}, 8, 8),
        ({"averaging": hvd.PeriodicAveraging(period=2, outer=hvd.SlowMo())}, 12, 12),
        ({"averaging": hvd.PeriodicAveraging(period=2, outer=hvd.Nesterov())}, 12, 12),
        ({"averaging": hvd.PeriodicAveraging(period=2, delay=1)}, 12, 12),
        ({"averaging": hvd.PeriodicAveraging(period=2, outer=lambda p: torch.optim.SGD(p, lr=1.0))}, 8, 12),
        ({"period": 1, "feedback": hvd.Feedback()}, 12, 12),
        ({"period": 2, "feedback": hvd.Feedback()}, 16, 16),
        ({"period": 1, "feedback": hvd.MomentumCorrection(momentum=0.9)}, 24, 24),
    ],
    ids=str,
)
def test_bytes_for_each_parameter(options, held, while_it_steps, monkeypatch):
    monkeypatch.setattr(channel, "_ZEROS", 1000)  # a constant, which is as large as this model
    weight = torch.nn.Parameter(torch.ones(NUM_PARAMETERS))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([weight], lr=0.1), [("weight", weight)], hvd.Compression.eden(bits=2), **options
    )

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            weight.sum().backward()
            optimizer.step()

    tracemalloc.start()  # NumPy's arrays; PyTorch's tensors are none of ours
    try:
        train(2)
        tracemalloc.reset_peak()
        train(4)
        now, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held <= now / NUM_PARAMETERS < held + MESSAGES
    assert while_it_steps <= most / NUM_PARAMETERS < while_it_steps + MESSAGES
