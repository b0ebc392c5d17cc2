"""The optimizer on one rank: it is the wrapped one, its configuration survives, and wrong arguments are told."""

from __future__ import annotations

import json
import logging

import keras
import numpy as np
import pytest
import tensorflow as tf

import pqasgd_horovod.tensorflow as hvd
import pqasgd_horovod.tensorflow.keras as hvd_keras
from pqasgd_horovod.errors import ArgumentError

EDEN2 = hvd.Compression.eden(bits=2)


def make_model():
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(20), keras.layers.BatchNormalization()])


def fit(optimizer, **options):
    model = make_model()
    model.compile(optimizer, loss="mse", **options)
    generator = np.random.default_rng(0)
    inputs, targets = generator.standard_normal((40, 6)), generator.standard_normal((40, 20))
    model.fit(inputs, targets, batch_size=8, epochs=2, shuffle=False, verbose=0)
    return model


@pytest.mark.parametrize("period", [1, 8])
@pytest.mark.parametrize(
    "inner",
    [
        lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
        lambda: keras.optimizers.AdamW(0.01, clipnorm=1.0, use_ema=True),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), dynamic_growth_steps=3),
    ],
    ids=["sgd", "adamw", "loss-scale"],
)
def test_fit_on_one_rank_is_plain_keras(inner, period):
    model = fit(hvd_keras.DistributedOptimizer(inner(), compression=EDEN2, period=period))
    plain = fit(inner())
    for ours, theirs in zip(model.weights, plain.weights, strict=True):
        assert ours.numpy().tobytes() == theirs.numpy().tobytes(), ours.path
    stats = model.optimizer.communication_stats()
    assert stats["steps"] == 10
    assert stats["bytes_sent"] == stats["uncompressed_bytes"] == 0
    assert stats["rounds"] == (10 if period == 1 else 2)  # the second is the flush at the end
    assert isinstance(model.optimizer, type(inner()))


OPTIONS = {
    "compression": EDEN2,
    "second_compression": hvd.Compression.maxscale(bits=8),
    "averaging": hvd.PeriodicAveraging(period=5, buffers="all"),
    "exchange": "two_phase",
    "small_tensor_threshold": 7,
    "bucket_cap_mb": 0.5,
    "seed": 2**63,
    "nonfinite": "propagate",
    "check_consistency": True,
    "backward_passes_per_step": 3,
    "average_aggregated_gradients": True,
    "scale_local_gradients": False,
}


@pytest.mark.parametrize(
    "options",
    [{}, OPTIONS, {"op": hvd.Sum}, {"gradient_predivide_factor": 2.0, "sparse_as_dense": True, "num_groups": 3}],
    ids=["defaults", "all", "sum", "stock"],
)
def test_the_configuration_survives_json_and_keras(options):
    inner = keras.optimizers.Adam(0.01, beta_1=0.8, clipnorm=2.0)
    optimizer = hvd_keras.DistributedOptimizer(inner, name="mine", **options)
    config = json.loads(json.dumps(optimizer.get_config()))
    again = type(optimizer).from_config(config)
    through_keras = keras.saving.deserialize_keras_object(
        json.loads(json.dumps(keras.saving.serialize_keras_object(optimizer)))
    )
    for copy in (again, through_keras):
        assert json.loads(json.dumps(copy.get_config())) == config
        assert isinstance(copy, keras.optimizers.Adam)
        assert (copy.name, copy.beta_1, copy.clipnorm) == ("mine", 0.8, 2.0)
        settings = copy._pqasgd_membership.value.description
        first = optimizer._pqasgd_membership.value.description
        assert settings == first
        ours, theirs = (each._pqasgd_averager.value for each in (optimizer, copy))
        assert type(ours) is type(theirs)
        assert getattr(ours, "_settings", None) == getattr(theirs, "_settings", None)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda d: d("sgd"), r"optimizer is a builtins\.str; it must be a Keras 3 optimizer"),
        (lambda d: d(keras.optimizers.SGD), r"optimizer is a builtins\.type; it must be"),
        (lambda d: d(d(keras.optimizers.SGD())), "already; pass the plain optimizer"),
        (lambda d: d(keras.optimizers.SGD(), op=hvd.Sum, period=2), "op is .* with period=2; .* use op=hvd.Average"),
        (lambda d: d(keras.optimizers.SGD(), op=hvd.Max), "op is .*; it must be hvd.Average or hvd.Sum"),
        (lambda d: d(keras.optimizers.SGD(), op=hvd.Adasum, compression=EDEN2), "op is .*Compression.none and"),
        (
            lambda d: d(keras.optimizers.SGD(), op=hvd.Sum, gradient_predivide_factor=2.0),
            "gradient_predivide_factor is 2.0 with op=.*; it needs op=hvd.Average",
        ),
        (lambda d: d(keras.optimizers.SGD(), compression="int8"), "compression is 'int8'; it must be one of"),
        (
            lambda d: d(keras.optimizers.SGD(), second_compression=3, period=2),
            "second_compression is 3; it must be one of",
        ),
        (
            lambda d: d(keras.optimizers.SGD(), second_compression=hvd.Compression.powersgd(), period=2),
            r"second_compression is Compression.powersgd\(.*here take a codec of flat vectors",
        ),
        (lambda d: d(keras.optimizers.SGD(), period=0), "period is 0"),
        (lambda d: d(keras.optimizers.SGD(), averaging=8), "averaging is 8; it must be a strategy such as"),
        (
            lambda d: d(keras.optimizers.SGD(), period=2, averaging=hvd.PeriodicAveraging(period=3)),
            "period is 2 and averaging is .*; give one of them",
        ),
        (lambda d: d(keras.optimizers.SGD(), exchange="ring"), "exchange is 'ring'; it must be one of 'auto'"),
        (lambda d: d(keras.optimizers.SGD(), nonfinite="skip"), "nonfinite is 'skip'; it must be one of 'raise'"),
        (lambda d: d(keras.optimizers.SGD(), bucket_cap_mb=0), "bucket_cap_mb is 0; it must be a number above 0"),
        (lambda d: d(keras.optimizers.SGD(), backward_passes_per_step=0), "backward_passes_per_step"),
        (lambda d: d(keras.optimizers.SGD(), num_groups=-1), "num_groups is -1; it must be a whole number from 0"),
        (lambda d: d(keras.optimizers.SGD(), groups=-1), "groups is -1; it must be a number, 0 or more, or a list"),
        (lambda d: d(keras.optimizers.SGD(), model="x"), "model is 'x'; it must be None or a keras.Model"),
        (lambda d: d(keras.optimizers.SGD(), check_consistency="no"), "check_consistency is 'no'; it must be True or"),
        (
            lambda d: d(keras.optimizers.SGD(), gradient_predivide_factor="2"),
            "gradient_predivide_factor is '2'; it must be a number above 0",
        ),
        (lambda d: d(keras.optimizers.SGD(), gradient_predivide_factor=0), "gradient_predivide_factor is 0; it must"),
        (lambda d: d(keras.optimizers.SGD(), period=2).flush("3"), "timeout is '3'; it must be a number of seconds"),
        (lambda d: d(keras.optimizers.SGD(), period=2).flush(-1), "timeout is -1; it must be a number of seconds"),
    ],
)  # fmt: skip
def test_wrong_arguments(make, text):
    for distribute in (hvd_keras.DistributedOptimizer, hvd.DistributedOptimizer):
        with pytest.raises(ArgumentError, match=text):
            make(distribute)


def test_another_backend_of_keras_is_refused(monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: "torch")
    with pytest.raises(ArgumentError, match="backend of Keras is 'torch'; it must be 'tensorflow': set KERAS_BACKEND"):
        hvd_keras.DistributedOptimizer(keras.optimizers.SGD(0.1))


def test_numbers_of_numpy_are_numbers():
    names = ("backward_passes_per_step", "small_tensor_threshold", "seed", "num_groups", "period")
    numbers = {name: np.int64(1) for name in names}
    numbers |= {name: np.float32(1) for name in ("gradient_predivide_factor", "bucket_cap_mb")}
    optimizer = hvd_keras.DistributedOptimizer(keras.optimizers.SGD(0.1), **numbers)
    config = json.loads(json.dumps(optimizer.get_config()))
    assert {config[name] for name in numbers if name in config} == {1}
    fit(optimizer)
    optimizer.flush(np.float32(1))


@pytest.mark.parametrize("options", [{}, {"compression": EDEN2}, {"compression": EDEN2, "period": 8}])
def test_who_is_alone_joins_itself(options):
    model = fit(hvd_keras.DistributedOptimizer(keras.optimizers.SGD(0.1), **options))
    assert model.optimizer.join() == 0
    assert model.optimizer.communication_stats()["bytes_sent"] == 0


def test_sets_of_ranks_that_horovod_does_not_know():
    with pytest.raises(ArgumentError, match=r"process_set is .*which is not registered"):
        hvd_keras.DistributedOptimizer(keras.optimizers.SGD(0.1), process_set=hvd.ProcessSet([0]))
    with pytest.raises(ArgumentError, match=r"process_set is .*which is not registered"):
        hvd.compressed_allreduce(tf.ones(3), process_set=hvd.ProcessSet([0]))
    optimizer = hvd_keras.DistributedOptimizer(keras.optimizers.SGD(0.1))
    with pytest.raises(ArgumentError, match=r"saved with process_set of ranks \[0, 7\], which is not registered"):
        type(optimizer).from_config({**optimizer.get_config(), "process_set": [0, 7]})


def test_a_compressor_of_the_users_own_needs_period_one():
    class Halving:
        @staticmethod
        def compress(tensor):
            return tensor / 2, None

        @staticmethod
        def decompress(tensor, ctx):
            return tensor * 2

    fit(hvd_keras.DistributedOptimizer(keras.optimizers.SGD(0.1), compression=Halving))
    with pytest.raises(
        ArgumentError, match=r"compression is .*Halving.* with period=2; a compressor of your own works"
    ):
        hvd_keras.DistributedOptimizer(keras.optimizers.SGD(0.1), compression=Halving, period=2)


def test_variables_that_cannot_be_averaged():
    for period in (1, 2):
        optimizer = hvd_keras.DistributedOptimizer(keras.optimizers.SGD(0.1), period=period)
        variable = tf.Variable(tf.ones(3, tf.complex64), name="phase")
        with pytest.raises(ArgumentError, match=r"'phase:0' has dtype complex64; it must be float32, .*keep it out of"):
            optimizer.apply([tf.ones(3, tf.complex64)], [variable])


def test_gradients_that_do_not_fit_the_variables():
    optimizer = hvd_keras.DistributedOptimizer(keras.optimizers.SGD(0.1))
    variables = [tf.Variable(1.0), tf.Variable(2.0)]
    with pytest.raises(ArgumentError, match="trainable_variables is None and the optimizer is not built"):
        optimizer.apply([tf.constant(1.0)])
    with pytest.raises(ArgumentError, match="grads has 1 entries for 2 variables"):
        optimizer.apply([tf.constant(1.0)], variables)
    with pytest.raises(ArgumentError, match="gradients are all None"):
        optimizer.apply([None, None], variables)
    with pytest.warns(UserWarning, match="Gradients do not exist"):  # Keras' own
        optimizer.apply([tf.constant(1.0), None], variables)
    with pytest.raises(ArgumentError, match=r"gradients are not those of the first step; what differs: .*Variable:0#2"):
        optimizer.apply([None, tf.constant(1.0)], variables)


@pytest.mark.parametrize("period", [1, 4])
def test_a_loss_scale_around_it_is_refused(period):
    optimizer = hvd_keras.DistributedOptimizer(keras.optimizers.SGD(0.1), period=period, compression=EDEN2)
    with pytest.raises(
        ArgumentError, match=r"LossScaleOptimizer after it was distributed.*pass DistributedOptimizer\("
    ):
        fit(keras.optimizers.LossScaleOptimizer(optimizer))


def test_mixed_precision_wraps_it_inside():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        optimizer = hvd_keras.DistributedOptimizer(keras.optimizers.SGD(0.1), period=2)
        assert isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        model = fit(optimizer)
        assert model.optimizer is optimizer
        assert optimizer.communication_stats()["steps"] == 10
    finally:
        keras.config.set_dtype_policy("float32")


def test_xla_is_switched_off_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="pqasgd_horovod"):
        model = fit(hvd_keras.DistributedOptimizer(keras.optimizers.SGD(0.1)), jit_compile=True)
    assert not model.jit_compile
    assert "jit_compile=True is set to False" in caplog.text


def test_a_local_variable_is_named_before_the_first_step():
    optimizer = hvd_keras.DistributedOptimizer(keras.optimizers.SGD(0.1), period=2)
    variable = tf.Variable(1.0, name="own")
    optimizer.apply([tf.constant(1.0)], [variable])
    with pytest.raises(ArgumentError, match="var is 'own:0', and training has begun"):
        optimizer.register_local_var(variable)


def test_everything_of_horovod_is_here():
    import horovod.tensorflow as horovod
    import horovod.tensorflow.keras as horovod_keras

    for ours, theirs in ((hvd, horovod), (hvd_keras, horovod_keras)):
        missing = {name for name in dir(theirs) if not name.startswith("_")} - set(dir(ours))
        assert {name for name in missing if not isinstance(getattr(theirs, name), type(tf))} == set()
        assert ours.DistributedOptimizer is not theirs.DistributedOptimizer
    assert hvd.allreduce is horovod.allreduce
    names = {name for name in dir(horovod_keras.callbacks) if name.endswith(("Callback", "Checkpoint"))}
    assert names <= set(dir(hvd_keras.callbacks))
