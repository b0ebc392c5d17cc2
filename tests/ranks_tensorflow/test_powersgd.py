"""PowerSGD in TensorFlow: the core's bits for gradients and changes of a period, saved, resumed and compared."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import pqasgd_horovod.tensorflow as hvd
from pqasgd_horovod.averaging import ExchangeConfig, GradientAverager, PeriodicAverager, PeriodicAveraging
from pqasgd_horovod.averaging.vector import ArrayView

from .common import (
    apply,
    assert_equal,
    assert_raises_everywhere,
    assert_replicas_equal,
    compiled,
    everybody,
    fit,
    several_ranks,
    start,
    values,
    weights,
    wrap,
)

POWERSGD = hvd.Compression.powersgd(approximation_rank=2)
OPTIONS = {"compression": POWERSGD, "feedback": hvd.Feedback()}
SHAPES = ((60, 40), (60,), (3, 3, 20, 30), (50, 30))


def numbers(step: int) -> list[np.ndarray]:
    """Gradients of this rank; at first one matrix is zero, so that no direction is found in it."""
    generator = np.random.default_rng([step, hvd.rank()])
    drawn = [generator.standard_normal(shape).astype(np.float32) for shape in SHAPES]
    drawn[3] *= step > 0
    return drawn


def views_of(arrays: list[np.ndarray]) -> list[ArrayView]:
    """Arrays as the core sees them, with the columns of TensorFlow's matrices."""
    return [ArrayView(f"v{i}", array.reshape(-1, array.shape[-1]).squeeze()) for i, array in enumerate(arrays)]


def assert_values_equal(variables, views):
    assert_equal([value.reshape(-1) for value in values(variables)], [view.array.reshape(-1) for view in views])


@several_ranks
@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
def test_gradients_have_the_bits_of_the_core(exchange):
    """In several buckets; a rank's NaN leaves what its bucket kept, a matrix of zeros is no trap."""
    options = {"feedback": hvd.Feedback(), "bucket_cap_mb": 0.02, "nonfinite": "propagate"}
    config = ExchangeConfig(POWERSGD.codec, method=exchange, **options)
    averager = GradientAverager(hvd.HorovodCarrier(), config, name=f"core.{exchange}")
    views = views_of([np.zeros(shape, np.float32) for shape in SHAPES])
    averager.prepare(views)
    sources = [tf.Variable(tf.zeros(shape), name=f"v{i}_{exchange}") for i, shape in enumerate(SHAPES)]

    @tf.function
    def step(gradients):
        with hvd.DistributedGradientTape(tf.GradientTape(), compression=POWERSGD, exchange=exchange, **options) as tape:
            loss = tf.add_n([tf.reduce_sum(x * g) for x, g in zip(sources, gradients, strict=True)])
        return tape.gradient(loss, sources)

    for count in range(5):
        given = numbers(count)
        if count == 3 and hvd.rank() == 0:
            given[0][0, 0] = np.nan
        for view, array in zip(views, given, strict=True):
            view.array[:] = array.reshape(view.array.shape)
        averager.finish()
        assert_values_equal(step([tf.constant(array) for array in given]), views)
        assert np.isnan(views[0].array[0, 0]) == (count == 3)
    assert len(averager._channels._channels[0].exchange.buckets) > 1


@several_ranks
@pytest.mark.parametrize("outer", [hvd.Replace(), hvd.SlowMo(beta=0.5)], ids=["replace", "slowmo"])
def test_changes_of_a_period_have_the_bits_of_the_core(outer):
    averaging = PeriodicAveraging(period=2, outer=outer, buffers="local")
    averager = PeriodicAverager(
        hvd.HorovodCarrier(),
        averaging,
        ExchangeConfig(POWERSGD.codec, feedback=hvd.Feedback()),
        name=f"core.{outer.id}",
    )
    views = views_of(start(shapes=SHAPES))
    averager.prepare(views)
    variables = [tf.Variable(value, name=f"v{i}") for i, value in enumerate(start(shapes=SHAPES))]
    optimizer = wrap(averaging=averaging, **OPTIONS)
    for step in range(6):
        apply(optimizer, variables, [step], numbers)
        for view, gradient in zip(views, numbers(step), strict=True):
            view.array -= np.float32(0.5) * gradient.reshape(view.array.shape)
        averager.count_step(0.5)
        assert_values_equal(variables, views)
    mine, its = optimizer.communication_stats(), averager.communication_stats()
    assert [mine[key] for key in ("bytes_sent", "bytes_received")] == [
        its[key] for key in ("bytes_sent", "bytes_received")
    ]


@several_ranks
@pytest.mark.parametrize("period", [1, 2])
def test_training_resumes_bit_exactly(period, tmp_path):
    """Kernels as factors, all else by another codec."""
    policy = [("*kernel", POWERSGD)]
    options = {"policy": policy, "compression": hvd.Compression.topk(0.1), "small_tensor_threshold": 0}
    path = tmp_path / f"{hvd.rank()}.keras"
    model = compiled(wrap(**options, feedback=hvd.Feedback(), period=period))
    fit(model, 2 * period)
    before = values(model.optimizer._pqasgd_state.residuals.starts)
    model.save(path)
    fit(model, 2 * period, first=2 * period)
    resumed = keras.models.load_model(path)
    fit(resumed, 2 * period, first=2 * period)
    assert_replicas_equal(resumed)
    assert_equal(weights(resumed), weights(model))
    for mine, its in ((resumed, model), (model, resumed)):
        assert_equal(*(values(each.optimizer._pqasgd_state.residuals.starts) for each in (mine, its)))
    assert len({array.tobytes() for array in everybody(before[0])}) == 1
    assert before[0].tobytes() != values(model.optimizer._pqasgd_state.residuals.starts)[0].tobytes()


@several_ranks
@pytest.mark.parametrize("period", [1, 2])
def test_factors_that_one_rank_alone_has_are_an_error_on_all(period, tmp_path):
    path = tmp_path / f"{hvd.rank()}.keras"
    model = compiled(wrap(**OPTIONS, period=period))
    fit(model, period)
    if hvd.rank() == 0:
        starts = model.optimizer._pqasgd_state.residuals.starts[0]
        starts.assign(-starts)
    model.save(path)
    resumed = keras.models.load_model(path)
    text = assert_raises_everywhere("MismatchError", lambda: fit(resumed, period))
    assert "factors of" in text
