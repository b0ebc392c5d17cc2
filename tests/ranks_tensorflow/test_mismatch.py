"""Ranks that were given different things, or do different things: the same error on all of them, within seconds."""

from __future__ import annotations

import re
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import pqasgd_horovod.tensorflow as hvd
from pqasgd_horovod.errors import ArgumentError, CollectiveTimeoutError, MismatchError
from pqasgd_horovod.tensorflow import optimizer as pqasgd_optimizer
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
    refuse_again(optimizer, make_variables())


class Short(keras.optimizers.SGD):
    """Rank 0 has no memory for Keras' own variables."""

    def build(self, variables):
        super().build(variables)
        if hvd.rank() == 0:
            raise MemoryError("planted")


def no_counter(name):
    raise MemoryError("planted")


def refuse_again(optimizer, variables):
    text = assert_raises_everywhere("ArgumentError", lambda: apply(optimizer, variables, [0]))
    assert text.startswith("ArgumentError: the optimizer could not be built, for MismatchError: ")
    assert text.endswith("make another one, on every rank")


PERIODS = pytest.mark.parametrize(
    "options", [{"period": 3}, {"compression": EDEN4}, {}], ids=["period3", "coded", "stock"]
)


@PERIODS
def test_a_rank_alone_that_cannot_build_and_a_second_try(options):
    variables, optimizer = make_variables(), wrap(Short(0.1), **options)
    text = assert_raises_everywhere("MismatchError", lambda: apply(optimizer, variables, [0]))
    assert "MemoryError: planted" in text
    refuse_again(optimizer, variables)
    with pytest.raises(ArgumentError, match="make another one"):
        optimizer.apply(list(map(tf.constant, gradients_of(0))))
    with pytest.raises(ArgumentError, match=r"make another one|where Horovod averages"):
        optimizer.join()


@PERIODS
def test_likewise_in_fit(options):
    model = compiled(wrap(Short(0.1), **options))
    assert "MemoryError: planted" in assert_raises_everywhere("MismatchError", lambda: fit(model, 1))
    assert "make another one" in assert_raises_everywhere("ArgumentError", lambda: fit(model, 1))


@PERIODS
def test_likewise_without_memory_for_sums(options, monkeypatch):
    variables, optimizer = make_variables(), wrap(backward_passes_per_step=2, **options)
    if hvd.rank() == 0:
        monkeypatch.setattr(pqasgd_optimizer, "counter", no_counter)
    text = assert_raises_everywhere("MismatchError", lambda: apply(optimizer, variables, range(2)))
    assert "MemoryError: planted" in text
    monkeypatch.undo()
    refuse_again(optimizer, variables)


@PERIODS
def test_likewise_with_a_policy_for_other_variables(options):
    policy = {"policy": [("v0*", hvd.Compression.none)]}
    variables, optimizer = make_variables(), wrap(**policy, **options)
    first = variables[1:] if hvd.rank() == 0 else variables
    shapes = [tuple(v.shape) for v in first]
    text = assert_raises_everywhere(
        "MismatchError", lambda: apply(optimizer, first, [0], lambda step: gradients_of(step, shapes=shapes))
    )
    assert "'v0*' matches none of the parameters" in text
    refuse_again(optimizer, variables)


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


AVERAGERS = pytest.mark.parametrize(
    "options",
    [{"compression": EDEN4}, {}, {"compression": hvd.Compression.fp16}, {"num_groups": 2}],
    ids=["coded", "none", "fp16", "groups"],
)
TRACED = pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])


@AVERAGERS
@TRACED
@pytest.mark.parametrize("everywhere", [True, False], ids=["everywhere", "one-rank"])
def test_another_list_of_gradients(options, traced, everywhere):
    variables = make_variables()
    optimizer = wrap(**options)
    optimizer.build(variables)
    step = tf.function(optimizer.apply) if traced else optimizer.apply
    for number in range(2):
        step(list(map(tf.constant, gradients_of(number))))
    gradients = list(map(tf.constant, gradients_of(2)))
    if everywhere or hvd.rank() == 0:
        gradients[1] = None
    before = values(variables)
    kind = "ArgumentError" if everywhere else "DesynchronizedError"
    text = assert_raises_everywhere(kind, lambda: step(gradients))
    assert ("v1" if everywhere else "laying out its tensors after 2 steps and 2 averages on rank 0") in text
    assert_equal(values(variables), before)
    step(list(map(tf.constant, gradients_of(2))))
    assert_replicas_equal(variables)


@AVERAGERS
def test_a_layer_that_one_rank_freezes_between_two_fits(options):
    model = compiled(wrap(**options))
    fit(model, 2)
    if hvd.rank() == 0:
        model.layers[1].trainable = False
        model.make_train_function(force=True)
    before = weights(model)
    text = assert_raises_everywhere("DesynchronizedError", lambda: fit(model, 2))
    assert "rank 0" in text
    assert_equal(weights(model), before)


@AVERAGERS
def test_a_variable_that_one_rank_cannot_average_any_more(options):
    variables = make_variables()
    optimizer = wrap(**options)
    apply(optimizer, variables, range(2))
    if hvd.rank() == 0:
        variables[1] = tf.Variable(tf.ones([60], tf.complex64))
    before = values(variables)
    averager = optimizer._pqasgd_averager.value
    gradients = list(map(tf.constant, gradients_of(2)))
    text = assert_raises_everywhere("DesynchronizedError", lambda: averager.average(gradients, variables))
    assert "rank 0" in text
    assert_equal(values(variables), before)


@AVERAGERS
def test_no_gradient_at_all_on_one_rank(options):
    variables = make_variables()
    optimizer = wrap(**options)
    gradients = [None] * 4 if hvd.rank() == 0 else list(map(tf.constant, gradients_of(0)))
    averager = optimizer._pqasgd_averager.value
    text = assert_raises_everywhere("MismatchError", lambda: averager.average(gradients, variables))
    assert "gradients are all None" in text


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 1 + (hvd.rank() == 0)},
        {"groups": 2 * (hvd.rank() == 0)},
        {"gradient_predivide_factor": 1.0 + (hvd.rank() == 0)},
    ],
    ids=["numbers", "none", "factor"],
)
def test_settings_of_horovods_average(options):
    variables = make_variables()
    text = assert_raises_everywhere("MismatchError", lambda: apply(wrap(**options), variables, [0]))
    assert next(iter(options)) in text


class Fails(Exception):
    """Planted."""


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("optimizer", {"compression": EDEN4}),
        ("optimizer", {}),
        ("optimizer", {"compression": EDEN4, "period": 3}),
        ("tape", {"compression": EDEN4}),
        ("tape", {}),
    ],
    ids=["coded", "none", "period3", "coded-tape", "none-tape"],
)
def test_a_step_that_fails_on_one_rank_alone_is_no_step(options, kind):
    """Its input is not there, after everything that does not depend on it has run."""
    model = make_model()
    optimizer = wrap(keras.optimizers.SGD(0.1), **options) if kind == "optimizer" else keras.optimizers.SGD(0.1)
    optimizer.build(model.trainable_variables)
    broken = tf.Variable(0)

    def late(inputs, fails):
        time.sleep(0.5 * bool(fails))
        if fails:
            raise Fails
        return inputs

    @tf.function
    def step(inputs):
        inputs = tf.ensure_shape(tf.numpy_function(late, [inputs, broken], tf.float32), [8, 30])
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(inputs) ** 2)
        if kind == "tape":
            tape = hvd.DistributedGradientTape(tape, **options)
        optimizer.apply(tape.gradient(loss, [v.value for v in model.trainable_variables]), model.trainable_variables)

    for number in range(6):
        inputs = tf.constant(examples(1, first=number)[0])
        if hvd.rank() == 0 and number in (1, 4):
            broken.assign(1)
            with pytest.raises(tf.errors.OpError, match="Fails"):
                step(inputs)
            broken.assign(0)
        step(inputs)
    assert_replicas_equal(model)


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
    # An argument that one rank gets wrong, where the others know such a tensor, and where they do not.
    wrong = {"op": hvd.Adasum} if hvd.rank() == 0 else {}
    assert_raises_everywhere("DesynchronizedError", lambda: call(tf.zeros(5), label, **wrong))
    assert "op is" in assert_raises_everywhere("MismatchError", lambda: call(tf.zeros(8), label, **wrong))
    assert len(set(everybody(float(tf.reduce_sum(call(tf.ones(5), label)))))) == 1


def test_broadcast_of_other_lists():
    variables = [tf.Variable(1.0, name="a"), *([tf.Variable(2.0, name="b")] if hvd.rank() else [])]
    text = assert_raises_everywhere("MismatchError", lambda: hvd.broadcast_variables(variables, root_rank=0))
    assert "variables" in text
    text = assert_raises_everywhere(
        "MismatchError", lambda: hvd.broadcast_variables(variables[:1], root_rank=hvd.rank())
    )
    assert "root_rank" in text
    mine = [] if hvd.rank() else variables[:1]
    assert "variables" in assert_raises_everywhere("MismatchError", lambda: hvd.broadcast_variables(mine, root_rank=0))
    text = assert_raises_everywhere(
        "ArgumentError", lambda: hvd.broadcast_variables(variables[:1], root_rank=hvd.size())
    )
    assert re.search(r"root_rank is \d; it must be one of the ranks \[0, 1", text)


def test_a_replica_that_was_changed_behind_its_back_is_found():
    """The debug check, with a fault planted: one rank's anchor changes between averages."""
    variables = make_variables()
    optimizer = wrap(period=2)
    apply(optimizer, variables, range(3))
    anchor = optimizer._pqasgd_state.anchors[0]
    anchor.assign_add(tf.fill(anchor.shape, float(hvd.rank())))
    text = assert_raises_everywhere("MismatchError", lambda: apply(optimizer, variables, [3]))
    assert "replicas differ after an average" in text


TAPES = pytest.mark.parametrize(
    "options", [{"compression": EDEN4}, {}, {"compression": hvd.Compression.fp16}], ids=["coded", "none", "fp16"]
)


def step_by_tape(traced, **options):
    """A function that computes gradients of sums of squares, and averages them."""

    def step(variables):
        with hvd.DistributedGradientTape(tf.GradientTape(), **options) as tape:
            target = tf.add_n([tf.reduce_sum(tf.math.real(v * v)) for v in variables]) * (1.0 + hvd.rank())
        return tape.gradient(target, variables)

    return tf.function(step) if traced else step


@TAPES
@TRACED
def test_a_tape_meets_new_variables_on_one_rank_only(options, traced):
    variables = make_variables()
    step = step_by_tape(traced, seed=1 + traced, **options)  # tapes of other tests have other seeds
    for _ in range(2):
        assert_replicas_equal(step(variables))
    mine = variables[:3] if hvd.rank() == 0 else variables
    for _ in range(2):
        text = assert_raises_everywhere("DesynchronizedError", lambda: step(mine))
        assert re.search(r"a new list on rank 0; averaging list \d+ after \d+ averages of it on rank", text)
        assert re.search(r'sources\.v3:0: it is absent on rank 0; "float32 \[40, 5\] dense" on rank', text)
    assert_replicas_equal(step(variables))
    assert_replicas_equal(step(variables[:3]))


@TAPES
@TRACED
def test_tapes_of_variables_that_all_ranks_know_in_another_order(options, traced):
    lists = make_variables()[:2], make_variables()[2:]
    step = step_by_tape(traced, **options)

    def both(order):
        return [gradient for variables in lists[::order] for gradient in step(variables)]

    both = tf.function(both) if traced else both
    assert_replicas_equal(both(1))
    text = assert_raises_everywhere("DesynchronizedError", lambda: both(-1 if hvd.rank() else 1))
    assert re.search(r"averaging list \d+ after .* on rank 0; averaging list \d+ after .* on rank", text)
    assert "sources.v0:0: it is " in text
    assert_replicas_equal(both(-1))


@TRACED
def test_new_variables_that_are_not_the_same_ones(traced):
    variables = make_variables()
    step = step_by_tape(traced, seed=3)
    text = assert_raises_everywhere("MismatchError", lambda: step(variables[:3] if hvd.rank() == 0 else variables))
    assert "sources.v3:0: it is absent on rank 0" in text


def undecided(name, shape):
    if hvd.rank() == 0:
        raise OSError("planted")
    return True


@pytest.mark.parametrize("first", [True, False], ids=["at-first", "later"])
@pytest.mark.parametrize(
    ("wrong", "text", "traced"),
    [
        ({"op": hvd.Adasum}, "ArgumentError: op is", True),
        ({"policy": [(undecided, hvd.Compression.none)]}, "OSError: planted", False),
    ],
    ids=["argument", "policy"],
)
def test_a_tape_that_only_one_rank_gets_wrong(wrong, text, first, traced):
    variables = make_variables()
    options = {"compression": EDEN4, "seed": 5 + 2 * traced + first}
    if not first:
        step_by_tape(traced, **options)(variables)
    step = step_by_tape(traced, **options, **(wrong if hvd.rank() == 0 else {}))
    told = assert_raises_everywhere("MismatchError" if first else "DesynchronizedError", lambda: step(variables))
    assert text in told
    assert_replicas_equal(step_by_tape(traced, **options)(variables))


@TAPES
@pytest.mark.parametrize("first", [True, False], ids=["at-first", "later"])
def test_a_source_that_one_rank_cannot_average(options, first):
    variables = make_variables()
    step = step_by_tape(False, seed=4, **options)
    if not first:
        step(variables)
    if hvd.rank() == 0:
        variables[1] = tf.Variable(tf.ones([3], tf.complex64), name="v1")
    if first:
        assert "has dtype complex64" in assert_raises_everywhere("MismatchError", lambda: step(variables))
    else:
        text = assert_raises_everywhere("DesynchronizedError", lambda: step(variables))
        assert "raising an error on rank 0" in text
        assert "has dtype complex64" in text


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
    calls = tf.function(anew) if hvd.rank() == 0 else lambda: tf.function(step)(kept)
    text = assert_raises_everywhere("DesynchronizedError", calls)
    assert "has to be made once, outside of the traced function" in text
