"""Schedules and outer optimizers in a graph: as the core has them, and saved with the rest."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import pqasgd_horovod.tensorflow as hvd
from pqasgd_horovod import codecs
from pqasgd_horovod.averaging import ExchangeConfig, PeriodicAverager
from pqasgd_horovod.exchange.carriers.threads import run_ranks
from tests.averaging.arrays import ArrayView
from tests.ranks_tensorflow.common import (
    EDEN2,
    SHAPES,
    apply,
    assert_equal,
    assert_raises_everywhere,
    assert_replicas_equal,
    compiled,
    gradients_of,
    make_model,
    make_variables,
    several_ranks,
    start,
    train,
    two_ranks,
    values,
    weights,
    wrap,
)

RATE = 0.5  # exact, so that the local update has the same bits everywhere


def in_the_core(averaging, codec, rates, **options):
    """The same training by the framework-free averager, with all ranks in this process; the parameters of each rank."""

    def program(carrier):
        averager = PeriodicAverager(carrier, averaging, ExchangeConfig(codec, **options), name="core")
        views = [ArrayView(f"v{i}", value.reshape(-1)) for i, value in enumerate(start())]
        averager.prepare(views)
        for step, rate in enumerate(rates):
            for view, gradient in zip(views, gradients_of(step, carrier.rank), strict=True):
                view.array -= np.float32(rate) * gradient.reshape(-1)
            averager.count_step(rate)
        return [view.array.reshape(shape) for view, shape in zip(views, SHAPES, strict=True)], averager.rounds

    return run_ranks(hvd.size(), program)


@several_ranks  # a rank alone steps without an outer optimizer
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize(
    "averaging",
    [
        hvd.PeriodicAveraging(period=2, buffers="local", outer=hvd.SlowMo(0.5, 0.75)),
        hvd.PeriodicAveraging(period=2, buffers="local", outer=hvd.Nesterov(0.7, 0.9)),
        hvd.PeriodicAveraging(period=hvd.PostLocal(period=3, first_steps=2), buffers="local"),
        hvd.PeriodicAveraging(period=hvd.PostLocal(period=3), buffers="local", outer=hvd.SlowMo(0.5)),
        hvd.PeriodicAveraging(period=hvd.GrowingPeriod(first=1, last=4, every=3), buffers="local"),
    ],
    ids=["slowmo", "nesterov", "post-local", "post-local-rate-slowmo", "growing"],
)
def test_the_graph_does_what_the_core_does(averaging, traced):
    rates = [RATE, RATE, RATE, RATE / 4, RATE / 4, RATE / 4, RATE / 2, RATE / 2, RATE / 2]
    variables = make_variables()
    optimizer = wrap(keras.optimizers.SGD(RATE), averaging=averaging, compression=EDEN2)

    def step(gradients):
        optimizer.apply_gradients(zip(gradients, variables, strict=True))

    run = tf.function(step) if traced else step
    for number, rate in enumerate(rates):
        optimizer.learning_rate = rate
        run([tf.constant(gradient) for gradient in gradients_of(number)])
    wanted = in_the_core(averaging, codecs.eden(bits=2), rates)
    assert_equal(values(variables), wanted[hvd.rank()][0])
    assert optimizer.communication_stats()["rounds"] == wanted[hvd.rank()][1]
    if traced:
        assert run.experimental_get_tracing_count() == 1


@several_ranks
# Steps that are taken eagerly run the same graphs, which the test above, without feedback, shows too.
@pytest.mark.parametrize(
    "traced", [pytest.param(False, id="eager", marks=pytest.mark.long), pytest.param(True, id="traced")]
)
@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
@pytest.mark.parametrize(
    ("averaging", "codec"),
    [
        (hvd.PeriodicAveraging(period=2, buffers="local"), EDEN2.codec),
        (hvd.PeriodicAveraging(period=2, buffers="local"), codecs.topk(density=0.1, block_size=512)),
        (hvd.PeriodicAveraging(period=2, buffers="local"), codecs.randomk(density=0.1, block_size=512)),
        (hvd.SparseAveraging(period=3, buffers="local"), EDEN2.codec),
        (hvd.SparseAveraging(period=2, block=1024, buffers="local", outer=hvd.Nesterov(0.7, 0.5)), EDEN2.codec),
        (hvd.PeriodicAveraging(hvd.AdaptivePeriod(first=1, last=3, calibration_steps=2), buffers="local"), EDEN2.codec),
    ],
    ids=["periodic", "periodic-topk", "periodic-randomk", "sparse", "sparse-nesterov", "adaptive"],
)
def test_with_feedback_the_graph_does_what_the_core_does(averaging, codec, exchange, traced):
    rates = [RATE, RATE, RATE, RATE / 4, RATE / 4, RATE / 8, RATE / 8, RATE / 8]
    variables = make_variables()
    options = {"feedback": hvd.Feedback(), "exchange": exchange, "bucket_cap_mb": 0.004}
    optimizer = wrap(keras.optimizers.SGD(RATE), averaging=averaging, compression=codec, **options)

    def step(gradients):
        optimizer.apply_gradients(zip(gradients, variables, strict=True))

    run = tf.function(step) if traced else step
    for number, rate in enumerate(rates):
        optimizer.learning_rate = rate
        run([tf.constant(gradient) for gradient in gradients_of(number)])
    core = {"feedback": hvd.Feedback(), "method": exchange, "bucket_cap_mb": 0.004}
    wanted = in_the_core(averaging, codec, rates, **core)
    assert_equal(values(variables), wanted[hvd.rank()][0])
    assert optimizer.communication_stats()["rounds"] == wanted[hvd.rank()][1]
    optimizer.flush()
    assert_replicas_equal(variables)


def step_by_optimizer(variables, **options):
    optimizer = wrap(keras.optimizers.SGD(1.0), **options)
    for step in range(10):
        optimizer.apply_gradients(zip(map(tf.constant, gradients_of(step)), variables, strict=True))


def step_by_tape(variables, **options):
    for step in range(10):
        tape = hvd.DistributedGradientTape(tf.GradientTape(), **options)
        with tape:
            products = [tf.reduce_sum(v * g) for v, g in zip(variables, gradients_of(step), strict=True)]
            target = tf.add_n(products)
        for variable, gradient in zip(variables, tape.gradient(target, variables), strict=True):
            variable.assign_sub(gradient)


@several_ranks
@pytest.mark.parametrize("steps", [step_by_optimizer, step_by_tape])
@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
def test_coded_gradients_feed_back_what_they_did_not_send(exchange, steps):
    """The sum over steps of what arrives is the sum of the means, but for what is still to come."""

    def lost(**options):
        variables = make_variables()
        before = values(variables)
        steps(variables, compression=EDEN2, exchange=exchange, **options)
        moved = [old - new for old, new in zip(before, values(variables), strict=True)]
        true = [
            sum(gradients_of(step, rank)[i] for step in range(10) for rank in range(hvd.size())) / hvd.size()
            for i in range(len(before))
        ]
        return np.linalg.norm(moved[0] - true[0]) / np.linalg.norm(true[0])

    assert lost() > 1.5 * lost(feedback=hvd.Feedback())


@several_ranks
@pytest.mark.parametrize("period", [1, 2])
def test_a_checkpoint_of_each_rank_resumes_bit_exactly_with_its_residuals(period, tmp_path):
    def make():
        variables = make_variables()
        options = {"compression": EDEN2, "feedback": hvd.Feedback(), "exchange": "two_phase", "period": period}
        optimizer = wrap(keras.optimizers.SGD(0.5), **options)
        checkpoint = tf.train.Checkpoint(optimizer=optimizer, **{f"v{i}": v for i, v in enumerate(variables)})
        return variables, optimizer, checkpoint

    straight, optimizer, checkpoint = make()
    apply(optimizer, straight, range(4))
    path = checkpoint.save(tmp_path / f"rank{hvd.rank()}")
    apply(optimizer, straight, range(4, 8))
    resumed, optimizer, checkpoint = make()
    checkpoint.restore(path)
    apply(optimizer, resumed, range(4, 8))
    assert_equal(values(resumed), values(straight))


@two_ranks
def test_a_residual_of_another_rank_is_not_taken_over(tmp_path):
    variables = make_variables()
    options = {"compression": EDEN2, "feedback": hvd.Feedback(), "period": 2}
    optimizer = wrap(keras.optimizers.SGD(0.5), **options)
    apply(optimizer, variables, range(2))
    own = [variable.numpy() for variable in optimizer._pqasgd_state.residuals.own]
    assert any(residual.any() for residual in own)
    other = wrap(keras.optimizers.SGD(0.5), **options)
    other.build(make_variables())
    residuals = other._pqasgd_state.residuals
    for variable, residual in zip(residuals.own, own, strict=True):
        variable.assign(residual)
    residuals.owner.assign([0, hvd.size()])
    other._pqasgd_averager.value.before_step()
    for variable, residual in zip(residuals.own, own, strict=True):
        np.testing.assert_array_equal(variable.numpy(), residual if hvd.rank() == 0 else 0)


def test_a_schedule_of_the_learning_rate_counts_the_step_that_is_made():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([3], [RATE, RATE / 10])  # from the fifth step on
    optimizer = wrap(keras.optimizers.SGD(schedule), period=hvd.PostLocal(period=3), compression=EDEN2)
    variables = make_variables()
    averaged = []
    for step in range(9):
        before = optimizer.communication_stats()["rounds"]
        apply(optimizer, variables, [step])
        if optimizer.communication_stats()["rounds"] > before:
            averaged.append(step + 1)
            assert_replicas_equal(variables)
    assert averaged == [1, 2, 3, 4, 5, 8]


@pytest.mark.parametrize("saved_after", [5, 6])
def test_a_model_file_resumes_bit_exactly_with_the_slow_momentum(saved_after, tmp_path):
    averaging = hvd.PeriodicAveraging(period=hvd.PostLocal(period=3, first_steps=2), outer=hvd.SlowMo(0.5, 0.7))
    inner = keras.optimizers.SGD(0.1, momentum=0.9)
    straight = compiled(wrap(inner, averaging=averaging, compression=EDEN2), make_model(norm=True))
    train(straight, range(saved_after))
    straight.save(tmp_path / "model.keras")
    train(straight, range(saved_after, 11))
    resumed = keras.models.load_model(tmp_path / "model.keras")
    assert resumed.optimizer.get_config()["averaging"] == averaging.config()
    train(resumed, range(saved_after, 11))
    assert_equal(weights(resumed), weights(straight))


@two_ranks
def test_learning_rates_that_differ_are_an_error_on_all_ranks():
    optimizer = wrap(keras.optimizers.SGD(0.25 * (1 + hvd.rank())), period=hvd.PostLocal(period=3), compression=EDEN2)
    variables = make_variables()
    text = assert_raises_everywhere("DesynchronizedError", lambda: apply(optimizer, variables, [0]))
    assert "the learning rate is 0.25 on rank 0; 0.5 on rank 1" in text
