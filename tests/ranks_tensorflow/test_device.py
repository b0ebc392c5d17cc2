"""Models on a GPU, on all ranks or on some: the bits of a CPU. The GPU is that of gpu.py."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import pqasgd_horovod.tensorflow as hvd
import pqasgd_horovod.tensorflow.keras as hvd_keras
from pqasgd_horovod.errors import ArgumentError, DeviceError, PqasgdError
from pqasgd_horovod.tensorflow import places
from tests.ranks_tensorflow import gpu
from tests.ranks_tensorflow.common import (
    EDEN2,
    EDEN4,
    apply,
    assert_equal,
    assert_raises_everywhere,
    compiled,
    fit,
    gradients_of,
    make_model,
    start,
    two_ranks,
    values,
    weights,
    wrap,
)

DTYPES = (tf.float32, tf.float64, tf.float16, tf.bfloat16)


@pytest.fixture
def pretended(monkeypatch):
    yield gpu.Pretended(monkeypatch)
    gpu.forget_kernels()


def variables_on(device, dtypes=(tf.float32,)):
    """Variables of all types, with the numbers of ``make_variables``."""
    with tf.device(device):
        return [tf.Variable(tf.cast(v, dtypes[i % len(dtypes)]), name=f"v{i}") for i, v in enumerate(start())]


def train(device, steps=5, dtypes=DTYPES, anchor_device=None, **options):
    """Some steps with a state that is saved and loaded between, and what is left at the end."""
    variables = variables_on(device, dtypes)
    optimizer = wrap(anchor_device=anchor_device, **options)

    def gradients(step):
        return [tf.cast(g, v.dtype) for g, v in zip(gradients_of(step), variables, strict=True)]

    saved = {}
    for step in range(steps):
        apply(optimizer, variables, [step], gradients)
        if step == 3:
            optimizer.save_own_variables(saved)
            optimizer.load_own_variables(saved)
    optimizer.flush()
    optimizer.save_own_variables(saved)
    own = [np.asarray(saved[name]) for name in sorted(saved) if name.startswith("pqasgd.") and "owner" not in name]
    return [np.asarray(v.value()) for v in variables] + own


def mean_of(**options):
    return hvd.PeriodicAveraging(buffers="local", **options)


FED_BACK = {"exchange": "two_phase", "feedback": hvd.Feedback()}
TRAININGS = {
    "outer": {"averaging": mean_of(period=2, outer=hvd.SlowMo(0.9, 0.8)), **FED_BACK},
    "every step": {"op": hvd.Sum, **FED_BACK},
}
MORE = {
    "late fragments": {"averaging": mean_of(period=2, delay=1, selection=hvd.Rotation(2)), "exchange": "allgather"},
    "late": {"averaging": mean_of(period=3, delay=1), "exchange": "allgather"},
    "fragments": {"averaging": hvd.SparseAveraging(period=2, buffers="local"), **FED_BACK},
    "adaptive": {"averaging": mean_of(period=hvd.AdaptivePeriod(first=1, last=3, calibration_steps=2))},
    "outer optimizer": {"averaging": mean_of(period=2, outer=keras.optimizers.Adam(0.1))},
    "momentum": {"compression": hvd.Compression.topk(0.1), "feedback": hvd.MomentumCorrection(0.9)},
}


@two_ranks
@pytest.mark.parametrize(
    "options",
    [*TRAININGS.values(), *(pytest.param(options, marks=pytest.mark.long) for options in MORE.values())],
    ids=[*TRAININGS, *MORE],
)
def test_training_has_the_bits_of_cpus(options, pretended):
    """On one rank there is a GPU; its numbers are beside the model, or in host memory."""
    options = {"compression": EDEN4, "small_tensor_threshold": 0, **options}
    before = pretended.num_launched()
    expected = train("CPU:0", **options)
    assert pretended.num_launched() == before
    has_gpu = hvd.rank() == hvd.size() - 1
    for anchor_device in ("cpu", None):
        if has_gpu:
            pretended.begin(has_kernels=anchor_device is None)
        found = train(gpu.NAME if has_gpu else "CPU:0", anchor_device=anchor_device, **options)
        assert_equal(found, expected)
        assert (pretended.num_launched() > before) == (has_gpu and anchor_device is None)


@two_ranks
@pytest.mark.parametrize("period", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_model_has_the_bits_of_cpus(period, pretended):
    def fitted(device):
        with tf.device(device):
            model = make_model(norm=True)
        optimizer = hvd_keras.DistributedOptimizer(
            keras.optimizers.SGD(0.1), compression=EDEN2, period=period, check_consistency=True
        )
        fit(compiled(optimizer, model), 3)
        assert {places.short_name(v.value.device) for v in model.trainable_variables} == {device}
        return weights(model)

    expected = fitted("CPU:0")
    pretended.begin()
    assert_equal(fitted(gpu.NAME), expected)


@two_ranks
@pytest.mark.long
@pytest.mark.parametrize("place", [None, "cpu"])
def test_ranks_with_more_data_go_on(place, pretended):
    """Means of which a rank is absent are made larger, on the GPU."""

    def joined(device):
        variables = variables_on(device)
        optimizer = wrap(period=2, compression=EDEN2, anchor_device=place)
        apply(optimizer, variables, range(3 + 2 * hvd.rank()))
        assert optimizer.join() == 1
        return values(variables)

    expected = joined("CPU:0")
    pretended.begin(has_kernels=place is None)
    assert_equal(joined(gpu.NAME), expected)


@two_ranks
def test_what_is_not_finite_is_refused_on_all_ranks(pretended):
    if hvd.rank() == 0:
        pretended.begin()
    variables = variables_on(gpu.NAME if hvd.rank() == 0 else "CPU:0")
    optimizer = wrap(period=2, compression=EDEN2, exchange="two_phase")
    apply(optimizer, variables, [0])
    variables[0].assign(variables[0] * float("nan" if hvd.rank() == 0 else "1"))
    assert_raises_everywhere("NonFiniteError", lambda: apply(optimizer, variables, [1]))


@two_ranks
def test_what_is_not_finite_is_passed_on_as_asked(pretended):
    def stepped(device):
        variables = variables_on(device)
        optimizer = wrap(compression=EDEN2, nonfinite="propagate", small_tensor_threshold=0)
        wrong = float("nan") if hvd.rank() == 0 else 1.0
        apply(optimizer, variables, [0], lambda step: [g * np.float32(wrong) for g in gradients_of(step)])
        return values(variables)

    expected = stepped("CPU:0")
    assert np.isnan(expected[0]).all()
    pretended.begin()
    assert_equal(stepped(gpu.NAME), expected)


@two_ranks
@pytest.mark.parametrize("period", [1, 2])
def test_variables_on_two_devices_are_refused_on_all_ranks(period):
    places_of_rank = ["CPU:0", gpu.NAME] if hvd.rank() == 1 else ["CPU:0", "CPU:0"]
    variables = [variables_on(place)[i] for i, place in enumerate(places_of_rank)]
    optimizer = wrap(period=period, compression=EDEN2)
    expected = "v0:0 is on CPU:0, v1:0 is on CPU:1; all parameters must be on one device: move the model as a whole"
    with pytest.raises(PqasgdError, match=expected):
        apply(optimizer, variables, [0], lambda step: gradients_of(step)[:2])


@two_ranks
def test_a_rank_without_kernels_is_refused_on_all_ranks(pretended, monkeypatch, tmp_path):
    if hvd.rank() == 0:
        pretended.begin()
        monkeypatch.setenv("PQASGD_CUDA_LIBRARY", str(tmp_path / "none.so"))
    variables = variables_on(gpu.NAME if hvd.rank() == 0 else "CPU:0")
    with pytest.raises(PqasgdError, match=r"the kernels for GPUs, none.so, could not be loaded"):
        apply(wrap(period=2, compression=EDEN2), variables, [0])


@two_ranks
def test_what_cuda_refuses_is_an_error_of_this_package(pretended):
    pretended.begin()
    with tf.device(gpu.NAME):
        variable = tf.Variable(tf.zeros([300_000]))  # more than any other test has
    optimizer = wrap(period=2, compression=EDEN2)
    apply(optimizer, [variable], [0], lambda step: [np.ones(300_000, np.float32)])
    pretended.limit_memory(0)  # rounds need no more than they have
    pretended.break_down(True)
    try:
        with pytest.raises(DeviceError, match="encode: CUDA refuses: unspecified launch failure"):
            apply(optimizer, [variable], [1], lambda step: [np.ones(300_000, np.float32)])
    finally:
        pretended.break_down(False)
        pretended.limit_memory(-1)


@two_ranks
@pytest.mark.parametrize("period", [1, 2])
def test_all_ranks_learn_of_one_that_has_no_memory(pretended, period):
    pretended.begin()
    with tf.device(gpu.NAME if hvd.rank() == 1 else "CPU:0"):
        variable = tf.Variable(tf.zeros([period * 500_000]))  # more than any other test has
    optimizer, gradients = wrap(period=period, compression=EDEN2), [np.ones(period * 500_000, np.float32)]
    pretended.limit_memory(1000)
    try:
        with pytest.raises(PqasgdError, match=r"memory to code a bucket on cuda:0: .*out of memory.*bucket_cap_mb"):
            apply(optimizer, [variable], [0], lambda step: gradients)
    finally:
        pretended.limit_memory(-1)
    with pytest.raises(ArgumentError, match=r"the optimizer could not be built, for .*; make another one"):
        apply(optimizer, [variable], [0], lambda step: gradients)


@two_ranks
def test_low_rank_is_refused_on_a_gpu(pretended):
    pretended.begin()
    optimizer = wrap(period=2, compression=hvd.Compression.powersgd(2), feedback=hvd.Feedback())
    with pytest.raises(ArgumentError, match="made on CPUs: pass anchor_device='cpu'"):
        apply(optimizer, variables_on(gpu.NAME), [0])


def test_an_anchor_device_that_there_is_not():
    with pytest.raises(ArgumentError, match="anchor_device is 'cuda'; it must be None"):
        wrap(period=2, anchor_device="cuda")
