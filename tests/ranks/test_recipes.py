"""The recipes in PyTorch: they are what ``DistributedOptimizer`` takes, and train."""

from __future__ import annotations

import pytest

import pqasgd_horovod.torch as hvd

from .common import assert_replicas_equal, loss_of, make_model, train, wrap


@pytest.mark.parametrize("recipe", ["balanced", "max_saving", "max_fidelity"])
def test_a_recipe_trains(recipe):
    model = make_model()
    optimizer = wrap(model, **getattr(hvd.recipes, recipe)(total_steps=40))
    before = loss_of(model, 0).item()
    train(model, optimizer, range(40))
    optimizer.flush()
    assert loss_of(model, 0).item() < before
    if recipe != "max_fidelity":  # which averages gradients: BatchNorm's statistics stay each rank's own
        assert_replicas_equal(model)
    stats = optimizer.communication_stats()
    assert stats["steps"] == 40
    if hvd.size() > 1:
        assert stats["compression_ratio"] > 2  # the model is small, and much of it travels uncompressed
