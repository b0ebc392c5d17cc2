"""A policy in TensorFlow: optimizers in both periods and tapes, from paths, sizes or functions."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import pqasgd_horovod.tensorflow as hvd
import pqasgd_horovod.tensorflow.keras as hvd_keras

from .common import assert_raises_everywhere, assert_replicas_equal, compiled, fit, several_ranks, weights

EDEN2 = hvd.Compression.eden(2)
POLICY = [("*bias", hvd.Compression.none), (hvd.larger_than(2000), hvd.Compression.topk(0.05)), (..., EDEN2)]


def optimizer(**options):
    return hvd_keras.DistributedOptimizer(keras.optimizers.SGD(0.1), **{"policy": POLICY, **options})


@several_ranks
@pytest.mark.parametrize("period", [1, 2])
def test_each_codec_has_its_channel(period):
    model = compiled(optimizer(period=period, exchange="allgather", feedback=hvd.Feedback()))
    fit(model, 4)
    assert_replicas_equal(model)
    coded = [(EDEN2.codec, 30 * 60 + 40 * 5), (POLICY[1][1].codec, 60 * 40), (hvd.Compression.none.codec, 105)]
    averager = model.optimizer._pqasgd_averager.value
    plans = [channel.plan for channel in (averager._channels if period > 1 else averager._stages[0])]
    assert {plan.codec: plan.layout.num_elements for plan in plans} == dict(coded)
    expected = (hvd.size() - 1) * sum(64 + codec.payload_nbytes(numel) for codec, numel in coded)
    stats = model.optimizer.communication_stats()
    assert 0.9 * expected < stats["bytes_sent"] / stats["rounds"] <= expected


@several_ranks
def test_a_tape_takes_one():
    variables = [tf.Variable(tf.zeros([2000]), name="large"), tf.Variable(tf.zeros([5]), name="small")]
    policy = [("large*", hvd.Compression.eden(8))]

    @tf.function
    def step():
        # What decides is made anew in each step, as a tape is.
        rules = [*policy, (lambda name, shape: shape == (5,), hvd.Compression.bf16)]
        with hvd.DistributedGradientTape(tf.GradientTape(), policy=rules) as tape:
            loss = tf.add_n([tf.reduce_sum(v * (hvd.rank() + 1.0)) for v in variables])
        return tape.gradient(loss, variables)

    for _ in range(2):
        large, small = step()
    mean = (hvd.size() + 1) / 2
    np.testing.assert_allclose(large, np.full(2000, mean), rtol=0.05)
    np.testing.assert_array_equal(small, np.full(5, mean))


@several_ranks
def test_a_pattern_that_matches_nothing():
    model = compiled(optimizer(policy=[("*/bais", EDEN2)]))
    text = assert_raises_everywhere("ArgumentError", lambda: fit(model, 1))
    assert "policy: '*/bais' matches none of the parameters, which are " in text
    x = tf.Variable([1.0], name="x")
    with hvd.DistributedGradientTape(tf.GradientTape(), policy=[("y*", EDEN2)]) as tape:
        y = x * x
    text = assert_raises_everywhere("ArgumentError", lambda: tape.gradient(y, [x]))
    assert "'y*' matches none of the parameters, which are 'x:0'" in text


def test_it_is_in_the_model_file(tmp_path):
    model = compiled(optimizer(period=2))
    fit(model, 2)
    model.save(tmp_path / f"{hvd.rank()}.keras")
    loaded = keras.models.load_model(tmp_path / f"{hvd.rank()}.keras")
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    fit(loaded, 2, first=2)
    fit(model, 2, first=2)
    for mine, its in zip(weights(model), weights(loaded), strict=True):
        assert mine.tobytes() == its.tobytes()


@keras.saving.register_keras_serializable("pqasgd_test")
def wide(name, shape):
    return len(shape) == 2 and shape[1] > 50


def test_functions_are_saved_as_keras_does():
    config = optimizer(policy=[(wide, EDEN2), (hvd.smaller_than(7), hvd.Compression.fp16)]).get_config()
    again = hvd_keras.DistributedOptimizer(keras.optimizers.SGD(0.1)).from_config(config)
    rules = again._pqasgd_settings.value["policy"]
    assert [rule.pattern for rule in rules] == [wide, hvd.smaller_than(7)]
    assert [rule.codec for rule in rules] == [EDEN2.codec, hvd.Compression.fp16.codec]
