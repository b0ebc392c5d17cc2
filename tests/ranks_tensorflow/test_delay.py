"""A delay in TensorFlow: the core's bits however long the exchange takes, in graphs, saved while it is under way."""

from __future__ import annotations

import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import pqasgd_horovod.tensorflow as hvd
from pqasgd_horovod.averaging import ExchangeConfig, PeriodicAverager
from pqasgd_horovod.averaging.vector import ArrayView

from .common import (
    EDEN2,
    EDEN4,
    apply,
    assert_equal,
    assert_raises_everywhere,
    assert_replicas_equal,
    compiled,
    everybody,
    fit,
    gradients_of,
    make_variables,
    several_ranks,
    start,
    train,
    values,
    weights,
    wrap,
)

STRATEGIES = {
    "replace": hvd.PeriodicAveraging(period=3, delay=2, buffers="local"),
    "nesterov": hvd.PeriodicAveraging(period=3, delay=1, outer=hvd.Nesterov(0.5, 0.9), buffers="local"),
    "fragments": hvd.PeriodicAveraging(period=2, delay=1, selection=hvd.Rotation(3), buffers="local"),
}


def late(optimizer, seconds=0.2):
    """Let rank 0 send its snapshots late, so that the steps between are over before the exchange is."""
    averager = optimizer._pqasgd_averager.value
    exchange = averager._exchange_snapshots

    def slowly(fragment):
        if hvd.rank() == 0:
            time.sleep(seconds)
        exchange(fragment)

    averager._delayed._exchange = slowly


@several_ranks
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("is_late", [False, True], ids=["soon", "late"])
def test_it_has_the_bits_of_the_core(name, traced, is_late):
    averaging = STRATEGIES[name]
    label = f"{name}.{traced}.{is_late}"
    averager = PeriodicAverager(
        hvd.HorovodCarrier(), averaging, ExchangeConfig(EDEN2.codec, feedback=hvd.Feedback()), name=f"core.{label}"
    )
    views = [ArrayView(f"v{i}", array) for i, array in enumerate(start())]
    averager.prepare(views)
    variables = make_variables()
    optimizer = wrap(averaging=averaging, compression=EDEN2, feedback=hvd.Feedback())
    optimizer.build(variables)
    if is_late:
        late(optimizer)
    step = tf.function(optimizer.apply) if traced else optimizer.apply
    for number in range(10):
        step(list(map(tf.constant, gradients_of(number))), variables)
        for view, gradient in zip(views, gradients_of(number), strict=True):
            view.array -= np.float32(0.5) * gradient
        averager.count_step(0.5)
        assert_equal(values(variables), [view.array for view in views])
    optimizer.flush()
    averager.flush()
    assert_equal(values(variables), [view.array for view in views])
    assert_replicas_equal(variables)
    mine, its = optimizer.communication_stats(), averager.communication_stats()
    for key in ("bytes_sent", "bytes_received", "rounds", "steps"):
        assert mine[key] == its[key], key


@several_ranks
def test_a_model_that_is_saved_while_an_average_is_under_way_resumes_bit_exactly(tmp_path):
    """Buffers too; what was begun before is exchanged anew from the snapshot, with the residual of that time."""
    path = tmp_path / f"{hvd.rank()}.keras"
    averaging = hvd.PeriodicAveraging(period=3, delay=2)
    model = compiled(wrap(keras.optimizers.Adam(0.01), averaging=averaging, compression=EDEN4, feedback=hvd.Feedback()))
    train(model, range(4))
    assert model.optimizer._pqasgd_state.pending[0] == 5
    model.save(path)
    train(model, range(4, 9))
    resumed = keras.models.load_model(path)
    train(resumed, range(4, 9))
    assert_equal(weights(resumed), weights(model))
    for each in (resumed, model):
        each.optimizer.flush()
    assert_equal(weights(resumed), weights(model))
    assert_replicas_equal(resumed)


@several_ranks
def test_a_model_learns_in_fit_and_ends_with_replicas_that_are_equal():
    averaging = hvd.PeriodicAveraging(period=4, delay=2)
    model = compiled(wrap(keras.optimizers.SGD(0.1), averaging=averaging, compression=EDEN4), steps_per_execution=3)
    fit(model, 9)
    assert_replicas_equal(model)
    assert model.optimizer.communication_stats()["rounds"] == 3  # two of the schedule, and the last partial period


@several_ranks
def test_nan_is_one_error_when_the_average_is_due_and_training_goes_on():
    averaging = hvd.PeriodicAveraging(period=3, delay=1, buffers="local")
    variables = make_variables()
    optimizer = wrap(averaging=averaging, compression=EDEN2)

    def gradients(step):
        given = gradients_of(step)
        if step == 2 and hvd.rank() == hvd.size() - 1:
            given[0][0, 0] = np.nan
        return given

    apply(optimizer, variables, range(3), gradients)
    text = assert_raises_everywhere("NonFiniteError", lambda: apply(optimizer, variables, [3]))
    assert f"rank {hvd.size() - 1} had NaN" in text
    variables[0].assign(tf.zeros_like(variables[0]))
    # The step that failed counts; the next one begins the average anew.
    apply(optimizer, variables, [4, 5])
    assert optimizer.communication_stats()["rounds"] == 1
    optimizer.flush()
    assert_replicas_equal(variables)


@several_ranks
def test_a_snapshot_of_another_rank_is_not_taken_for_ones_own(tmp_path):
    """Where all load rank 0's file, the average that was under way has its changes once, and none of the others'."""
    averaging = hvd.PeriodicAveraging(period=3, delay=2)
    model = compiled(wrap(averaging=averaging, compression=hvd.Compression.none))
    train(model, range(4))
    path = everybody(str(tmp_path / "model.keras"))[0]
    if hvd.rank() == 0:
        model.save(path)
    everybody(None)
    resumed = keras.models.load_model(path)
    state = resumed.optimizer._pqasgd_state
    before, snapshots = values(state.anchors), values(state.snapshots)  # rank 0's, on every rank
    train(resumed, range(4, 5))
    for anchor, snapshot, after in zip(before, snapshots, values(state.anchors), strict=True):
        np.testing.assert_allclose(after, anchor + (snapshot - anchor) / hvd.size(), atol=1e-6)
        assert np.abs(snapshot - anchor).max() > 1e-4
    resumed.optimizer.flush()
    assert_replicas_equal(resumed)
