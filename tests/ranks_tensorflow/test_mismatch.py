"""Ranks that were given different things, or do different things: the same error on all of them, within seconds."""

from __future__ import annotations

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import pqasgd_horovod.tensorflow as hvd
from pqasgd_horovod.errors import ArgumentError, CollectiveTimeoutError, MismatchError
from tests.ranks_tensorflow.common import (
    EDEN2,
    EDEN4,
    apply,
    assert_equal,
    assert_raises_everywhere,
    assert_replicas_equal,
    compiled,
    everybody,
    examples,
    fit,
    gradients_of,
    make_model,
    make_variables,
    several_ranks,
    values,
    weights,
    wrap,
)

pytestmark = several_ranks


@pytest.mark.parametrize(
    ("odd", "even", "field"),
    [
        ({"period": 8}, {"period": 4}, "averaging.period"),
        ({"period": 8}, {}, "averaging.period"),
        ({"compression": EDEN2}, {}, "exchange.codec.bits"),
        ({"compression": hvd.Compression.none}, {}, "exchange.codec"),
        ({"seed": 1}, {"seed": 2}, "exchange.seed"),
        ({"exchange": "two_phase"}, {"exchange": "allgather"}, "exchange.method"),
        ({"small_tensor_threshold": 10}, {}, "exchange.small_tensor_threshold"),
        ({"bucket_cap_mb": 1.0}, {}, "exchange.bucket_cap_mb"),
        ({"nonfinite": "propagate"}, {}, "exchange.nonfinite"),
        ({"op": hvd.Sum}, {}, "op"),
        ({"backward_passes_per_step": 2}, {}, "backward_passes_per_step"),
        ({"inner": keras.optimizers.Adam()}, {}, "optimizer"),
        ({"averaging": hvd.PeriodicAveraging(period=1, buffers="all")}, {}, "averaging.buffers"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_settings(odd, even, field):
    options = odd if hvd.rank() % 2 else even
    text = assert_raises_everywhere("MismatchError", lambda: wrap(**{"compression": EDEN4, **options}))
    assert f"agree on {field}" in text
    assert "rank 0" in text or "ranks 0" in text


def test_an_argument_that_only_one_rank_gets_wrong():
    error = ArgumentError if hvd.rank() == 0 else MismatchError
    with pytest.raises(error, match="period is 0"):
        wrap(averaging=None, period=0 if hvd.rank() == 0 else 2)
    variables = make_variables()
    apply(wrap(period=2, compression=EDEN4), variables, range(2))
    assert_replicas_equal(variables)


@pytest.mark.parametrize("options", [{"period": 3}, {"compression": EDEN4}, {}], ids=["period3", "coded", "stock"])
def test_variables_of_other_shapes(options):
    shapes = [(30, 60), (5 + hvd.rank(),)]
    variables = make_variables(shapes=shapes)
    optimizer = wrap(**options)
    text = assert_raises_everywhere(
        "MismatchError", lambda: apply(optimizer, variables, [0], lambda step: gradients_of(step, shapes=shapes))
    )
    assert "float32 [5]" in text
    assert "float32 [6]" in text


@pytest.mark.parametrize("options", [{"period": 3}, {"compression": EDEN4}, {}], ids=["period3", "coded", "stock"])
def test_variables_in_another_order(options):
    """Names and shapes agree, so nothing else would notice that one layer's numbers land in another."""
    model = make_model()
    optimizer = wrap(**options)
    order = -1 if hvd.rank() else 1
    pairs = [(tf.zeros(v.shape), v) for v in model.trainable_variables][::order]
    text = assert_raises_everywhere("MismatchError", lambda: optimizer.apply_gradients(pairs))
    assert "order[0]" in text


@pytest.mark.parametrize("options", [{"period": 3}, {"compression": EDEN4}, {}], ids=["period3", "coded", "stock"])
def test_a_variable_that_only_one_rank_cannot_average(options):
    dtype = tf.float32 if hvd.rank() else tf.complex64
    pairs = [(tf.ones([3], dtype), tf.Variable(tf.ones([3], dtype), name="v"))]
    optimizer = wrap(**options)
    text = assert_raises_everywhere("MismatchError", lambda: optimizer.apply_gradients(pairs))
    assert "has dtype complex64" in text


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "fit"])
def test_another_start(traced):
    model = compiled(wrap(period=2, compression=EDEN4))
    second = model.layers[1].kernel
    second.assign_add(np.full(second.shape, hvd.rank(), np.float32))
    before = weights(model)
    if traced:
        text = assert_raises_everywhere("MismatchError", lambda: fit(model, 1))
    else:
        pairs = [(tf.ones(v.shape), v) for v in model.trainable_variables]
        text = assert_raises_everywhere("MismatchError", lambda: model.optimizer.apply_gradients(pairs))
    assert "BroadcastGlobalVariablesCallback(0)" in text
    assert second.path in text
    assert_equal(weights(model), before)


def test_after_that_a_broadcast_helps():
    variables = make_variables()
    variables[2].assign_add(tf.fill(variables[2].shape, float(hvd.rank())))
    optimizer = wrap(period=2)
    assert_raises_everywhere("MismatchError", lambda: apply(optimizer, variables, [0]))
    hvd.broadcast_variables([*variables, *optimizer._pqasgd_state.named().values()], root_rank=0)
    apply(optimizer, variables, range(2))
    assert_replicas_equal(variables)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_one_rank_makes_a_step_too_many(traced):
    variables = make_variables()
    optimizer = wrap(period=3, compression=EDEN2)
    step = tf.function(optimizer.apply) if traced else optimizer.apply
    optimizer.build(variables)

    def steps(count):
        for number in range(count):
            step(list(map(tf.constant, gradients_of(number))))

    steps(2 if hvd.rank() == 0 else 1)
    before = values(variables)
    text = assert_raises_everywhere("DesynchronizedError", optimizer.flush)
    assert re.search("after 2 steps and 0 averages on rank 0; .*after 1 steps and 0 averages on rank", text)
    assert_equal(values(variables), before)


def test_one_rank_flushes_while_the_others_average():
    variables = make_variables()
    optimizer = wrap(period=3, compression=EDEN2)
    apply(optimizer, variables, range(1))
    calls = optimizer.flush if hvd.rank() == 0 else lambda: apply(optimizer, variables, range(1, 3))
    text = assert_raises_everywhere("DesynchronizedError", calls)
    assert "after 1 steps" in text
    assert "after 3 steps" in text


@pytest.mark.parametrize(
    ("given_up", "timeout"), [(True, None), (False, None), (False, 20)], ids=["given-up", "all", "all-with-timeout"]
)
def test_one_rank_flushes_alone_and_has_lost_nothing(given_up, timeout):
    variables = make_variables()
    optimizer = wrap(period=3, compression=EDEN2)
    apply(optimizer, variables, range(1))
    before = values(variables)
    if hvd.rank() == 0:
        for _ in range(2):
            with pytest.raises(CollectiveTimeoutError, match=r"1 steps were made .* call it on every rank"):
                optimizer.flush(timeout=0.5)
        assert_equal(values(variables), before)
    everybody(None)
    if given_up:
        apply(optimizer, variables, range(1, 3))
    else:
        optimizer.flush(timeout)
    assert_replicas_equal(variables)
    assert optimizer.communication_stats()["rounds"] == 1
    apply(optimizer, variables, [3])
    optimizer.flush(timeout=20)
    assert_replicas_equal(variables)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
def test_nan_is_the_same_error_everywhere_and_the_anchor_survives(exchange, traced):
    variables = make_variables()
    optimizer = wrap(period=2, compression=EDEN2, exchange=exchange, bucket_cap_mb=0.01)
    optimizer.build(variables)
    step = tf.function(optimizer.apply) if traced else optimizer.apply
    for number in range(3):
        step(list(map(tf.constant, gradients_of(number))))
    local, anchors = values(variables), values(optimizer._pqasgd_state.anchors)
    if hvd.rank() == 1:
        variables[2].assign(tf.fill(variables[2].shape, np.nan))
    text = assert_raises_everywhere("NonFiniteError", lambda: step([tf.zeros(v.shape) for v in variables]))
    assert "rank 1 had NaN" in text
    assert_equal(values(optimizer._pqasgd_state.anchors), anchors)
    assert_equal(values(variables[:2]), local[:2])
    for variable, value in zip(variables, local, strict=True):
        variable.assign(value)
    step([tf.zeros(v.shape) for v in variables])  # the average that is overdue
    assert_replicas_equal(variables)
    assert optimizer.communication_stats()["rounds"] == 2


@pytest.mark.parametrize("period", [1, 2])
def test_nan_may_be_propagated(period):
    variables = make_variables()
    optimizer = wrap(period=period, compression=EDEN2, nonfinite="propagate", small_tensor_threshold=0)

    def poisoned(step):
        gradients = gradients_of(step)
        if hvd.rank() == hvd.size() - 1:
            gradients[0][3, 4] = np.nan
        return gradients

    apply(optimizer, variables, range(period), poisoned)
    assert all(np.isnan(value).all() for value in values(variables))  # one bucket holds all of them


def test_nan_in_a_coded_gradient_in_fit():
    model = compiled(wrap(compression=EDEN4))
    fit(model, 2)
    before = weights(model)
    inputs, labels = examples(1, first=2)
    if hvd.rank() == 0:
        inputs[0, 0] = np.nan
    text = assert_raises_everywhere("NonFiniteError", lambda: model.fit(inputs, labels, batch_size=8, verbose=0))
    assert "rank 0 had NaN" in text
    assert_equal(weights(model), before)
    fit(model, 1, first=2)
    assert_replicas_equal(model)


def test_a_step_counter_that_one_rank_alone_has_restored():
    variables = make_variables()
    optimizer = wrap(compression=EDEN4)
    apply(optimizer, variables, range(2))
    before = values(variables)
    optimizer._pqasgd_state.steps.assign(2 + hvd.rank())
    text = assert_raises_everywhere("DesynchronizedError", lambda: apply(optimizer, variables, [2]))
    assert "step" in text
    assert_equal(values(variables), before)


@pytest.mark.parametrize("everywhere", [True, False], ids=["everywhere", "one-rank"])
def test_another_list_of_gradients(everywhere):
    variables = make_variables()
    optimizer = wrap(compression=EDEN4)
    apply(optimizer, variables, range(2))
    gradients = list(map(tf.constant, gradients_of(2)))
    if everywhere or hvd.rank() == 0:
        gradients[1] = None
    before = values(variables)
    kind = "ArgumentError" if everywhere else "DesynchronizedError"
    text = assert_raises_everywhere(kind, lambda: optimizer.apply_gradients(zip(gradients, variables, strict=True)))
    assert ("v1" if everywhere else "rank 0") in text
    assert_equal(values(variables), before)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_compressed_allreduce_of_other_tensors(traced):
    def call(tensor, name, **options):
        def reduce(value):
            return hvd.compressed_allreduce(value, name=name, **options)

        return (tf.function(reduce) if traced else reduce)(tensor)

    label = f"other.{traced}"
    text = assert_raises_everywhere("MismatchError", lambda: call(tf.zeros(5 + hvd.rank()), label))
    assert "tensor" in text
    assert "codec.bits" in assert_raises_everywhere(
        "MismatchError", lambda: call(tf.zeros(5), label, compression=hvd.Compression.eden(2 + hvd.rank() % 2))
    )
    call(tf.ones(5), label)
    # A rank that has seen such a tensor before, and one that has not.
    text = assert_raises_everywhere("DesynchronizedError", lambda: call(tf.zeros(5 if hvd.rank() else 7), label))
    assert "rank 0" in text
    assert len(set(everybody(float(tf.reduce_sum(call(tf.ones(5), label)))))) == 1


def test_broadcast_of_other_lists():
    variables = [tf.Variable(1.0, name="a"), *([tf.Variable(2.0, name="b")] if hvd.rank() else [])]
    text = assert_raises_everywhere("MismatchError", lambda: hvd.broadcast_variables(variables, root_rank=0))
    assert "variables" in text
    text = assert_raises_everywhere(
        "MismatchError", lambda: hvd.broadcast_variables(variables[:1], root_rank=hvd.rank())
    )
    assert "root_rank" in text


def test_a_replica_that_was_changed_behind_its_back_is_found():
    """The debug check, with a fault planted: one rank's anchor changes between averages."""
    variables = make_variables()
    optimizer = wrap(period=2)
    apply(optimizer, variables, range(3))
    anchor = optimizer._pqasgd_state.anchors[0]
    anchor.assign_add(tf.fill(anchor.shape, float(hvd.rank())))
    text = assert_raises_everywhere("MismatchError", lambda: apply(optimizer, variables, [3]))
    assert "replicas differ after an average" in text


class Doubled:
    """A compressor of the user's own, an object."""

    def compress(self, tensor):
        return tensor * 2, None

    def decompress(self, tensor, ctx):
        return tensor / 2


def test_a_compressor_made_anew_in_each_trace_is_refused_on_all_ranks():
    variables, kept = make_variables(), Doubled()

    def step(compression):
        with hvd.DistributedGradientTape(tf.GradientTape(), compression=compression) as tape:
            target = tf.add_n([tf.reduce_sum(v * v) for v in variables])
        return tape.gradient(target, variables)

    def anew():
        return step(Doubled())

    for _ in range(2):
        assert_replicas_equal(tf.function(step)(kept))
    text = assert_raises_everywhere("ArgumentError", tf.function(anew))
    assert "has to be made once, outside of the traced function" in text
