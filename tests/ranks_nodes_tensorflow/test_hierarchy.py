"""Two nodes of two ranks, in graphs: what the core does, bit for bit, and the same errors on all."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import pqasgd_horovod.tensorflow as hvd
from pqasgd_horovod.averaging import ExchangeConfig
from pqasgd_horovod.averaging.gradients import GradientAverager
from pqasgd_horovod.averaging.periodic import PeriodicAverager
from pqasgd_horovod.averaging.vector import ArrayView
from pqasgd_horovod.errors import ArgumentError
from pqasgd_horovod.exchange.carriers.nodes import find_nodes
from pqasgd_horovod.exchange.carriers.threads import run_ranks

from ..ranks_tensorflow import gpu
from ..ranks_tensorflow.common import (
    EDEN2,
    SHAPES,
    apply,
    assert_equal,
    assert_raises_everywhere,
    assert_replicas_equal,
    everybody,
    gradients_of,
    make_variables,
    start,
    values,
    wrap,
)

pytestmark = pytest.mark.skipif(
    hvd.size() != 4 or hvd.local_size() != 2, reason="needs two nodes: horovodrun -np 4 -H localhost:2,127.0.0.1:2"
)
RATE, STEPS = 0.5, 5
OPTIONS = {"compression": EDEN2, "hierarchy": "node"}
# Buckets of one or two tensors, so that both ranks of a node own some, and what a bucket's mean has left is fed back.
FED_BACK = {**OPTIONS, "feedback": hvd.Feedback(), "small_tensor_threshold": 0, "bucket_cap_mb": 2048 * 4 / 2**20}


def in_the_core(averaging, uneven=None, **options):
    """The same training by the framework-free averagers, with all ranks in this process; the parameters of each.

    Of ``uneven`` numbers of steps, what the one with the most has when all have joined.
    """
    period = averaging.period
    options = {key: value for key, value in options.items() if key != "compression"}

    def program(carrier):
        def among(ranks):
            return carrier.among(ranks) if carrier.rank in ranks else None

        nodes = find_nodes(carrier, carrier.rank // 2, carrier.rank % 2, "nodes", among)
        arrays = [value.reshape(-1) for value in start()]
        gradients = [np.empty_like(array) for array in arrays]
        views = [ArrayView(f"v{i}", array) for i, array in enumerate(gradients if period == 1 else arrays)]
        config = ExchangeConfig(EDEN2.codec, **options)
        if period > 1:
            averager = PeriodicAverager(nodes, averaging, config, name="core")
        else:
            averager = GradientAverager(nodes, config, name="core")
        averager.prepare(views)
        for step in range(STEPS if uneven is None else uneven[carrier.rank]):
            for array, gradient in zip(gradients, gradients_of(step, carrier.rank), strict=True):
                array[:] = gradient.reshape(-1)
            if period == 1:
                averager.finish()
            for array, gradient in zip(arrays, gradients, strict=True):
                array -= np.float32(RATE) * gradient
            if period > 1:
                averager.count_step(RATE)
        if uneven is not None:
            averager.join()
        return [array.reshape(shape) for array, shape in zip(arrays, SHAPES, strict=True)]

    return run_ranks(hvd.size(), program)


@pytest.mark.parametrize(
    ("period", "delay", "exchange"),
    [(1, 0, "allgather"), (1, 0, "two_phase"), (2, 0, "allgather"), (2, 0, "two_phase"), (3, 2, "two_phase")],
)
def test_the_graph_does_what_the_core_does(period, delay, exchange):
    averaging = hvd.PeriodicAveraging(period, delay=delay, buffers="local")
    variables = make_variables()
    optimizer = wrap(keras.optimizers.SGD(RATE), averaging=averaging, exchange=exchange, **FED_BACK)
    run = tf.function(lambda *gradients: optimizer.apply_gradients(zip(gradients, variables, strict=True)))
    for step in range(STEPS):
        run(*map(tf.constant, gradients_of(step)))
    assert_equal(values(variables), in_the_core(averaging, method=exchange, **FED_BACK)[hvd.rank()])
    stats = optimizer.communication_stats()
    rounds, elements = STEPS // period, stats["num_elements"]
    everywhere = everybody(stats)
    of_node = everywhere[0]["bytes_sent"] + everywhere[1]["bytes_sent"]
    assert (
        rounds * elements // 4 < of_node < rounds * elements
    )  # a byte for each number is more than two phases of 2 bits
    assert all(each["bytes_sent_inside_node"] > rounds * elements for each in everywhere)


@pytest.mark.parametrize("period", [1, 2])
def test_ranks_with_fewer_batches_join(period):
    """The residual of a node goes on when the rank that owns it has joined."""
    uneven, averaging = (3, STEPS, 1, 2), hvd.PeriodicAveraging(period, buffers="local")
    variables = make_variables()
    optimizer = wrap(keras.optimizers.SGD(RATE), averaging=averaging, exchange="two_phase", **FED_BACK)
    apply(optimizer, variables, range(uneven[hvd.rank()]))
    assert optimizer.join() == 1
    assert_replicas_equal(variables)
    assert_equal(values(variables), in_the_core(averaging, uneven, method="two_phase", **FED_BACK)[1])


def test_nan_on_one_rank_is_one_error_on_all():
    variables = make_variables()
    optimizer = wrap(keras.optimizers.SGD(RATE), period=1, **OPTIONS)
    apply(optimizer, variables, range(1))
    before = values(variables)

    def broken(step):
        factor = np.float32("nan") if hvd.rank() == 3 else np.float32(1)
        return [gradient * factor for gradient in gradients_of(step)]

    text = assert_raises_everywhere("NonFiniteError", lambda: apply(optimizer, variables, [1], broken))
    assert "a node had NaN" in text
    assert_equal(values(variables), before)
    apply(optimizer, variables, [2])
    assert_replicas_equal(variables)


def test_what_is_refused():
    for hierarchy, options, text in (
        ("rack", {"period": 2}, "hierarchy is 'rack'"),
        ("node", {"compression": hvd.Compression.none}, "HOROVOD_HIERARCHICAL_ALLREDUCE"),
    ):
        with pytest.raises(ArgumentError, match=text):
            wrap(**{**OPTIONS, "hierarchy": hierarchy, **options})
    on_one = "node" if hvd.rank() == 2 else None
    text = assert_raises_everywhere("MismatchError", lambda: wrap(**{**OPTIONS, "period": 2, "hierarchy": on_one}))
    assert "hierarchy" in text


def test_residuals_of_nodes_resume_and_are_not_combined():
    def train(steps, state=None, started=None):
        variables = [tf.Variable(value) for value in started or start()]
        optimizer = wrap(keras.optimizers.SGD(RATE), period=2, **FED_BACK)
        optimizer.build(variables)
        if state is not None:
            optimizer.load_own_variables(state)
        apply(optimizer, variables, steps)
        saved = {}
        optimizer.save_own_variables(saved)
        return saved, values(variables)

    _, straight = train(range(4))
    state, halfway = train(range(2))
    _, resumed = train(range(2, 4), state, halfway)
    assert_equal(resumed, straight)
    with pytest.raises(ArgumentError, match="hierarchy"):
        hvd.combine_states(everybody(state))


@pytest.mark.parametrize(("period", "exchange"), [(1, "allgather"), (2, "two_phase")])
def test_on_a_gpu_it_has_the_bits_of_cpus(period, exchange, monkeypatch):
    pretended = gpu.Pretended(monkeypatch)

    def trained(device):
        with tf.device(device):
            variables = make_variables()
        optimizer = wrap(period=period, exchange=exchange, **FED_BACK)
        apply(optimizer, variables, [0])
        pretended.limit_memory(0)  # rounds need no more than they have
        apply(optimizer, variables, [1, 2])
        pretended.limit_memory(-1)
        return values(variables)

    expected = trained("CPU:0")
    before = pretended.num_launched()
    pretended.begin()
    assert_equal(trained(gpu.NAME), expected)
    assert pretended.num_launched() > before
    gpu.forget_kernels()
