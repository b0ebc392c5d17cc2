"""The recipes with Keras and TensorFlow: they are what ``DistributedOptimizer`` takes, and train."""

from __future__ import annotations

import keras
import pytest

import pqasgd_horovod.tensorflow as hvd
import pqasgd_horovod.tensorflow.keras as hvd_keras
from tests.ranks_tensorflow.common import apply, assert_replicas_equal, make_variables, wrap

STEPS = 12
RECIPES = {
    "max_fidelity": hvd.recipes.max_fidelity(),
    "balanced": hvd_keras.recipes.balanced(STEPS),
    "max_saving": hvd.recipes.max_saving(),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains(recipe):
    optimizer = wrap(keras.optimizers.SGD(0.1), **RECIPES[recipe])
    variables = make_variables()
    apply(optimizer, variables, range(STEPS))
    optimizer.flush()
    assert_replicas_equal(variables)
    stats = optimizer.communication_stats()
    assert (stats["steps"], stats["rounds"]) == (STEPS, {"max_fidelity": 12, "balanced": 4, "max_saving": 1}[recipe])
    if hvd.size() > 1:
        assert stats["compression_ratio"] > 2  # the variables are few, and half of them travel uncompressed
