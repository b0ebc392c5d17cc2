"""What Keras offers around an optimizer, under ``model.fit``: the ranks stay together, or do as in plain Keras."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import pqasgd_horovod.tensorflow as hvd
import pqasgd_horovod.tensorflow.keras as hvd_keras
from tests.ranks_tensorflow.common import (
    EDEN2,
    EDEN4,
    assert_equal,
    assert_raises_everywhere,
    assert_replicas_equal,
    compiled,
    differ,
    everybody,
    examples,
    fit,
    gradients_of,
    make_model,
    make_variables,
    several_ranks,
    start,
    train,
    values,
    weights,
    wrap,
)

LONG = pytest.mark.long  # graphs are traced anew for each


def sgd(**options):
    return keras.optimizers.SGD(0.1, momentum=0.9, **options)


def schedule():
    return keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5), momentum=0.9)


@pytest.mark.parametrize(
    ("inner", "options", "arguments", "rounds"),
    [
        (sgd, {"period": 4}, {"steps_per_execution": 3}, 3),
        pytest.param(sgd, {"period": 4, "exchange": "two_phase"}, {"run_eagerly": True}, 3, marks=LONG),
        (sgd, {}, {"run_eagerly": True}, 9),
        pytest.param(sgd, {}, {"steps_per_execution": 3}, 9, marks=LONG),
        pytest.param(lambda: sgd(gradient_accumulation_steps=2), {"period": 2}, {}, 5, marks=LONG),
        (lambda: sgd(gradient_accumulation_steps=2), {}, {}, 9),
        (sgd, {"backward_passes_per_step": 2, "average_aggregated_gradients": True}, {}, 4),
        pytest.param(sgd, {"backward_passes_per_step": 2, "period": 2}, {}, 2, marks=LONG),
        (lambda: sgd(clipnorm=0.1, weight_decay=0.01), {"period": 3}, {}, 3),
        pytest.param(lambda: sgd(clipvalue=0.01), {}, {}, 9, marks=LONG),
        pytest.param(lambda: keras.optimizers.AdamW(0.01, global_clipnorm=0.1), {"period": 3}, {}, 3, marks=LONG),
        (schedule, {"period": 3}, {}, 3),
    ],
    ids=[
        "steps_per_execution", "eagerly", "eagerly-coded", "steps_per_execution-coded", "accumulation",
        "accumulation-coded", "passes-coded", "passes", "clipnorm-weight_decay", "clipvalue-coded",
        "adamw-global_clipnorm", "schedule",
    ],
)  # fmt: skip
def test_fit_with(inner, options, arguments, rounds):
    model = compiled(wrap(inner(), compression=EDEN4, **options), **arguments)
    before = weights(model)
    fit(model, 9)
    assert_replicas_equal(model)
    assert not np.array_equal(weights(model)[0], before[0])
    stats = model.optimizer.communication_stats()
    assert stats["rounds"] == rounds
    assert int(model.optimizer._iterations) == 9


def test_alone_it_is_plain_keras():
    """On one rank the same bits; on several each rank's first period is its plain optimizer's."""
    for inner in (
        lambda: sgd(clipnorm=0.1, weight_decay=0.01, gradient_accumulation_steps=2),
        lambda: keras.optimizers.LossScaleOptimizer(sgd(), dynamic_growth_steps=2),
    ):
        ours, plain = compiled(wrap(inner(), period=8, compression=EDEN2)), compiled(inner())
        train(ours, range(5))
        train(plain, range(5))
        assert_equal(weights(ours), weights(plain))
        assert_equal(values(ours.optimizer.variables), values(plain.optimizer.variables))


@pytest.mark.parametrize("passes", [2, 3])
@pytest.mark.parametrize("average", [False, True], ids=["sum", "mean"])
def test_accumulated_gradients_are_those_added_up_by_hand(passes, average):
    """Powers of two for the rate and for n, or a tolerance of a unit in the last place of the mean."""
    variables, expected = make_variables(), start()
    optimizer = wrap(
        keras.optimizers.SGD(0.5), backward_passes_per_step=passes, average_aggregated_gradients=average, period=1
    )
    for step in range(2 * passes):
        optimizer.apply([tf.constant(g) for g in gradients_of(step)], variables)
        if step == passes - 2:
            assert_equal(values(variables), expected)  # nothing has been applied
    for first in (0, passes):
        for i, value in enumerate(expected):
            ranks = [sum(gradients_of(first + k, rank)[i] for k in range(passes)) for rank in range(hvd.size())]
            value -= np.float32(0.5) * np.mean(ranks, axis=0) / (passes if average else 1)
    for ours, theirs in zip(values(variables), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=8 * 2.0**-23 * passes)
    assert_replicas_equal(variables)


@pytest.mark.parametrize(
    ("scaled", "options"),
    [
        pytest.param(False, {}, id="coded"),
        pytest.param(False, {"period": 4}, id="period4", marks=LONG),
        pytest.param(True, {}, id="loss-scale-coded", marks=LONG),
        pytest.param(True, {"period": 4}, id="loss-scale-period4"),
    ],
)
def test_moving_averages_of_weights_end_alike(options, scaled):
    inner = sgd(use_ema=True, ema_momentum=0.5)
    inner = keras.optimizers.LossScaleOptimizer(inner) if scaled else inner
    model = compiled(wrap(inner, compression=EDEN4, **options))
    fit(model, 6)
    assert_replicas_equal(model)


def poisoned(batches, bad):
    """The last rank's examples of one batch would overflow its gradients."""
    inputs, labels = examples(batches)
    if hvd.rank() == hvd.size() - 1:
        inputs[8 * bad] = np.inf
    return inputs, labels


class Record(keras.callbacks.Callback):
    """Weights and scale after each step."""

    def __init__(self):
        super().__init__()
        self.weights, self.scales = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.weights.append(weights(self.model))
        self.scales.append(float(self.model.optimizer.dynamic_scale))


@pytest.mark.parametrize(
    "options",
    [
        {"compression": EDEN4},
        {"compression": EDEN4, "exchange": "two_phase"},
        {},
        {"compression": hvd.Compression.fp16},
    ],
    ids=["eden", "eden-two_phase", "none", "fp16"],
)
def test_an_overflow_on_one_rank_skips_the_step_on_all(options):
    record = Record()
    inner = keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=1024.0)
    model = compiled(wrap(inner, **options))
    inputs, labels = poisoned(4, 1)
    model.fit(inputs, labels, batch_size=8, shuffle=False, verbose=0, callbacks=[record])
    assert record.scales == [1024.0, 512.0, 512.0, 512.0]
    assert_equal(record.weights[1], record.weights[0])
    assert not np.array_equal(record.weights[2][0], record.weights[1][0])
    assert len(set(everybody(int(model.optimizer.iterations)))) == 1
    assert_replicas_equal(model)


@several_ranks
def test_an_overflow_on_one_rank_costs_that_rank_a_local_step():
    record = Record()
    inner = keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=1024.0)
    model = compiled(wrap(inner, compression=EDEN4, period=4))
    inputs, labels = poisoned(8, 1)
    model.fit(inputs, labels, batch_size=8, shuffle=False, verbose=0, callbacks=[record])
    last = hvd.rank() == hvd.size() - 1
    assert record.scales[1] == (512.0 if last else 1024.0)
    assert np.array_equal(record.weights[1][0], record.weights[0][0]) == last
    for step in (3, 7):
        assert not differ(record.weights[step])
    assert model.optimizer.communication_stats()["rounds"] == 2


@pytest.mark.parametrize("period", [1, 4])
def test_mixed_precision_as_the_global_policy(period):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = compiled(wrap(sgd(), compression=EDEN4, period=period))
        fit(model, 5)
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        assert model.layers[0].compute_dtype == "float16"
        assert_replicas_equal(model)
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("options", [{}, {"compression": EDEN4, "period": 3}], ids=["stock", "period"])
def test_fit_where_keras_turns_xla_on(options):
    model = compiled(wrap(sgd(), **options), jit_compile=True)
    fit(model, 4, callbacks=[hvd_keras.callbacks.BroadcastGlobalVariablesCallback(0)])
    assert not model.jit_compile
    assert_replicas_equal(model)


@several_ranks
@pytest.mark.parametrize("everywhere", [True, False], ids=["everywhere", "one-rank"])
def test_xla_without_the_callback_is_an_error_on_all_ranks(everywhere):
    model = compiled(wrap(sgd(), compression=EDEN4, period=3), jit_compile=everywhere or hvd.rank() == 0)
    kind = "ArgumentError" if everywhere else "MismatchError"
    text = assert_raises_everywhere(kind, lambda: fit(model, 4))
    assert "jit_compile is on, and XLA cannot compile Horovod's ops: pass jit_compile=False" in text


@several_ranks
def test_statistics_of_normalization():
    """Compared with the mean of what each rank's plain optimizer makes of its own data in that period."""
    plain = compiled(sgd(), make_model(norm=True))
    fit(plain, 2)
    locally = everybody(values(plain.layers[1].non_trainable_variables))
    for policy in ("statistics", "local", "all"):
        averaging = hvd.PeriodicAveraging(period=2, buffers=policy)
        model = compiled(wrap(sgd(), averaging=averaging, compression=EDEN4), make_model(norm=True))
        fit(model, 2)
        ours = values(model.layers[1].non_trainable_variables)
        if policy == "local":
            assert_equal(ours, locally[hvd.rank()])
        else:
            for mine, of_ranks in zip(ours, zip(*locally, strict=True), strict=True):
                # One rounding for each rank that is added, of numbers below 4.
                np.testing.assert_allclose(mine, np.mean(of_ranks, axis=0), rtol=0, atol=hvd.size() * 2.0**-22)
            assert not differ(ours)
        assert differ([model.layers[1].moving_mean.numpy()]) == (policy == "local"), policy


class Counting(keras.layers.Layer):
    """Has a buffer that is no statistic."""

    def build(self, shape):
        self.mask = self.add_weight(shape=(3,), initializer="zeros", trainable=False, name="mask")

    def call(self, inputs):
        return inputs


@several_ranks
def test_all_buffers_and_only_all_takes_other_buffers_in():
    for policy in ("local", "statistics", "all"):
        model = keras.Sequential([keras.Input((30,)), Counting(), keras.layers.Dense(5, kernel_initializer="ones")])
        model.layers[0].mask.assign([float(hvd.rank())] * 3)
        compiled(wrap(averaging=hvd.PeriodicAveraging(period=2, buffers=policy)), model)
        fit(model, 2)
        expected = (hvd.size() - 1) / 2 if policy == "all" else float(hvd.rank())
        assert model.layers[0].mask.numpy().tolist() == [expected] * 3, policy


@several_ranks
@pytest.mark.parametrize("compression", [EDEN2, hvd.Compression.none], ids=["eden", "none"])
def test_a_layer_that_is_frozen_later_needs_another_optimizer(compression, caplog):
    model = compiled(wrap(sgd(), compression=compression, period=2))
    fit(model, 3)
    model.layers[0].trainable = False
    before = values(model.layers[0].variables)
    compiled(model.optimizer, model)
    fit(model, 4)
    assert_replicas_equal(model)
    moved = any((a != b).any() for a, b in zip(before, values(model.layers[0].variables), strict=True))
    said = "frozen after the first step, and are still averaged" in caplog.text
    assert moved == said == (compression is EDEN2)
    caplog.clear()
    compiled(wrap(sgd(), compression=compression, period=2), model)
    before = values(model.layers[0].variables)
    fit(model, 4)
    assert_equal(values(model.layers[0].variables), before)
    assert "frozen" not in caplog.text


def test_a_frozen_layer_stays_as_it_is():
    model = make_model()
    model.layers[1].trainable = False
    frozen = values(model.layers[1].weights)
    compiled(wrap(sgd(), period=2, compression=EDEN2), model)
    fit(model, 3)
    assert_equal(values(model.layers[1].weights), frozen)
    assert_replicas_equal(model)


def test_local_variables_are_left_alone():
    model = make_model()
    kernel = model.layers[2].kernel
    optimizer = wrap(sgd(), period=2, compression=EDEN2)
    optimizer.register_local_var(kernel)
    compiled(optimizer, model)
    fit(model, 2)
    assert differ(values([kernel])) == (hvd.size() > 1)
    assert not differ(values(model.layers[0].weights))


def test_two_models_in_one_program():
    models = [compiled(wrap(sgd(), period=2, compression=EDEN2), make_model(seed=seed)) for seed in (1, 2)]
    for step in range(4):
        for model in models:
            train(model, [step])
    for model in models:
        assert_replicas_equal(model)
        assert model.optimizer.communication_stats()["rounds"] == 2
