"""period>1: what replicas are, bit by bit, between averages and after them."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import pqasgd_horovod.tensorflow as hvd
from pqasgd_horovod import codecs
from pqasgd_horovod.averaging import ExchangeConfig, PeriodicAverager, PeriodicAveraging
from pqasgd_horovod.exchange.carriers.threads import run_ranks
from pqasgd_horovod.keys import derive_key
from tests.averaging.arrays import ArrayView, decoded_mean
from tests.ranks_tensorflow.common import (
    EDEN2,
    EDEN4,
    SHAPES,
    apply,
    assert_equal,
    assert_replicas_equal,
    compiled,
    differ,
    everybody,
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

MIXED = ((30, 60), (7,), (40, 50), (3, 5))
MIXED_DTYPES = (np.float32, np.float32, np.float64, np.float16)


def local_sgd(replicas, step, rate=0.5):
    """A step of every rank, in NumPy: one product and one difference, both rounded to float32, as TensorFlow does."""
    for rank, replica in enumerate(replicas):
        for value, gradient in zip(replica, gradients_of(step, rank), strict=True):
            value -= np.float32(rate) * gradient


@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
def test_without_loss_it_is_local_sgd_by_hand(exchange):
    variables = make_variables()
    optimizer = wrap(period=3, exchange=exchange)
    replicas = [start() for _ in range(hvd.size())]
    for step in range(7):
        apply(optimizer, variables, [step])
        local_sgd(replicas, step)
        if step in (2, 5):
            average(replicas, variables)
        else:
            assert_equal(values(variables), replicas[hvd.rank()])
    optimizer.flush()
    average(replicas, variables)
    assert optimizer.communication_stats()["rounds"] == 3


def average(replicas, variables):
    """Compare with the mean taken in float64; then go on from the very bits that the ranks have.

    The change, its products with 1/n, their sum and the new anchor are each rounded to float32: a few units in the last
    place of numbers below 16.
    """
    assert_replicas_equal(variables)
    if hvd.size() == 1:
        assert_equal(values(variables), replicas[0])
    for tensors in zip(values(variables), *replicas, strict=True):
        ours, *theirs = tensors
        mean = np.mean(theirs, axis=0, dtype=np.float64)
        np.testing.assert_allclose(ours, mean, rtol=0, atol=4 * hvd.size() * 2.0**-21)
        for value in theirs:
            value[...] = ours


@several_ranks
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize(
    "compression",
    [
        EDEN2,
        hvd.Compression.maxscale(bits=4),
        hvd.Compression.bf16,
        hvd.Compression.qsgd(8),
        hvd.Compression.terngrad(),
    ],
    ids=str,
)
def test_the_anchor_moves_by_the_mean_of_the_decoded_changes(compression, traced):
    variables = make_variables()
    optimizer = wrap(period=2, compression=compression, exchange="allgather", seed=7)
    optimizer.build(variables)

    def step(*gradients):
        optimizer.apply_gradients(zip(gradients, variables, strict=True))

    step = tf.function(step) if traced else step
    before, replicas = start(), [start() for _ in range(hvd.size())]
    for number in range(2):
        step(*map(tf.constant, gradients_of(number)))
        local_sgd(replicas, number)
    large = [i for i, value in enumerate(before) if value.size >= 1024]
    small = [i for i, value in enumerate(before) if value.size < 1024]
    assert large
    assert small
    for channel, (members, codec) in enumerate(((large, compression.codec), (small, codecs.none()))):
        anchor = flat(before, members)
        keys = [derive_key(7 + channel, rank, 2, 0, 0) for rank in range(hvd.size())]
        mean = decoded_mean([flat(replica, members) for replica in replicas], anchor, ExchangeConfig(codec), keys)
        np.testing.assert_array_equal(flat(values(variables), members), anchor + mean)
        np.testing.assert_array_equal(optimizer._pqasgd_state.anchors[channel].numpy(), anchor + mean)
    assert_replicas_equal(variables)


def flat(arrays, members):
    return np.concatenate([arrays[i].ravel() for i in members])


@several_ranks
@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
@pytest.mark.parametrize(
    ("codec", "second_codec"),
    [
        (codecs.eden(bits=3), codecs.eden(bits=6)),
        (codecs.topk(density=0.1, values=codecs.eden(bits=4), block_size=512), None),
        (codecs.randomk(density=0.2, scaled=True, block_size=512), None),
    ],
    ids=["eden", "topk", "randomk"],
)
def test_the_core_and_this_front_end_average_alike(codec, second_codec, exchange):
    """The averager of PyTorch's front end, on arrays and threads, gives the same bits from the same seed."""
    config = ExchangeConfig(codec, second_codec, method=exchange, seed=3)

    def typed(arrays):
        return [array.astype(dtype) for array, dtype in zip(arrays, MIXED_DTYPES, strict=True)]

    def program(carrier):
        averager = PeriodicAverager(carrier, PeriodicAveraging(period=2), config, name="test")
        views = [ArrayView(f"v{i}", value) for i, value in enumerate(typed(start(shapes=MIXED)))]
        averager.prepare(views)
        for step in range(5):
            for view, gradient in zip(views, typed(gradients_of(step, carrier.rank, shapes=MIXED)), strict=True):
                view.array -= view.array.dtype.type(0.5) * gradient
            averager.count_step()
        averager.flush()
        return [view.array for view in views]

    variables = [tf.Variable(value, name=f"v{i}") for i, value in enumerate(typed(start(shapes=MIXED)))]
    optimizer = wrap(
        period=2, compression=EDEN2.from_config(codec.config()), exchange=exchange, seed=3,
        second_compression=second_codec,
    )  # fmt: skip
    apply(optimizer, variables, range(5), lambda step: typed(gradients_of(step, shapes=MIXED)))
    optimizer.flush()
    assert_equal(values(variables), run_ranks(hvd.size(), program)[hvd.rank()])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_types(dtype):
    variables = [tf.cast(value, dtype) for value in start()]
    variables = [tf.Variable(value, name=f"v{i}") for i, value in enumerate(variables)]
    optimizer = wrap(keras.optimizers.SGD(0.1), period=2, compression=EDEN4)
    apply(optimizer, variables, range(3), lambda step: [tf.cast(g, dtype) for g in gradients_of(step)])
    if hvd.size() > 1:
        assert differ(values(variables))
    optimizer.flush()
    assert_replicas_equal(variables)
    assert optimizer.communication_stats()["rounds"] == 2


def test_small_buckets_and_no_threshold():
    variables = make_variables()
    optimizer = wrap(period=2, compression=EDEN2, bucket_cap_mb=0.005, small_tensor_threshold=0)
    apply(optimizer, variables, range(4))
    assert_replicas_equal(variables)
    if hvd.size() > 1:
        (channel,) = optimizer._pqasgd_averager.value._channels
        assert len(channel.plan.sizes) > 3


def test_flush_is_nothing_after_an_average_and_averages_what_is_left_otherwise():
    variables = make_variables()
    optimizer = wrap(period=3, compression=EDEN2)
    optimizer.flush()
    apply(optimizer, variables, range(3))
    optimizer.flush()
    assert optimizer.communication_stats()["rounds"] == 1
    apply(optimizer, variables, [3])
    optimizer.flush()
    optimizer.flush()
    assert optimizer.communication_stats()["rounds"] == 2
    assert_replicas_equal(variables)


def test_a_model_is_local_sgd_by_hand():
    """Every rank fits every rank's replica, and the mean is NumPy's.

    Tolerance: the graphs that are compared are not the same, and TensorFlow may add up in another order in each.
    """
    model = compiled(wrap(keras.optimizers.SGD(0.1, momentum=0.9), period=3))
    by_hand = [compiled(keras.optimizers.SGD(0.1, momentum=0.9)) for _ in range(hvd.size())]
    fit(model, 7)
    for first, batches in ((0, 3), (3, 3), (6, 1)):
        for rank, replica in enumerate(by_hand):
            fit(replica, batches, first, rank)
        mean = [np.mean(each, axis=0) for each in zip(*(weights(replica) for replica in by_hand), strict=True)]
        for replica in by_hand:
            replica.set_weights(mean)
    for ours, theirs in zip(weights(model), mean, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert_replicas_equal(model)


@several_ranks
def test_communication_stats_are_the_bytes_of_the_plan():
    for exchange in ("allgather", "two_phase"):
        variables = make_variables()
        optimizer = wrap(period=2, compression=EDEN4, exchange=exchange)
        apply(optimizer, variables, range(5))
        stats = optimizer.communication_stats()
        assert (stats["steps"], stats["rounds"], stats["world_size"]) == (5, 2, hvd.size())
        num_elements = sum(int(np.prod(shape)) for shape in SHAPES)
        assert stats["num_elements"] == num_elements
        assert stats["uncompressed_bytes"] == 2 * (hvd.size() - 1) * 4 * 5 * num_elements // hvd.size()
        if hvd.size() == 2:
            # 4200 elements at 4 bits in blocks of 1024, each with a scale, the last of 104 padded to 128; 260 as they
            # are; headers of 64 bytes.
            small = 64 + 4 * 260
            per_round = {
                "allgather": [64 + 4 * (4 + 512) + 4 + 64 + small] * 2,
                # The first rank owns three blocks, 3072 elements; the other the rest, 1024 + 104.
                "two_phase": [
                    (64 + (4 + 512) + 4 + 64) + (64 + 3 * (4 + 512)) + small,
                    (64 + 3 * (4 + 512)) + (64 + (4 + 512) + 4 + 64) + small,
                ],
            }[exchange][hvd.rank()]
            assert stats["bytes_sent"] == 2 * per_round
        assert stats["compression_ratio"] == stats["uncompressed_bytes"] / stats["bytes_sent"]
        assert sum(everybody(stats["bytes_sent"])) == sum(everybody(stats["bytes_received"]))


@several_ranks
def test_data_differs_between_ranks():
    """Every other test rests on that."""
    assert differ(gradients_of(0))
    model = compiled(keras.optimizers.SGD(0.1), make_model())
    assert not differ(weights(model))
    train(model, [0])
    assert differ(weights(model))
