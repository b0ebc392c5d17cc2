"""Momentum correction in TensorFlow: the core's bits, in graphs, through the warm-up, saved and resumed."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import pqasgd_horovod.tensorflow as hvd
import pqasgd_horovod.tensorflow.keras as hvd_keras
from pqasgd_horovod.averaging import ExchangeConfig, GradientAverager
from pqasgd_horovod.averaging.vector import ArrayView
from pqasgd_horovod.errors import ArgumentError

from .common import assert_equal, assert_replicas_equal, compiled, everybody, fit, several_ranks, values, weights

TOPK = hvd.Compression.topk(0.05, block_size=1024)
SIZES = {"a": 4000, "b": 6, "c": 3000}


def numbers(step):
    generator = np.random.default_rng([step, hvd.rank()])
    return [generator.standard_normal(size).astype(np.float32) for size in SIZES.values()]


def optimizer(inner=None, **options):
    options = {"compression": TOPK, "feedback": hvd.MomentumCorrection(0.9, warmup_steps=4), **options}
    return hvd_keras.DistributedOptimizer(inner or keras.optimizers.SGD(0.1), **options)


@several_ranks
@pytest.mark.parametrize(("nesterov", "clip_norm"), [(False, None), (True, 30.0)])
def test_it_has_the_bits_of_the_core(nesterov, clip_norm):
    """Of the means of each step, in small buckets, from the warm-up on; a rank's NaN leaves what its bucket kept."""
    feedback = hvd.MomentumCorrection(0.9, nesterov=nesterov, clip_norm=clip_norm, warmup_steps=4)
    options = {"feedback": feedback, "bucket_cap_mb": 0.008, "nonfinite": "propagate"}
    averager = GradientAverager(hvd.HorovodCarrier(), ExchangeConfig(TOPK.codec, **options), name=f"core.{nesterov}")
    views = [ArrayView(name, np.zeros(size, np.float32)) for name, size in SIZES.items()]
    averager.prepare(views)
    sources = [tf.Variable(tf.zeros([size]), name=f"{name}{nesterov}") for name, size in SIZES.items()]

    @tf.function
    def step(gradients):
        with hvd.DistributedGradientTape(tf.GradientTape(), compression=TOPK, **options) as tape:
            loss = tf.add_n([tf.reduce_sum(x * g) for x, g in zip(sources, gradients, strict=True)])
        return tape.gradient(loss, sources)

    for count in range(6):
        given = numbers(count)
        if count == 3 and hvd.rank() == 0:
            given[0][0] = np.nan
        for view, array in zip(views, given, strict=True):
            view.array[:] = array
        averager.finish()
        assert_equal(values(step([tf.constant(array) for array in given])), [view.array for view in views])
        assert np.isnan(views[0].array[0]) == (count == 3)
    assert len(averager._channels._channels[0].exchange.buckets) > 1


@several_ranks
def test_it_resumes_bit_exactly_in_the_middle_of_the_warm_up(tmp_path):
    path = tmp_path / f"{hvd.rank()}.keras"
    model = compiled(optimizer())
    fit(model, 2)
    model.save(path)
    fit(model, 4, first=2)
    resumed = keras.models.load_model(path)
    fit(resumed, 4, first=2)
    assert_replicas_equal(resumed)
    assert_equal(weights(resumed), weights(model))
    velocities = values(model.optimizer._pqasgd_state.residuals.velocities)
    assert len(set(everybody(velocities[0].tobytes()))) == hvd.size()


def test_where_everything_is_sent_it_is_momentum_sgd():
    """On one rank whatever the density."""
    feedback = hvd.MomentumCorrection(0.9, masking=False, clip_norm=1e9)
    model = compiled(optimizer(compression=hvd.Compression.topk(1.0), feedback=feedback))
    stock = compiled(hvd_keras.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9)))
    for each in (model, stock):
        fit(each, 5)
    for mine, its in zip(weights(model), weights(stock), strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: optimizer(keras.optimizers.SGD(0.1, momentum=0.9)), "optimizer has momentum=0.9 with feedback"),
        (lambda: optimizer(keras.optimizers.Adam()), "optimizer has beta_1=0.9 with feedback"),
        (lambda: optimizer(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())), "is a LossScaleOptimizer"),
        (lambda: optimizer(period=2), "it is for gradients, period=1"),
    ],
)
def test_what_it_is_not_fit_for(make, text):
    with pytest.raises(ArgumentError, match=text):
        make()
