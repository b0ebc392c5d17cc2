"""Loops of one's own: ``tf.function``, plain variables, and ``DistributedGradientTape``."""

from __future__ import annotations

import functools
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import pqasgd_horovod.tensorflow as hvd
from pqasgd_horovod import codecs
from pqasgd_horovod.averaging import ExchangeConfig, GradientAverager
from pqasgd_horovod.averaging.tables import SparseSpec
from pqasgd_horovod.averaging.vector import ArrayView
from pqasgd_horovod.errors import ArgumentError
from pqasgd_horovod.exchange.rows import Rows, Table, payload_nbytes
from pqasgd_horovod.keys import derive_key
from tests.averaging.arrays import decoded_mean
from tests.ranks_tensorflow.common import (
    EDEN2,
    EDEN4,
    SHAPES,
    apply,
    assert_equal,
    assert_raises_everywhere,
    assert_replicas_equal,
    differ,
    everybody,
    gradients_of,
    make_model,
    make_variables,
    several_ranks,
    start,
    values,
    wrap,
)


def parts(step):
    return list(map(tf.constant, gradients_of(step)))


@pytest.mark.parametrize("options", [{"period": 3}, {"period": 3, "exchange": "two_phase"}, {}], ids=str)
def test_eager_and_traced_steps_give_the_same_bits_and_nothing_is_traced_again(options):
    eager, traced = make_variables(), make_variables()
    for variables in (eager, traced):
        optimizer = wrap(keras.optimizers.Adam(0.1), compression=EDEN2, seed=5, bucket_cap_mb=0.01, **options)
        if variables is eager:
            apply(optimizer, variables, range(8))
        else:
            optimizer.build(variables)
            step = tf.function(optimizer.apply)
            for number in range(8):
                step(parts(number))
            assert step.experimental_get_tracing_count() == 1
        optimizer.flush()
        assert optimizer.communication_stats()["rounds"] == (3 if options else 8)
    assert_equal(values(eager), values(traced))
    assert_replicas_equal(traced)


def test_many_steps_in_one_graph():
    """A loop in TensorFlow, averages in the middle of it."""
    inside, outside = make_variables(), make_variables()
    optimizer = wrap(period=3, compression=EDEN2)
    optimizer.build(inside)

    @tf.function
    def loop(count):
        for _ in tf.range(count):
            optimizer.apply([tf.ones_like(v) * float(1 + hvd.rank()) for v in inside])

    loop(tf.constant(7))
    other = wrap(period=3, compression=EDEN2)
    constant = [tf.fill(shape, 1.0 + hvd.rank()) for shape in SHAPES]
    apply(other, outside, range(7), lambda _: constant)
    assert optimizer.communication_stats()["rounds"] == 2
    assert_equal(values(inside), values(outside))


def gradients_by_tape(tape, variables, step, sources=None):
    """Sums of products with given gradients, so that the gradients are those, exactly."""
    with tape:
        targets = [tf.reduce_sum(v * g) for v, g in zip(map(value_of, variables), parts(step), strict=True)]
        target = tf.add_n(targets)
    return tape.gradient(target, variables if sources is None else sources)


def value_of(variable):
    return variable.value if isinstance(variable, keras.Variable) else variable


def exact(step, op):
    """The mean over ranks as Horovod takes it: a sum in float32, times 1/n. Another order of the ranks is allowed."""
    gradients = [gradients_of(step, rank) for rank in range(hvd.size())]
    return [np.sum(each, axis=0) / (hvd.size() if op == hvd.Average else 1) for each in zip(*gradients, strict=True)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"op": hvd.Sum},
        {"gradient_predivide_factor": 2.0},
        {"num_groups": 2},
        {"compression": hvd.Compression.fp16},
        {"compression": hvd.Compression.bf16, "op": hvd.Sum},
    ],
    ids=str,
)
def test_a_tape_without_loss_gives_the_mean_by_hand(options):
    for variables in (make_variables(), [keras.Variable(value) for value in start()]):
        gradients = gradients_by_tape(hvd.DistributedGradientTape(tf.GradientTape(), **options), variables, 0)
        # Sums of numbers below 4, each rounded to float32; fp16 and bf16 keep 11 and 8 bits.
        kept = {"fp16": 11, "bf16": 8}[options["compression"].codec.id] if "compression" in options else 22
        for ours, theirs in zip(gradients, exact(0, options.get("op", hvd.Average)), strict=True):
            np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=4 * hvd.size() * 2.0**-kept)
        assert_replicas_equal(gradients)


def test_groups_of_variables():
    variables = make_variables()
    for options in ({"groups": [variables[:2]]}, {"groups": 3}):
        tape = hvd.DistributedGradientTape(tf.GradientTape(), **options)
        for ours, theirs in zip(gradients_by_tape(tape, variables, 0), exact(0, hvd.Average), strict=True):
            np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=hvd.size() * 2.0**-21)
        replica = make_variables()
        options = {"groups": [replica[:2]]} if isinstance(options["groups"], list) else options
        apply(wrap(**options), replica, range(2))
        assert_replicas_equal(replica)


@several_ranks
@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum], ids=["mean", "sum"])
def test_a_coded_tape_gives_the_decoded_mean_by_the_specification(op):
    variables = make_variables()
    options = {"compression": EDEN2, "op": op, "seed": 11 + (op == hvd.Sum), "exchange": "allgather"}
    large = [i for i, shape in enumerate(SHAPES) if np.prod(shape) >= 1024]
    config = ExchangeConfig(codecs.eden(bits=2))
    for step in range(3):
        gradients = gradients_by_tape(hvd.DistributedGradientTape(tf.GradientTape(), **options), variables, step)
        flat = [np.concatenate([gradients_of(step, rank)[i].ravel() for i in large]) for rank in range(hvd.size())]
        keys = [derive_key(options["seed"], rank, step, 0, 0) for rank in range(hvd.size())]
        mean = decoded_mean(flat, None, config, keys) * np.float32(hvd.size() if op == hvd.Sum else 1)
        np.testing.assert_array_equal(np.concatenate([gradients[i].numpy().ravel() for i in large]), mean)
        assert_replicas_equal(gradients)


@several_ranks
def test_votes():
    """In a graph as elsewhere: the two-phase exchange, and the sign of the sum of all ranks' signs."""
    variables = make_variables()
    votes = {"compression": hvd.Compression.signsgd(majority_vote=True), "small_tensor_threshold": 0}
    for step in range(3):
        gradients = gradients_by_tape(hvd.DistributedGradientTape(tf.GradientTape(), **votes), variables, step)
        for i, gradient in enumerate(gradients):
            total = sum(np.where(gradients_of(step, rank)[i] < 0, -1, 1) for rank in range(hvd.size()))
            np.testing.assert_array_equal(gradient.numpy(), np.where(total < 0, np.float32(-1), np.float32(1)))
    with pytest.raises(ArgumentError, match="exchange is 'allgather' with compression=SignSgd"):
        wrap(**votes, exchange="allgather")
    with pytest.raises(ArgumentError, match="is for gradients, period=1"):
        wrap(**votes, period=4)


def test_a_tape_in_a_function_is_traced_once():
    model = make_model()
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(inputs):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(inputs) ** 2)
        tape = hvd.DistributedGradientTape(tape, compression=EDEN4)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    for number in range(6):
        step(tf.constant(np.random.default_rng([number, hvd.rank()]).standard_normal((8, 30)), tf.float32))
    assert step.experimental_get_tracing_count() == 1
    assert_replicas_equal(model)
    tape = hvd.DistributedGradientTape(tf.GradientTape(), compression=EDEN4)
    assert callable(tape.communication_stats)


@pytest.mark.parametrize("compression", [hvd.Compression.none, EDEN4], ids=str)
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_sparse_gradients(compression, dense):
    table = keras.Variable(np.zeros((50, 30), np.float32), name=f"table.{dense}.{compression.codec.id}")
    other = keras.Variable(np.ones((40, 30), np.float32), name=f"other.{dense}.{compression.codec.id}")
    rows = [1 + hvd.rank(), 7, 7]
    tape = hvd.DistributedGradientTape(tf.GradientTape(), compression=compression, sparse_as_dense=dense)
    with tape:
        looked_up = tf.gather(table.value, rows)
        target = tf.reduce_sum(looked_up) * (1.0 + hvd.rank()) + tf.reduce_sum(other.value) * float(hvd.rank())
    gradient, whole = tape.gradient(target, [table, other])
    assert isinstance(gradient, tf.IndexedSlices) != dense
    expected = np.zeros((50, 30), np.float32)
    for rank in range(hvd.size()):
        for row in (1 + rank, 7, 7):
            expected[row] += (1.0 + rank) / hvd.size()
    gradient = tf.convert_to_tensor(gradient).numpy()
    if compression is EDEN4 and hvd.size() > 1:
        assert np.linalg.norm(gradient - expected) < 0.2 * np.linalg.norm(expected)  # 4 bits: q = 0.0096
    else:
        np.testing.assert_allclose(gradient, expected, rtol=2.0**-22)
    assert not differ([gradient, whole.numpy()])


def test_sparse_gradients_in_an_optimizer():
    table = keras.Variable(np.zeros((50, 30), np.float32), name="table")
    optimizer = wrap(keras.optimizers.SGD(1.0), compression=EDEN4)
    slices = tf.IndexedSlices(tf.ones([3, 30]), tf.constant([9, hvd.rank(), 9]), tf.constant([50, 30]))
    optimizer.apply([slices], [table])
    expected = np.zeros((50, 30), np.float32)
    for rank in range(hvd.size()):
        expected[rank] -= np.float32(1 / hvd.size())
        expected[9] -= np.float32(2 / hvd.size())
    error = np.linalg.norm(table.numpy() - expected)
    assert error < 0.2 * np.linalg.norm(expected)
    assert (error > 1e-3) == (hvd.size() > 1)
    stats = optimizer.communication_stats()
    own = 64 + payload_nbytes(EDEN4.codec, Table(50, 30))(2 * 30)  # row 9 once
    assert stats["bytes_sent"] == stats["bytes_received"] == (hvd.size() - 1) * own


@several_ranks
def test_sparse_gradients_have_the_bits_of_the_core():
    """With feedback, and a dense gradient beside them; a rank's NaN leaves what it kept."""
    options = {"feedback": hvd.Feedback(), "nonfinite": "propagate"}
    topk = hvd.Compression.topk(0.1, block_size=64)
    averager = GradientAverager(hvd.HorovodCarrier(), ExchangeConfig(topk.codec, **options), name="core.rows")
    view = ArrayView("dense", np.zeros(3000, np.float32))
    averager.prepare([view], [SparseSpec("words", (50, 4, 10), "")])
    words, dense = tf.Variable(tf.zeros([50, 4, 10]), name="words"), tf.Variable(tf.zeros([3000]), name="dense")

    @tf.function
    def step(rows, weights, gradient):
        with hvd.DistributedGradientTape(tf.GradientTape(), compression=topk, **options) as tape:
            loss = tf.reduce_sum(tf.gather(words, rows) * weights) + tf.reduce_sum(dense * gradient)
        return tape.gradient(loss, [words, dense])

    for count in range(5):
        generator = np.random.default_rng([count, hvd.rank()])
        rows = generator.permutation(50)[: 4 + hvd.rank()].astype(np.int64)
        weights = generator.standard_normal((rows.size, 4, 10)).astype(np.float32)
        given = generator.standard_normal(3000).astype(np.float32)
        if count == 3 and hvd.rank() == 0:
            weights[0, 0, 0] = np.nan
        view.array[:] = given
        order = np.argsort(rows)
        averager.ready_rows("words", functools.partial(Rows, rows[order], weights[order].reshape(-1, 40)))
        expected = averager.finish()["words"]
        slices, mean = step(tf.constant(rows), tf.constant(weights), tf.constant(given))
        assert_equal(
            values([slices.indices, tf.reshape(slices.values, [-1, 40]), mean]),
            [expected.numbers, expected.values, view.array],
        )
        assert np.isnan(expected.values).all() == (count == 3)


@several_ranks
def test_a_rank_s_nan_in_a_sparse_gradient_is_one_error_and_training_goes_on():
    table = keras.Variable(np.zeros((50, 30), np.float32), name="words")
    optimizer = wrap(keras.optimizers.SGD(1.0), compression=EDEN4)

    def apply_rows(number):
        values = tf.fill([1, 30], np.float32(np.nan if hvd.rank() == 1 and number == 1 else 1))
        optimizer.apply([tf.IndexedSlices(values, tf.constant([number]), tf.constant([50, 30]))], [table])

    apply_rows(0)
    text = assert_raises_everywhere("NonFiniteError", lambda: apply_rows(1))
    assert "rank 1 had NaN, Inf or a number beyond the codec's range in the rows of 'words'" in text
    apply_rows(2)
    assert (np.abs(table.numpy()).sum(axis=1) > 0).tolist() == [True, False, True, *[False] * 47]
    assert not differ([table.numpy()])


@pytest.mark.parametrize("clip", [{"clipnorm": 2.0}, {"global_clipnorm": 2.0}, {"clipvalue": 0.01}], ids=str)
def test_keras_clips_the_mean_of_coded_gradients_and_its_own_gradients_between_averages(clip):
    gradients = list(map(tf.constant, gradients_of(0)))

    def moved(optimizer):
        variables = make_variables()
        before = values(variables)
        optimizer.apply(gradients, variables)
        return [old - new for old, new in zip(before, values(variables), strict=True)]

    means = moved(wrap(keras.optimizers.SGD(1.0), compression=EDEN4, exchange="allgather"))
    if "clipvalue" in clip:
        expected = [np.clip(mean, -0.01, 0.01) for mean in means]
    elif "clipnorm" in clip:
        expected = [mean * min(1.0, 2.0 / np.linalg.norm(mean)) for mean in means]
    else:
        expected = [mean * (2.0 / np.sqrt(sum(np.sum(m**2) for m in means))) for mean in means]
    clipped = moved(wrap(keras.optimizers.SGD(1.0, **clip), compression=EDEN4, exchange="allgather"))
    for mine, wanted in zip(clipped, expected, strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=0, atol=2e-6)  # a few roundings of variables below 8
    local = moved(wrap(keras.optimizers.SGD(1.0, **clip), compression=EDEN4, period=2))
    assert_equal(local, moved(keras.optimizers.SGD(1.0, **clip)))


def test_a_persistent_tape():
    variables = make_variables()
    tape = hvd.DistributedGradientTape(tf.GradientTape(persistent=True), compression=EDEN4)
    with tape:
        one = tf.add_n([tf.reduce_sum(v) for v in variables]) * (1.0 + hvd.rank())
        two = one * 2.0
    first, second = tape.gradient(one, variables), tape.gradient(two, variables[0])
    assert isinstance(second, tf.Tensor)
    assert_replicas_equal([*first, second])
    expected = (hvd.size() + 1) / 2
    # Constant numbers lie on one level of the code after the rotation or near it.
    assert float(tf.reduce_mean(second)) == pytest.approx(2 * expected, rel=0.05)
    assert tape.watched_variables()


def test_a_local_source():
    variables = make_variables()
    tape = hvd.DistributedGradientTape(tf.GradientTape(), compression=EDEN4)
    tape.register_local_source(variables[1])
    gradients = gradients_by_tape(tape, variables, 0)
    np.testing.assert_array_equal(gradients[1].numpy(), gradients_of(0)[1] * np.float32(1 / hvd.size()))
    assert not differ(values(gradients[:1] + gradients[2:]))
    tape = hvd.DistributedGradientTape(tf.GradientTape(), compression=EDEN4, scale_local_gradients=False)
    tape.register_local_source(variables[1])
    np.testing.assert_array_equal(gradients_by_tape(tape, variables, 0)[1].numpy(), gradients_of(0)[1])


def test_layers_that_stay_local():
    keras.utils.set_random_seed(3)
    shared, local = keras.layers.Dense(50), keras.layers.Dense(2)
    inputs = tf.constant(np.random.default_rng(hvd.rank()).standard_normal((4, 30)).astype(np.float32))
    tape = hvd.PartialDistributedGradientTape(
        tf.GradientTape(), compression=EDEN4, local_layers=local, scale_local_gradients=False
    )
    with tape, tf.GradientTape() as plain:
        target = tf.reduce_sum(local(shared(inputs)) ** 2)
    sources = [*shared.trainable_weights, *local.trainable_weights]
    gradients = tape.gradient(target, sources)
    own = plain.gradient(target, [source.value for source in sources])
    assert not differ(values(gradients[:2]))
    for gradient, expected in zip(gradients[2:], own[2:], strict=True):
        np.testing.assert_array_equal(gradient.numpy(), expected.numpy())
    with pytest.raises(ArgumentError, match="local_layers has 3; it must be Keras layers"):
        hvd.PartialDistributedGradientTape(tf.GradientTape(), local_layers=[3])


def test_two_lists_of_variables_in_one_program():
    """All of them have the same names, as variables have that were given none."""
    one, two, three = ([tf.Variable(tf.ones(shape)) for shape in shapes] for shapes in ([2000, 3], [1500, 3], [2000]))
    for _ in range(2):
        for variables in (one, two, three):
            tape = hvd.DistributedGradientTape(tf.GradientTape(), compression=EDEN4)
            with tape:
                target = tf.add_n([tf.reduce_sum(v * v) for v in variables]) * (1.0 + hvd.rank())
            for variable, gradient in zip(variables, tape.gradient(target, variables), strict=True):
                variable.assign_sub(0.1 * gradient)
    assert_replicas_equal([*one, *two, *three])


@pytest.mark.parametrize("compression", [EDEN4, hvd.Compression.none], ids=["coded", "none"])
def test_several_averages_in_one_graph(compression):
    """Two tapes, of which one is persistent and averages the same variables again; one rank runs some steps eagerly."""
    one, two = make_variables()[:2], make_variables()[2:]

    def step():
        with tf.GradientTape(persistent=True) as inner, tf.GradientTape() as other:
            targets = [
                tf.add_n([tf.reduce_sum(v * v) for v in variables]) * (1.0 + hvd.rank()) for variables in (one, two)
            ]
        tape = hvd.DistributedGradientTape(inner, compression=compression)
        other = hvd.DistributedGradientTape(other, compression=compression)
        gradients = [tape.gradient(targets[0], one) for _ in range(3)]
        return [*gradients, other.gradient(targets[1], two)]

    traced = tf.function(step)
    for number in range(6):
        for gradients in (step if number % 2 and hvd.rank() == 0 else traced)():
            assert_replicas_equal(gradients)
    for gradient, variable in zip(step()[0], one, strict=True):
        expected = (1.0 + hvd.size()) * variable.numpy()
        error = np.linalg.norm(gradient.numpy() - expected) / np.linalg.norm(expected)
        assert error < (0.2 if compression is EDEN4 else 1e-6)  # 4 bits: q = 0.0096


@pytest.mark.parametrize("compression", [EDEN4, hvd.Compression.none], ids=["coded", "none"])
def test_a_batch_of_another_size_on_one_rank_traces_anew_and_is_averaged(compression):
    model = make_model()

    @tf.function
    def step(inputs):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(inputs) ** 2)
        return hvd.DistributedGradientTape(tape, compression=compression).gradient(loss, model.trainable_variables)

    for number in range(3):
        inputs = np.random.default_rng([number, hvd.rank()]).standard_normal((8, 30))[
            : 5 if number and hvd.rank() == 0 else 8
        ]
        assert_replicas_equal(step(tf.constant(inputs, tf.float32)))
    assert step.experimental_get_tracing_count() == 1 + (hvd.rank() == 0)


@pytest.mark.parametrize("options", [{}, {"compression": EDEN4, "period": 2}], ids=["stock", "period2"])
def test_autograph_rewrites_the_function_of_the_user_and_nothing_that_we_have_written(options):
    """It would follow every call, into ``json`` and threads, for minutes, while the other ranks wait."""
    variables, optimizer = make_variables(), wrap(**options)
    rewritten = set()

    def step():
        with hvd.DistributedGradientTape(tf.GradientTape(), seed=99, compression=EDEN4) as tape:
            target = tf.add_n([tf.reduce_sum(v * v) for v in variables])
        hvd.compressed_allreduce(target, name=f"rewritten.{len(options)}")
        optimizer.apply(tape.gradient(target, variables), variables)

    def watch(frame, event, argument):
        if "__autograph_generated_file" in frame.f_code.co_filename:
            rewritten.add(frame.f_code.co_name)

    sys.setprofile(watch)
    try:
        tf.function(step)()
    finally:
        sys.setprofile(None)
    assert "tf__step" in rewritten
    assert not rewritten & {"tf__describe_variables", "tf__verify_same", "tf__tell", "tf__plan_channel", "tf____init__"}


def test_sources_keep_their_structure_and_none_stays_none():
    variables = make_variables()
    tape = hvd.DistributedGradientTape(tf.GradientTape(), compression=EDEN4)
    with tape:
        target = tf.reduce_sum(variables[0])
    found = tape.gradient(target, {"a": variables[0], "b": [variables[1]]})
    assert found["a"].shape == SHAPES[0]
    assert found["b"] == [None]
    tape = hvd.DistributedGradientTape(tf.GradientTape(), compression=EDEN4)
    with tape:
        target = tf.constant(1.0)
    with pytest.raises(ArgumentError, match="gradients are all None"):
        tape.gradient(target, variables[2:])


def test_the_optimizer_of_the_tensorflow_module_takes_the_same_options():
    variables = make_variables()
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(0.5), compression=EDEN2, check_consistency=True,
        averaging=hvd.PeriodicAveraging(period=2, buffers="local"),
    )  # fmt: skip
    twin, other = make_variables(), wrap(period=2, compression=EDEN2)
    apply(optimizer, variables, range(4))
    apply(other, twin, range(4))
    assert_equal(values(variables), values(twin))
    assert len(set(everybody(int(optimizer.iterations)))) == 1
