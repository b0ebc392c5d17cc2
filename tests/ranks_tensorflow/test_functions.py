"""compressed_allreduce, broadcast_variables, the carrier, and sets of ranks."""

from __future__ import annotations

import horovod.tensorflow as horovod
import keras
import numpy as np
import pytest
import tensorflow as tf

import pqasgd_horovod.tensorflow as hvd
from pqasgd_horovod.errors import ArgumentError, CollectiveTimeoutError, MismatchError
from tests.ranks_tensorflow.common import (
    EDEN2,
    apply,
    assert_equal,
    assert_raises_everywhere,
    assert_replicas_equal,
    everybody,
    gradients_of,
    make_variables,
    several_ranks,
    start,
    values,
    wrap,
)

COMPRESSIONS = [
    hvd.Compression.none,
    hvd.Compression.fp16,
    hvd.Compression.bf16,
    hvd.Compression.quantize(bits=3),
    hvd.Compression.qsgd(bits=8),
    hvd.Compression.terngrad(),
    hvd.Compression.natural(),
    hvd.Compression.signsgd(),
    hvd.Compression.onebit(block_size=512),
    hvd.Compression.topk(density=0.1, values=hvd.Compression.eden(bits=4)),
    hvd.Compression.randomk(density=0.5),
]


def numbers(rank=None):
    generator = np.random.default_rng(hvd.rank() if rank is None else rank)
    return generator.standard_normal((50, 60)).astype(np.float32)


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=str)
@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
def test_allreduce_eager_and_traced(compression, exchange):
    def reduce(tensor, name):
        return hvd.compressed_allreduce(tensor, compression, name, exchange=exchange)

    tensor = tf.constant(numbers())
    mean = reduce(tensor, "eager").numpy()
    traced = tf.function(lambda tensor: reduce(tensor, "traced"))
    assert_equal([traced(tensor).numpy()], [mean])
    second = traced(tensor).numpy()
    assert traced.experimental_get_tracing_count() == 1
    np.testing.assert_array_equal(tensor.numpy(), numbers())
    assert_replicas_equal([tf.constant(mean), tf.constant(second)])
    exact = np.mean([numbers(rank) for rank in range(hvd.size())], axis=0, dtype=np.float64)
    if hvd.size() == 1 or compression == hvd.Compression.none:
        np.testing.assert_allclose(mean, exact, rtol=0, atol=4 * hvd.size() * 2.0**-24)
    else:
        # Twice the noise of one rank's numbers at two bits or three levels, q = 1.6, is below this.
        assert np.linalg.norm(mean - exact) < 2 * np.linalg.norm(numbers())
        # Each call draws noise of its own, and casts and signs draw none.
        assert np.array_equal(mean, second) == (compression.codec.id in ("fp16", "bf16", "signsgd", "onebit"))


@pytest.mark.parametrize("name", [None, "one"])
def test_several_allreduces_in_one_graph_which_one_rank_runs_eagerly(name):
    def reduce(step):
        """Two tensors, and one of them again."""
        ones = tf.ones([7]) * float(hvd.rank() + step)
        return [hvd.compressed_allreduce(t, hvd.Compression.none, name) for t in (ones, tf.ones([3]), ones * 2.0)]

    traced = tf.function(reduce)
    for step in range(4):
        results = (reduce if step % 2 and hvd.rank() == 0 else traced)(step)
        mean = (hvd.size() - 1) / 2 + step
        for result, value in zip(results, (mean, 1.0, 2 * mean), strict=True):
            np.testing.assert_array_equal(result.numpy(), np.full(result.shape, value, np.float32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_allreduce_of_all_types_sums_and_sizes(dtype):
    tensor = tf.fill((4, 6), tf.cast(hvd.rank(), dtype))
    total = sum(range(hvd.size()))
    for op, value in ((hvd.Average, total / hvd.size()), (hvd.Sum, total)):
        for name in (None, "named"):
            result = hvd.compressed_allreduce(tensor, hvd.Compression.none, name, op)
            assert (result.dtype, result.shape) == (tensor.dtype, tensor.shape)
            np.testing.assert_array_equal(tf.cast(result, tf.float32).numpy(), np.full((4, 6), value, np.float32))
    assert hvd.compressed_allreduce(tf.zeros((0, 3), dtype)).shape == (0, 3)
    assert hvd.compressed_allreduce(tf.cast(3.0, dtype), name="scalar").shape == ()


def test_one_function_may_meet_new_shapes():
    reduce = tf.function(lambda tensor: hvd.compressed_allreduce(tensor, hvd.Compression.none, "shapes"))
    for size in (5, 7, 5):
        assert reduce(tf.fill([size], float(hvd.rank()))).numpy().tolist() == [(hvd.size() - 1) / 2] * size
    assert reduce.experimental_get_tracing_count() == 2


@several_ranks
def test_allreduce_of_nan():
    tensor = np.ones(5, np.float32)
    if hvd.rank() == 1:
        tensor[2] = np.nan
    tensor = tf.constant(tensor)
    for call in (
        lambda: hvd.compressed_allreduce(tensor, name="nan"),
        lambda: tf.function(lambda: hvd.compressed_allreduce(tensor, name="nan"))(),
    ):
        text = assert_raises_everywhere("NonFiniteError", call)
        assert "rank 1 had NaN" in text
    assert np.isnan(hvd.compressed_allreduce(tensor, name="nan", nonfinite="propagate").numpy()).all()
    assert hvd.compressed_allreduce(tf.ones(5), name="nan").shape == (5,)


def test_allreduce_of_what_it_does_not_take():
    for wrong in (tf.ones(3, tf.int32), tf.ones(3, tf.complex64)):
        with pytest.raises(ArgumentError, match=f"tensor has dtype {wrong.dtype.name}"):
            hvd.compressed_allreduce(wrong)
    with pytest.raises(ArgumentError, match="op is"):
        hvd.compressed_allreduce(tf.ones(3), op=hvd.Max)
    with pytest.raises(ArgumentError, match="compression is 'int8'"):
        hvd.compressed_allreduce(tf.ones(3), compression="int8")
    with pytest.raises(ArgumentError, match="must have a fixed shape"):
        tf.function(hvd.compressed_allreduce, input_signature=[tf.TensorSpec([None])], autograph=False)(tf.ones(3))


def test_broadcast_of_all_kinds_of_variables():
    root = hvd.size() - 1
    own = float(hvd.rank() + 1)
    kinds = [tf.float16, tf.bfloat16, tf.float32, tf.float64, tf.int32, tf.int64, tf.uint8, tf.uint32, tf.bool]
    ours = [tf.Variable(tf.cast(tf.fill((2, 3), own - 1), kind), name=kind.name) for kind in kinds]
    theirs = [keras.Variable(np.full(4, own), dtype=kind) for kind in ("float32", "bfloat16", "int32", "bool")]
    generator = keras.random.SeedGenerator(hvd.rank())
    seed = generator.state.numpy().tolist()
    scalar = tf.Variable(own, name="scalar")
    hvd.broadcast_variables([*ours, *theirs, generator.state, scalar], root_rank=root)
    for variable, kind in zip(ours, kinds, strict=True):
        assert variable.dtype == kind
        np.testing.assert_array_equal(
            tf.cast(variable, tf.float32).numpy(),
            np.float32(tf.cast(tf.cast(tf.fill((2, 3), float(root)), kind), tf.float32)),
        )
    assert_replicas_equal([*ours, *theirs])
    assert float(scalar) == root + 1
    assert generator.state.numpy().tolist() == seed
    assert len(set(everybody(tuple(seed)))) == hvd.size()


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=str)
def test_compressors_in_stock_horovod(compression):
    tensor = tf.constant([1.0, 2.0, -3.0])
    if compression.codec.commutes_with_sum:
        reduced = horovod.allreduce(tensor, compression=compression, name="stock")
        np.testing.assert_allclose(reduced.numpy(), tensor.numpy(), rtol=2.0**-22)
    else:
        with pytest.raises(ArgumentError, match=r"pqasgd_horovod\.tensorflow\.DistributedOptimizer"):
            horovod.allreduce(tensor, compression=compression)


@several_ranks
def test_a_carrier_waits_no_longer_than_it_is_told_and_can_wait_again():
    carrier = hvd.HorovodCarrier()
    if hvd.rank() == 0:
        handle = carrier.allgather("test.late", np.full(3, 7, np.uint8))
        assert not handle.done()
        with pytest.raises(CollectiveTimeoutError, match=r"test\.late"):
            handle.wait(0.2)
    everybody(None)
    if hvd.rank() != 0:
        handle = carrier.allgather("test.late", np.full(3 + hvd.rank(), hvd.rank(), np.uint8))
    expected = [7] * 3 + [rank for rank in range(1, hvd.size()) for _ in range(3 + rank)]
    assert handle.wait(20).tolist() == expected
    assert handle.done()


def test_a_carrier_sends_pieces():
    carrier = hvd.HorovodCarrier()
    splits = [rank % 3 for rank in range(hvd.size())]
    payload = np.repeat(np.arange(hvd.size(), dtype=np.uint8), splits)
    for _ in range(2):
        received = carrier.alltoall("test.pieces", payload, splits).wait(20)
        assert received.tolist() == [hvd.rank()] * (splits[hvd.rank()] * hvd.size())


@several_ranks
def test_sets_of_ranks_train_apart():
    """Two disjoint sets, of two ranks each if there are four, each under its own names."""
    half = hvd.size() // 2
    sets = [hvd.add_process_set(list(range(half))), hvd.add_process_set(list(range(half, hvd.size())))]
    mine = sets[hvd.rank() >= half]
    try:
        variables, coded = make_variables(), make_variables()
        periodic = wrap(period=2, compression=EDEN2, process_set=mine)
        apply(periodic, variables, range(3))
        periodic.flush()
        gradients = wrap(compression=EDEN2, process_set=mine)
        apply(gradients, coded, range(3))
        reduced = hvd.compressed_allreduce(tf.constant(gradients_of(0)[0]), process_set=mine).numpy()
        tape = hvd.DistributedGradientTape(tf.GradientTape(persistent=True), process_set=mine)
        with tape:
            target = tf.add_n([tf.reduce_sum(v) for v in variables]) * (1.0 + hvd.rank())
        for gradient in tape.gradient(target, variables):
            np.testing.assert_allclose(gradient.numpy(), 1.0 + np.mean(mine.ranks), rtol=2.0**-22)
        if len(mine.ranks) > 1 and 0 in mine.ranks:  # which the other set does not take notice of
            sources = variables[hvd.rank() :]
            with pytest.raises(MismatchError, match=r"sources\.v0:0: it is .* on rank 0; absent on rank 1"):
                tape.gradient(target, sources)
        shared = tf.Variable(float(hvd.rank()), name="shared")
        hvd.broadcast_variables([shared], root_rank=mine.ranks[-1], process_set=mine)
        results = everybody([*values(variables), *values(coded), reduced, shared.numpy()])
        for rank, theirs in enumerate(results):
            if rank in mine.ranks:
                assert_equal(theirs, results[hvd.rank()])
            else:
                assert not np.array_equal(theirs[0], variables[0].numpy())
        if len(mine.ranks) == 1:
            expected = start()
            for step in range(3):
                for value, gradient in zip(expected, gradients_of(step), strict=True):
                    value -= np.float32(0.5) * gradient
            assert_equal(values(variables), expected)
        assert periodic.communication_stats()["world_size"] == len(mine.ranks)
        loaded = type(periodic).from_config(periodic.get_config())
        assert loaded._pqasgd_membership.value.description == periodic._pqasgd_membership.value.description
        assert loaded.get_config()["process_set"] == list(mine.ranks)
    finally:
        for subset in sets:
            hvd.remove_process_set(subset)


@several_ranks
def test_a_set_that_this_rank_is_not_in():
    alone = hvd.add_process_set([0])
    try:
        if not alone.included():
            with pytest.raises(ArgumentError, match="does not belong to"):
                hvd.compressed_allreduce(tf.ones(3), process_set=alone)
    finally:
        hvd.remove_process_set(alone)
