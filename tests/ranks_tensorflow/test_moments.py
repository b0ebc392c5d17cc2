"""Momentum and second moments at an average, in a graph."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import pqasgd_horovod.tensorflow as hvd
from pqasgd_horovod.errors import ArgumentError
from pqasgd_horovod.tensorflow.optimizer import _moments_of
from tests.ranks_tensorflow.common import (
    EDEN2,
    assert_equal,
    assert_replicas_equal,
    compiled,
    gradients_of,
    make_model,
    make_variables,
    several_ranks,
    train,
    values,
    weights,
    wrap,
)


def nadam():
    return keras.optimizers.Nadam(0.01)


def momentum():
    return keras.optimizers.SGD(0.5, momentum=0.9)


def adagrad():
    return keras.optimizers.Adagrad(0.1, initial_accumulator_value=0.25)


@several_ranks
@pytest.mark.parametrize(("make", "policy"), [(nadam, "average"), (momentum, "reset"), (adagrad, "reset")])
def test_moments_after_an_average(make, policy):
    averaging = hvd.PeriodicAveraging(period=2, buffers="local", moments=policy)
    variables = make_variables()
    optimizer = wrap(make(), averaging=averaging, compression=EDEN2)
    optimizer.build(variables)
    begun = values(_moments_of(optimizer))

    @tf.function
    def step(gradients):
        optimizer.apply_gradients(zip(gradients, variables, strict=True))

    for number in range(2):
        step([tf.constant(gradient) for gradient in gradients_of(number)])
    if policy == "reset":
        assert_equal(values(_moments_of(optimizer)), begun)
    else:
        means = [np.zeros_like(moment) for moment in begun]
        for rank in range(hvd.size()):
            alone, plain = make_variables(), make()
            for number in range(2):
                plain.apply_gradients(zip(map(tf.constant, gradients_of(number, rank)), alone, strict=True))
            for mean, moment in zip(means, values(_moments_of(plain)), strict=True):
                mean += moment * np.float32(1 / hvd.size())
        for mean, moment in zip(means, values(_moments_of(optimizer)), strict=True):
            np.testing.assert_allclose(moment, mean, rtol=1e-6, atol=1e-7)
        assert_replicas_equal(_moments_of(optimizer))
        size = 4 * sum(moment.size for moment in begun)
        local = wrap(make(), period=2, compression=EDEN2)
        local.build(make_variables())
        sent, of_parameters = (
            sum(channel.bytes_per_round()[0] for channel in o._pqasgd_averager.value._channels)
            for o in (optimizer, local)
        )
        assert sent - of_parameters == pytest.approx(2 * (hvd.size() - 1) / hvd.size() * size, rel=0.01)
    step([tf.constant(gradient) for gradient in gradients_of(2)])
    optimizer.flush()
    assert_replicas_equal(variables)


def test_a_model_file_resumes_bit_exactly(tmp_path):
    averaging = hvd.PeriodicAveraging(period=2, moments="average")
    inner = keras.optimizers.Adam(0.01, use_ema=True)
    straight = compiled(wrap(inner, averaging=averaging, compression=EDEN2), make_model(norm=True))
    train(straight, range(3))
    straight.save(tmp_path / "model.keras")
    train(straight, range(3, 6))
    resumed = keras.models.load_model(tmp_path / "model.keras")
    train(resumed, range(3, 6))
    assert_equal(weights(resumed), weights(straight))
    assert_equal(values(_moments_of(resumed.optimizer)), values(_moments_of(straight.optimizer)))


def test_what_is_refused():
    reset = hvd.PeriodicAveraging(period=2, moments="reset")
    with pytest.raises(ArgumentError, match="moments is 'reset' and the optimizer is Adam, which goes by its iter"):
        wrap(keras.optimizers.Adam(), averaging=reset)
    with pytest.raises(ArgumentError, match="buffers is 'max_count', and Keras' BatchNormalization does not count"):
        wrap(averaging=hvd.PeriodicAveraging(period=2, buffers="max_count"))
    optimizer = wrap(keras.optimizers.Lion(), averaging=reset)
    with pytest.raises(ArgumentError, match="moments is 'reset': Keras does not tell"):
        optimizer.register_local_var(tf.Variable(1.0))
