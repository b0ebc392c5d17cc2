"""The callbacks that ranks go through together."""

from __future__ import annotations

import re

import keras
import numpy as np
import pytest

import pqasgd_horovod.tensorflow as hvd
import pqasgd_horovod.tensorflow.keras as hvd_keras
from pqasgd_horovod.errors import ArgumentError
from tests.ranks_tensorflow.common import (
    EDEN2,
    EDEN4,
    assert_equal,
    assert_replicas_equal,
    compiled,
    differ,
    everybody,
    examples,
    fit,
    make_model,
    several_ranks,
    weights,
    wrap,
)

callbacks = hvd_keras.callbacks


def sgd():
    return keras.optimizers.SGD(0.1, momentum=0.9)


@pytest.mark.parametrize("options", [{"period": 4}, {}], ids=["period4", "coded"])
def test_broadcast_makes_ranks_start_alike(options):
    model = make_model(norm=True, dropout=True, seed=1 + hvd.rank())
    own = weights(model)
    (seed,) = (v for v in model.variables if "seed_generator" in v.path)
    expected = everybody(own)[hvd.size() - 1]
    started = []

    class Start(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            started.append(weights(self.model))

    broadcast = callbacks.BroadcastGlobalVariablesCallback(hvd.size() - 1)
    optimizer = wrap(sgd(), averaging=None, period=options.get("period", 1), compression=EDEN4)
    compiled(optimizer, model)
    fit(model, 5, callbacks=[broadcast, Start()])
    assert_equal(started[0], expected)
    assert_replicas_equal(model.trainable_variables)
    fit(model, 1, callbacks=[broadcast])  # once is enough
    assert len(set(everybody(tuple(seed.numpy())))) == hvd.size()  # every rank drops its own


def test_a_variable_may_be_left_out_of_the_broadcast():
    model = compiled(wrap(sgd(), compression=EDEN4), make_model(norm=True))
    moving = model.layers[1].moving_mean
    moving.assign(np.full(moving.shape, hvd.rank(), np.float32))
    callback = callbacks.BroadcastGlobalVariablesCallback(0)
    callback.register_local_var(moving)
    started = []

    class Start(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            started.append(moving.numpy())

    fit(model, 1, callbacks=[callback, Start()])
    np.testing.assert_array_equal(started[0], np.full(moving.shape, hvd.rank(), np.float32))


def test_metrics_are_averaged_over_the_ranks_that_have_them():
    class Own(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs["rank"] = hvd.rank()
            if hvd.rank() == 0:
                logs["only_here"] = 5.0

    model = compiled(wrap(sgd(), compression=EDEN4))
    history = fit(model, 2, callbacks=[Own(), callbacks.MetricAverageCallback()])
    assert history["rank"] == [(hvd.size() - 1) / 2]
    assert history.get("only_here") == ([5.0] if hvd.rank() == 0 else None)
    assert len(set(everybody(history["loss"][0]))) == 1
    alone = compiled(wrap(sgd(), compression=EDEN4))
    losses = everybody(fit(alone, 2)["loss"][0])
    assert history["loss"][0] == pytest.approx(np.mean(losses), rel=1e-6)  # Keras keeps float32
    assert len(set(losses)) == hvd.size()


@pytest.mark.parametrize("flushed", [True, False], ids=["flush", "no-flush"])
def test_flush_before_validation_gives_every_rank_the_same_number(flushed):
    held_out = examples(4, rank=99)
    model = compiled(wrap(sgd(), averaging=None, period=4, compression=EDEN2), make_model(norm=True))
    history = fit(
        model, 6, validation_data=held_out, validation_batch_size=32,
        callbacks=[callbacks.FlushCallback()] if flushed else [],
    )  # fmt: skip
    numbers = everybody(history["val_loss"][0])
    assert (len(set(numbers)) == 1) == (flushed or hvd.size() == 1)
    # Without the callback fit flushes at its very end all the same.
    assert len(set(everybody(model.evaluate(*held_out, verbose=0)))) == 1
    assert model.optimizer.communication_stats()["rounds"] == 2
    assert not differ(weights(model))


def test_flush_callback_needs_an_optimizer_that_can():
    with pytest.raises(ArgumentError, match="optimizer is a SGD; FlushCallback needs"):
        fit(compiled(sgd()), 1, callbacks=[callbacks.FlushCallback()])


def test_communication_is_logged():
    model = compiled(wrap(sgd(), period=2, compression=EDEN4))
    history = fit(model, 4, callbacks=[callbacks.CommunicationLogger()], epochs=2)
    stats = model.optimizer.communication_stats()
    assert history["rounds"] == [2, 4]
    assert history["bytes_sent"] == [stats["bytes_sent"] // 2, stats["bytes_sent"]]
    assert history["compression_ratio"][1] == stats["compression_ratio"]


@several_ranks
def test_warm_up_ends_at_the_rate_asked_for(capfd):
    rates = []

    class Rates(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            rates.append(float(self.model.optimizer.learning_rate))

    model = compiled(wrap(sgd(), period=2, compression=EDEN4))
    warm_up = callbacks.LearningRateWarmupCallback(0.1, warmup_epochs=2, verbose=1)
    history = fit(model, 4, epochs=3, callbacks=[warm_up, Rates()])
    size = hvd.size()
    # Linear in steps, from a quarter of an epoch on; float32 rates.
    expected = [0.1 / size * ((step + 1) / 4 * (size - 1) / 2 + 1) for step in range(8)] + [0.1] * 4
    assert rates == pytest.approx(expected, rel=1e-6)
    assert history["lr"] == pytest.approx([expected[3], 0.1, 0.1], rel=1e-6)
    said = re.search(r"Epoch 2: finished gradual learning rate warmup to 0\.1", capfd.readouterr().out)
    assert bool(said) == (hvd.rank() == 0)
