"""Learning rates, and what a change of them does to the momentum that Keras keeps the rate in."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import pqasgd_horovod.tensorflow as hvd
import pqasgd_horovod.tensorflow.keras as hvd_keras
from pqasgd_horovod.errors import ArgumentError

callbacks = hvd_keras.callbacks
EPOCHS, STEPS = 5, 4
FACTORS = {0: 1.0, 1: 1.0, 2: 0.5, 3: 0.25, 4: 0.125}


class Rates(keras.callbacks.Callback):
    """The rate of each step."""

    def __init__(self):
        super().__init__()
        self.rates = []

    def on_train_batch_end(self, batch, logs=None):
        self.rates.append(float(self.model.optimizer.learning_rate))


def sum_of_outputs(_, output):
    return keras.ops.sum(output, axis=-1)


def fit(optimizer, *more):
    """The loss is the sum of the weights, so that each gradient is 1, whatever the rate."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(3, use_bias=False, kernel_initializer="ones")])
    model.compile(optimizer, loss=sum_of_outputs)
    rates = Rates()
    history = model.fit(
        np.ones((STEPS, 1)), np.ones((STEPS, 3)), batch_size=1, epochs=EPOCHS, verbose=0, callbacks=[*more, rates]
    )
    return model, rates.rates, history.history


def distributed(inner, **options):
    return hvd_keras.DistributedOptimizer(inner, **options)


@pytest.mark.parametrize("multiplier", [0.5, lambda epoch: FACTORS[epoch]], ids=["constant", "function"])
def test_a_staircase(multiplier):
    schedule = callbacks.LearningRateScheduleCallback(0.4, multiplier, start_epoch=1)
    _, rates, history = fit(distributed(keras.optimizers.SGD(0.4), period=2), schedule)
    expected = [0.4 * FACTORS[epoch] for epoch in range(EPOCHS)]
    assert rates == pytest.approx(np.repeat(expected, STEPS), rel=1e-6)  # Keras keeps float32
    assert history["lr"] == pytest.approx(expected, rel=1e-6)


def test_it_acts_between_its_epochs_only():
    schedule = callbacks.LearningRateScheduleCallback(0.4, lambda epoch: 0.1, start_epoch=1, end_epoch=3)
    _, rates, _ = fit(distributed(keras.optimizers.SGD(0.4)), schedule)
    # After its end the rate stays as it was left.
    assert rates == pytest.approx([0.4] * STEPS + [0.04] * STEPS * 4, rel=1e-6)


def test_a_smooth_schedule_knows_fractions_of_epochs():
    schedule = callbacks.LearningRateScheduleCallback(0.4, lambda epoch: 1 / (1 + epoch), staircase=False)
    _, rates, _ = fit(distributed(keras.optimizers.SGD(0.4)), schedule)
    assert rates == pytest.approx([0.4 / (1 + step / STEPS) for step in range(EPOCHS * STEPS)], rel=1e-6)


@pytest.mark.parametrize("nested", [False, True], ids=["sgd", "loss-scale"])
@pytest.mark.parametrize("corrected", [True, False])
def test_momentum_correction_is_that_of_goyal_et_al(corrected, nested):
    """With correction the update is ``w -= rate * u``, ``u = m u + gradient``: a new rate acts on old gradients too."""
    inner = keras.optimizers.SGD(0.4, momentum=0.9)
    optimizer = distributed(keras.optimizers.LossScaleOptimizer(inner) if nested else inner)
    schedule = callbacks.LearningRateScheduleCallback(0.4, lambda epoch: FACTORS[epoch], momentum_correction=corrected)
    model, rates, _ = fit(optimizer, schedule)
    weight, u, velocity = 1.0, 0.0, 0.0
    for rate in rates:
        u = 0.9 * u + 1.0
        velocity = 0.9 * velocity - rate
        weight += -rate * u if corrected else velocity
    sgd = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    # 20 steps, each rounded to float32 a few times.
    np.testing.assert_allclose(sgd.momentums[0].numpy(), -rates[-1] * u if corrected else velocity, rtol=1e-5)
    np.testing.assert_allclose(model.weights[0].numpy(), weight, rtol=1e-5)


def test_optimizers_without_momentum_are_left_alone():
    schedule = callbacks.LearningRateScheduleCallback(0.4, 0.5)
    fit(distributed(keras.optimizers.RMSprop(0.4)), schedule)
    fit(distributed(keras.optimizers.SGD(0.4)), schedule)


def test_warm_up_on_one_rank_is_no_warm_up():
    warm_up = callbacks.LearningRateWarmupCallback(0.4, warmup_epochs=2)
    _, rates, _ = fit(distributed(keras.optimizers.SGD(0.4), period=2), warm_up)
    assert rates == pytest.approx([0.4] * EPOCHS * STEPS, rel=1e-6)


def test_wrong_arguments():
    with pytest.raises(ArgumentError, match="initial_lr is None; it must be the learning rate"):
        callbacks.LearningRateScheduleCallback(None, 0.5)
    smooth = callbacks.LearningRateScheduleCallback(0.4, lambda epoch: 1.0, staircase=False)
    smooth.set_params({"steps": None})
    with pytest.raises(ArgumentError, match=r"steps_per_epoch is None.*pass it to LearningRateScheduleCallback"):
        smooth.on_train_begin()
    with pytest.raises(ArgumentError, match="optimizer is a SGD; CommunicationLogger needs a DistributedOptimizer"):
        fit(keras.optimizers.SGD(0.1), callbacks.CommunicationLogger())


def test_the_best_model_is_kept(tmp_path):
    best = callbacks.BestModelCheckpoint(monitor="loss")
    best.filepath = str(tmp_path / "best.keras")
    fit(distributed(keras.optimizers.SGD(0.1, momentum=0.9), period=2, compression=hvd.Compression.eden(bits=2)), best)
    loaded = keras.models.load_model(best.filepath, compile=False)
    assert loaded.count_params() == 3
