"""What ``optimizer.join()`` refuses, errors while others have joined, and ``JoinCallback`` in ``model.fit``."""

from __future__ import annotations

import functools
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import pqasgd_horovod.tensorflow as hvd
import pqasgd_horovod.tensorflow.keras as hvd_keras
from pqasgd_horovod.errors import ArgumentError

from .common import (
    EDEN2,
    EDEN4,
    apply,
    assert_equal,
    assert_raises_everywhere,
    assert_replicas_equal,
    compiled,
    differ,
    everybody,
    examples,
    gradients_of,
    last_rank,
    make_model,
    make_variables,
    several_ranks,
    uneven_batches,
    values,
    wrap,
)


@several_ranks
def test_who_flushes_while_others_have_joined_is_told_so_and_nan_is_one_error():
    variables = make_variables()
    optimizer = wrap(period=4, compression=EDEN4)
    apply(optimizer, variables, range(3 if hvd.rank() else 2))
    text = assert_raises_everywhere("DesynchronizedError", optimizer.flush if hvd.rank() else optimizer.join)
    assert "joining after 2 steps and 0 averages on rank 0; flushing after 3 steps" in text
    assert "join()" in text
    before = values(variables)

    def broken():
        if hvd.rank():
            apply(optimizer, variables, [3], lambda step: [g * np.float32("nan") for g in gradients_of(step)])
        else:
            optimizer.join()

    text = assert_raises_everywhere("NonFiniteError", broken)
    assert "had NaN" in text
    if hvd.rank() == 0:
        assert_equal(values(variables), before)


@several_ranks
def test_other_gradients_than_before_are_an_error_on_ranks_that_have_joined():
    variables = make_variables()
    optimizer = wrap(compression=EDEN4)
    apply(optimizer, variables, [0])

    def other():
        if hvd.rank():
            optimizer.apply([None, *map(tf.constant, gradients_of(1)[1:])], variables)
        else:
            optimizer.join()

    text = assert_raises_everywhere("DesynchronizedError", other)
    assert "joined after 1 steps and 1 averages on rank 0; laying out its tensors" in text


@several_ranks
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "where Horovod averages"),
        pytest.param({"compression": hvd.Compression.fp16}, "where Horovod averages", marks=pytest.mark.long),
        ({"compression": hvd.Compression.signsgd(majority_vote=True)}, "a rank without data would vote"),
        ({"compression": EDEN4, "local": True}, "local variables"),
        ({"compression": EDEN4, "built": False}, r"not built, .* optimizer.build\(model.trainable_variables\)"),
        ({"compression": EDEN4, "period": 4, "built": False}, r"not built"),
    ],
    ids=str,
)
def test_what_is_refused(options, text):
    options = dict(options)
    variables, is_local, is_built = make_variables(), options.pop("local", False), options.pop("built", True)
    optimizer = wrap(**{"check_consistency": False, **options})
    if is_local:
        optimizer.register_local_var(variables[0])
    if is_built:
        apply(optimizer, variables, [0])
    assert re.search(text, assert_raises_everywhere("ArgumentError", optimizer.join))
    apply(optimizer, variables, [1])  # and training goes on, or begins
    assert is_local or not differ(values(variables)) or "period" in options


def test_a_tape_is_refused_with_what_to_take():
    with pytest.raises(ArgumentError, match=r"plain tf.GradientTape, and wrap the optimizer"):
        hvd.DistributedGradientTape(tf.GradientTape(), compression=EDEN4).join()


@several_ranks
@pytest.mark.parametrize("period", [1, 4])
def test_a_rank_that_cannot_build_is_an_error_on_those_that_step(period):
    variables = make_variables()
    optimizer = wrap(compression=EDEN4, period=period)
    act = functools.partial(apply, optimizer, variables, [0]) if hvd.rank() else optimizer.join
    text = assert_raises_everywhere("MismatchError", act)
    assert "optimizer.build(model.trainable_variables)" in text
    again = functools.partial(apply, optimizer, variables, [0])
    assert "make another one" in assert_raises_everywhere("ArgumentError", again)


@several_ranks
def test_a_rank_that_joins_with_what_it_cannot_average_is_an_error_on_those_that_step():
    variables = [tf.Variable(tf.ones([3], tf.float32 if hvd.rank() else tf.complex64), name="v")]
    optimizer = wrap(compression=EDEN4)
    optimizer.build(variables)
    act = functools.partial(apply, optimizer, variables, [0], lambda step: [np.ones(3, np.float32)])
    text = assert_raises_everywhere("MismatchError", act if hvd.rank() else optimizer.join)
    assert "has dtype complex64" in text


@several_ranks
@pytest.mark.parametrize("moments", ["average", pytest.param("reset", marks=pytest.mark.long)])
def test_moments_of_the_ranks_that_have_data(moments):
    variables = make_variables()
    inner = keras.optimizers.SGD(0.1, momentum=0.9)
    optimizer = wrap(inner, averaging=hvd.PeriodicAveraging(3, moments=moments, buffers="local"))
    for epoch in range(2):
        apply(optimizer, variables, uneven_batches(epoch))
        optimizer.join()
        assert_replicas_equal([*variables, *optimizer.momentums])


# ---- in fit ----


def uneven_fit(model, *callbacks, epochs=2, **options):
    """Ranks with 3, 5, 1 and 2 batches; every other one has as many in the second epoch. Return the history."""
    inputs, labels = examples(len(uneven_batches(0)))
    options = {"batch_size": 8, "shuffle": False, "verbose": 0, **options}
    return model.fit(inputs, labels, epochs=epochs, callbacks=list(callbacks), **options).history


@pytest.mark.parametrize(
    "options",
    [
        {"period": 4, "averaging": None},
        pytest.param({"period": 2, "compression": EDEN4, "averaging": None}, marks=pytest.mark.long),
        {"compression": EDEN4},
    ],
    ids=["replicas", "coded", "gradients"],
)
def test_fit_joins_before_it_validates_and_averages_metrics(options):
    """Wherever the callback stands among ours; iterations and moments are alike where gradients are averaged."""
    averaged_first = [hvd_keras.callbacks.MetricAverageCallback(), hvd_keras.callbacks.JoinCallback()]
    more = [hvd_keras.callbacks.FlushCallback(), hvd_keras.callbacks.CommunicationLogger()]
    gradients = "period" not in options
    model = compiled(wrap(keras.optimizers.Adam(0.01), **options), make_model(norm=not gradients))
    held_out = {"validation_data": examples(2, rank=99), "validation_batch_size": 16} if gradients else {}
    history = uneven_fit(model, *averaged_first, *more, **held_out)
    assert_replicas_equal(model.optimizer.variables if gradients else model)
    assert everybody(history) == [history] * hvd.size()
    most = len(uneven_batches(0, last_rank(0)))
    stats = model.optimizer.communication_stats()
    assert stats["steps"] == 2 * most
    assert history["rounds"][1] == stats["rounds"]
    assert int(model.optimizer.iterations) == 2 * (most if gradients else len(uneven_batches(0)))


@several_ranks
@pytest.mark.parametrize("options", [{"period": 4}, {}], ids=["replicas", "gradients"])
def test_a_scaled_loss(options):
    """The scale grows with each rank's own steps, except where gradients are averaged: there all have made the same."""
    inner = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=1024.0, dynamic_growth_steps=2)
    model = compiled(wrap(inner, compression=EDEN4, **options))
    before = values(model.trainable_variables)
    uneven_fit(model, hvd_keras.callbacks.JoinCallback())
    assert_replicas_equal(model if options else [*model.trainable_variables, *model.optimizer.variables])
    assert not np.array_equal(values(model.trainable_variables)[0], before[0])
    steps = 2 * len(uneven_batches(0) if options else uneven_batches(0, last_rank(0)))
    assert float(model.optimizer.dynamic_scale) == 1024.0 * 2 ** (steps // 2)


def test_a_schedule_of_the_learning_rate_goes_on_from_the_steps_of_all_ranks():
    """SlowMo compares learning rates, which would differ after the first epoch."""
    schedule = keras.optimizers.schedules.InverseTimeDecay(0.1, 1, 0.5)
    averaging = hvd.PeriodicAveraging(2, outer=hvd.SlowMo(0.5))
    model = compiled(wrap(keras.optimizers.SGD(schedule), averaging=averaging))
    uneven_fit(model, hvd_keras.callbacks.JoinCallback(), epochs=3)
    assert_replicas_equal(model)
    assert int(model.optimizer.iterations) == 3 * len(uneven_batches(0, last_rank(0)))


@several_ranks
def test_without_the_callback_uneven_data_is_an_error_that_tells_of_it():
    model = compiled(wrap(period=4, compression=EDEN2))
    text = assert_raises_everywhere("DesynchronizedError", functools.partial(uneven_fit, model))
    assert "join()" in text


@several_ranks
def test_the_callback_refuses_what_cannot_be_joined_before_training():
    callback = hvd_keras.callbacks.JoinCallback()
    for optimizer, text in (
        (wrap(), "where Horovod averages"),
        (keras.optimizers.SGD(0.1), "optimizer is a SGD; JoinCallback needs"),
    ):
        model = compiled(optimizer)
        with pytest.raises(ArgumentError, match=text):
            uneven_fit(model, callback)
        assert int(model.optimizer.iterations) == 0
