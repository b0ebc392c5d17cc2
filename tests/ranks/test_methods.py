"""Every method in docs/methods.md, by the call that stands there, learns handwritten digits."""

from __future__ import annotations

import pytest
from training.torch.methods import TABLE, read_methods, train

import pqasgd_horovod.torch as hvd

from .common import assert_replicas_equal, several_ranks

METHODS = read_methods()
NUM_STEPS = 200
TEST_LOSS = 0.5  # 2.3 at the start, 0.15 with full communication; few and long periods are the slowest


def test_the_table_was_read():
    rows = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ") and "`" in line]
    assert len(METHODS) == len(rows) - 1 > 15  # without the header


@several_ranks
@pytest.mark.parametrize("method", METHODS, ids=[method.name for method in METHODS])
def test_it_learns(method):
    trained = train(hvd, method, width=64, num_steps=NUM_STEPS)
    assert_replicas_equal(trained.model)
    print(f"{method.name}: {trained.loss:.3f}, ratio {trained.stats['compression_ratio']:.1f}")
    assert trained.loss < TEST_LOSS
