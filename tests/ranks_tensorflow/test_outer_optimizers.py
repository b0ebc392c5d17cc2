"""Keras optimizers as the outer one."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import pqasgd_horovod.tensorflow as hvd
from pqasgd_horovod.errors import ArgumentError
from tests.ranks_tensorflow.common import (
    EDEN2,
    assert_equal,
    assert_raises_everywhere,
    assert_replicas_equal,
    compiled,
    gradients_of,
    make_model,
    make_variables,
    several_ranks,
    train,
    two_ranks,
    values,
    weights,
    wrap,
)

RATE = 0.5


@several_ranks  # a rank alone steps without an outer optimizer
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_it_steps_the_anchor_on_the_negative_mean(dtype):
    outer = keras.optimizers.Adafactor(0.01) if dtype == np.float64 else keras.optimizers.Adam(0.01)  # looks at shapes
    averaging = hvd.PeriodicAveraging(period=2, buffers="local", outer=outer)
    variables = make_variables(dtype)
    optimizer = wrap(keras.optimizers.SGD(RATE), averaging=averaging, compression=hvd.Compression.none)

    @tf.function
    def step(gradients):
        optimizer.apply_gradients(zip(gradients, variables, strict=True))

    for number in range(6):
        step([tf.constant(gradient) for gradient in gradients_of(number, dtype=dtype)])
    anchors, by_hand = make_variables(dtype), type(outer).from_config(outer.get_config())
    for number in range(0, 6, 2):
        both = [gradients_of(n, rank, dtype) for n in (number, number + 1) for rank in range(hvd.size())]
        means = [RATE * np.sum(parts, axis=0, dtype=np.float64) / hvd.size() for parts in zip(*both, strict=True)]
        gradients = [tf.constant(mean.astype(np.float32).astype(dtype)) for mean in means]
        by_hand.apply(gradients, anchors)
    for variable, anchor in zip(values(variables), values(anchors), strict=True):
        np.testing.assert_allclose(variable, anchor, rtol=0, atol=2e-6)
    assert_replicas_equal(variables)


def test_a_model_file_resumes_bit_exactly(tmp_path):
    averaging = hvd.PeriodicAveraging(period=2, outer=keras.optimizers.Adam(0.01))
    straight = compiled(wrap(keras.optimizers.SGD(0.1), averaging=averaging, compression=EDEN2), make_model(norm=True))
    train(straight, range(3))
    straight.save(tmp_path / "model.keras")
    train(straight, range(3, 6))
    resumed = keras.models.load_model(tmp_path / "model.keras")
    assert len(resumed.optimizer._pqasgd_state.outer) == (2 + 2 * 8 if hvd.size() > 1 else 0)
    train(resumed, range(3, 6))
    assert_equal(weights(resumed), weights(straight))
    assert_equal(values(resumed.optimizer._pqasgd_state.outer), values(straight.optimizer._pqasgd_state.outer))


@keras.saving.register_keras_serializable("tests")
class OfAnotherMachine(keras.optimizers.SGD):
    """Rounds in another way on each rank."""

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient * (1 + 2.0**-10 * hvd.rank()), variable, learning_rate)


@two_ranks
def test_other_arithmetic_on_a_rank_is_found():
    averaging = hvd.PeriodicAveraging(period=1, buffers="local", outer=OfAnotherMachine(0.5))
    optimizer = wrap(averaging=averaging, compression=EDEN2)
    variables = make_variables()
    gradients = list(map(tf.constant, gradients_of(0)))
    text = assert_raises_everywhere("MismatchError", lambda: optimizer.apply(gradients, variables))
    assert "replicas differ after an average" in text


def test_what_is_no_outer_optimizer():
    for outer, text in (
        (lambda: keras.optimizers.Adam(), "it must be a plain Keras optimizer"),
        (keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)), "it must be a plain Keras optimizer"),
    ):
        with pytest.raises(ArgumentError, match=text):
            wrap(averaging=hvd.PeriodicAveraging(period=2, outer=outer))
