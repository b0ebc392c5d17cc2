"""``optimizer.join()``: ranks with different numbers of batches, who have the core's bits."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import pqasgd_horovod.tensorflow as hvd
from pqasgd_horovod.averaging import ExchangeConfig, GradientAverager, PeriodicAverager
from pqasgd_horovod.averaging.tables import SparseSpec
from pqasgd_horovod.averaging.vector import ArrayView
from pqasgd_horovod.exchange.carriers.threads import run_ranks
from pqasgd_horovod.exchange.rows import Rows

from .common import (
    EDEN2,
    EDEN4,
    SHAPES,
    apply,
    assert_equal,
    assert_replicas_equal,
    everybody,
    gradients_of,
    last_rank,
    make_variables,
    several_ranks,
    start,
    uneven_batches,
    values,
    wrap,
)

RATE = np.float32(0.5)  # exact, so that the local update has the same bits everywhere
TOPK = hvd.Compression.topk(density=0.1, block_size=512)
POWERSGD = hvd.Compression.powersgd(approximation_rank=2)
FED_BACK = {"feedback": hvd.Feedback(), "bucket_cap_mb": 0.004}


# ---- as the core does it ----


def views_of(arrays):
    """Arrays as the core sees them, with the columns of TensorFlow's matrices."""
    return [ArrayView(f"v{i}", array.reshape(-1, array.shape[-1]).squeeze()) for i, array in enumerate(arrays)]


def replicas_in_the_core(averaging, codec, **options):
    """The same training by the framework-free averager, with all ranks in this process."""

    def program(carrier):
        averager = PeriodicAverager(carrier, averaging, ExchangeConfig(codec, **options), name="core")
        views = views_of(start())
        averager.prepare(views)
        after_epochs = []
        for epoch in range(2):
            for step in uneven_batches(epoch, carrier.rank):
                for view, gradient in zip(views, gradients_of(step, carrier.rank), strict=True):
                    view.array -= RATE * gradient.reshape(view.array.shape)
                averager.count_step(float(RATE))
            assert averager.join() == last_rank(epoch)
            after_epochs.append([view.array.copy() for view in views])
        pace = averager.state_dict()["pace"]
        known = {"has_dropped": int(pace["has_dropped"]), "memory": list(pace["memory"])}
        return after_epochs, {**averager.communication_stats(), **known}

    return run_ranks(hvd.size(), program)[hvd.rank()]


def gradients_in_the_core(codec, **options):
    """Likewise with coded gradients; who joins takes over the parameters of the rank that joins last."""

    def program(carrier):
        averager = GradientAverager(carrier, ExchangeConfig(codec, **options), name="core")
        arrays, gradients = start(), [np.zeros(shape, np.float32) for shape in SHAPES]
        averager.prepare(views_of(gradients))
        after_epochs = []
        for epoch in range(2):
            for step in uneven_batches(epoch, carrier.rank):
                for array, given in zip(gradients, gradients_of(step, carrier.rank), strict=True):
                    array[:] = given
                averager.finish()
                for array, mean in zip(arrays, gradients, strict=True):
                    array -= RATE * mean
            last, uneven = averager.join()
            assert (last, uneven) == (last_rank(epoch), carrier.size > 1)
            for i, array in enumerate(arrays):
                all_of_it = carrier.allgather(f"{epoch}.{i}", array.reshape(-1).view(np.uint8)).wait()
                array[:] = all_of_it.view(np.float32).reshape(carrier.size, *array.shape)[last]
            after_epochs.append([array.copy() for array in arrays])
        return after_epochs, averager.communication_stats()

    return run_ranks(hvd.size(), program)[hvd.rank()]


def in_the_core(averaging, codec, **options):
    if averaging.exchanges_gradients:
        return gradients_in_the_core(codec, **options)
    return replicas_in_the_core(averaging, codec, **options)


def strategy(period=1, **options):
    return hvd.PeriodicAveraging(period=period, buffers="local", **options)


CONFIGS = {
    "two phases": (strategy(2), TOPK, {**FED_BACK, "exchange": "two_phase"}),
    "delay": (strategy(3, delay=2), EDEN2, FED_BACK),
    "slowmo": (strategy(2, outer=hvd.SlowMo(0.5)), EDEN2, {"exchange": "two_phase"}),
    "sparse": (hvd.SparseAveraging(period=3, buffers="local"), EDEN2, FED_BACK),
    "adaptive": (strategy(hvd.AdaptivePeriod(first=1, last=3, calibration_steps=2)), EDEN2, {}),
    "powersgd": (strategy(4), POWERSGD, {"feedback": hvd.Feedback()}),
    "gradients": (strategy(), TOPK, {**FED_BACK, "exchange": "two_phase"}),
    "gradients' momentum": (strategy(), TOPK, {"feedback": hvd.MomentumCorrection(0.9, warmup_steps=4)}),
    "gradients' powersgd": (strategy(), POWERSGD, {"feedback": hvd.Feedback()}),
}


LONG = ("slowmo", "powersgd")  # each half of which is in others


@several_ranks
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in CONFIGS]
)
def test_uneven_epochs_have_the_bits_of_the_core(name):
    averaging, compression, options = CONFIGS[name]
    variables = make_variables()
    optimizer = wrap(keras.optimizers.SGD(float(RATE)), averaging=averaging, compression=compression, **options)
    step = tf.function(lambda *gradients: optimizer.apply_gradients(zip(gradients, variables, strict=True)))
    core = {"method" if key == "exchange" else key: value for key, value in options.items()}
    wanted, its = in_the_core(averaging, compression.codec, **core)
    for epoch in range(2):
        for number in uneven_batches(epoch):
            step(*map(tf.constant, gradients_of(number)))
        assert optimizer.join() == last_rank(epoch)
        assert_replicas_equal(variables)
        assert_equal([value.reshape(-1) for value in values(variables)], [a.reshape(-1) for a in wanted[epoch]])
    mine = optimizer.communication_stats()
    for key in ("steps", "rounds", "bytes_sent", "bytes_received", "num_elements"):
        assert mine[key] == its[key], key
    saved = optimizer._saved()
    common = {key: saved[key].numpy().tolist() for key in optimizer._pqasgd_state.common() if "anchor." not in key}
    assert everybody(common) == [common] * hvd.size()
    for key in ("has_dropped", "memory"):
        assert key not in its or common[key] == pytest.approx(its[key]), key
    assert step.experimental_get_tracing_count() == 1


@several_ranks
def test_rows_of_an_embedding_have_the_bits_of_the_core():
    """With feedback, beside a dense gradient."""
    options, shapes = {"feedback": hvd.Feedback()}, {"words": (50, 40), "dense": (3000,)}

    def given(step, rank):
        generator = np.random.default_rng([step, rank])
        rows = np.sort(generator.permutation(50)[: 4 + rank]).astype(np.int64)
        return rows, *(generator.standard_normal(n).astype(np.float32) for n in ((rows.size, 40), shapes["dense"]))

    def program(carrier):
        averager = GradientAverager(carrier, ExchangeConfig(TOPK.codec, **options), name="core")
        view = ArrayView("dense", np.zeros(shapes["dense"], np.float32))
        averager.prepare([view], [SparseSpec("words", shapes["words"], "")])
        words, dense = (np.zeros(shape, np.float32) for shape in shapes.values())
        for step in uneven_batches(0, carrier.rank):
            rows, numbers, view.array[:] = given(step, carrier.rank)
            averager.ready_rows("words", functools.partial(Rows, rows, numbers))
            means = averager.finish()["words"]
            words[means.numbers] -= RATE * means.values
            dense -= RATE * view.array
        averager.join()
        return words, dense

    variables = [tf.Variable(tf.zeros(shape), name=name) for name, shape in shapes.items()]
    optimizer = wrap(keras.optimizers.SGD(float(RATE)), compression=TOPK, **options)
    for step in uneven_batches(0):
        rows, numbers, gradient = map(tf.constant, given(step, hvd.rank()))
        optimizer.apply([tf.IndexedSlices(numbers, rows, tf.constant(shapes["words"])), gradient], variables)
    assert optimizer.join() == last_rank(0)
    assert_replicas_equal(variables)
    assert_equal(values(variables), list(run_ranks(hvd.size(), program)[last_rank(0)]))


# ---- what is not the core's ----


@pytest.mark.parametrize("options", [{"period": 4}, {"averaging": None, "period": 3, "outer": True}, {}], ids=str)
def test_a_rank_without_any_batch_has_the_same_replica(options):
    """Of whatever type; the others have built and compared their layouts in their first step."""
    if options.pop("outer", False):
        options = {"averaging": strategy(options["period"], outer=keras.optimizers.Adam(0.1))}
    variables = [*make_variables(shapes=SHAPES[:2]), tf.Variable(start(np.float64)[0], name="double")]

    def gradients(step):
        return [*gradients_of(step, shapes=SHAPES[:2]), gradients_of(step, dtype=np.float64)[0]]

    optimizer = wrap(compression=EDEN4, **options)
    steps = range(0 if hvd.rank() == 0 and hvd.size() > 1 else 6)
    if not steps:
        optimizer.build(variables)
    apply(optimizer, variables, steps, gradients)
    assert (optimizer.join() > 0) == (hvd.size() > 1)
    assert_replicas_equal(variables)
    assert optimizer.communication_stats()["steps"] == 6
    apply(optimizer, variables, range(6, 10), gradients)
    optimizer.flush()
    assert_replicas_equal(variables)


@pytest.mark.skipif(hvd.size() < 3, reason="needs a process set that is not all ranks: make test-4")
@pytest.mark.parametrize("options", [{"period": 4}, {"compression": EDEN4}], ids=str)
def test_the_rank_that_is_returned_is_horovods(options):
    some = hvd.add_process_set([1, 2])
    variables = make_variables()
    optimizer = wrap(process_set=some, **options)
    if some.included():
        apply(optimizer, variables, range(hvd.rank()))
        assert optimizer.join() == 2
    replicas = everybody(values(variables))
    assert_equal(replicas[1], replicas[2])
    hvd.remove_process_set(some)
