"""The recipes with Keras and TensorFlow: they are what ``DistributedOptimizer`` takes, train, and are saved."""

from __future__ import annotations

import keras
import pytest

import pqasgd_horovod.tensorflow as hvd
import pqasgd_horovod.tensorflow.keras as hvd_keras
from tests.ranks_tensorflow.common import (
    apply,
    assert_equal,
    assert_replicas_equal,
    compiled,
    fit,
    make_variables,
    weights,
    wrap,
)


@pytest.mark.parametrize("recipe", ["balanced", "max_saving", "max_fidelity"])
def test_a_recipe_trains(recipe):
    optimizer = wrap(keras.optimizers.SGD(0.1), **getattr(hvd.recipes, recipe)(total_steps=12))
    variables = make_variables()
    apply(optimizer, variables, range(12))
    optimizer.flush()
    assert_replicas_equal(variables)
    stats = optimizer.communication_stats()
    assert stats["steps"] == 12
    if hvd.size() > 1:
        assert stats["compression_ratio"] > 2


def test_a_model_file_remembers_the_recipe(tmp_path):
    options = hvd_keras.recipes.balanced(total_steps=6)
    model = compiled(wrap(keras.optimizers.SGD(0.1), **options))
    fit(model, 6)
    model.save(tmp_path / f"{hvd.rank()}.keras")
    loaded = keras.models.load_model(tmp_path / f"{hvd.rank()}.keras")
    assert loaded.optimizer.get_config()["averaging"] == options["averaging"].config()
    assert loaded.optimizer.get_config()["compression"] == options["compression"].config()
    assert_equal(weights(loaded), weights(model))
