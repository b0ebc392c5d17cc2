"""After every average in ``model.fit`` the replicas have the same bits; with Horovod's own optimizer they do not."""

from __future__ import annotations

import horovod.tensorflow.keras as horovod
import keras
import pytest

import pqasgd_horovod.tensorflow as hvd
from tests.ranks_tensorflow.common import (
    EDEN4,
    assert_replicas_equal,
    compiled,
    differ,
    fit,
    several_ranks,
    weights,
    wrap,
)

pytestmark = several_ranks


class Bits(keras.callbacks.Callback):
    """Looks at every rank's bits after each step, by itself."""

    def __init__(self):
        super().__init__()
        self.differed = []

    def on_train_batch_end(self, batch, logs=None):
        self.differed.append(differ(weights(self.model)))


def sgd():
    return keras.optimizers.SGD(0.05, momentum=0.9)


def adam():
    return keras.optimizers.Adam(0.01)


@pytest.mark.parametrize(
    ("inner", "options"),
    [
        (sgd, {"period": 4, "compression": EDEN4, "exchange": "allgather"}),
        (adam, {"period": 4, "compression": hvd.Compression.maxscale(bits=4), "exchange": "two_phase"}),
        (adam, {"period": 4, "compression": hvd.Compression.none, "exchange": "two_phase"}),
        (sgd, {"period": 1, "compression": EDEN4, "exchange": "two_phase"}),
        (adam, {"period": 1, "compression": hvd.Compression.maxscale(bits=4), "exchange": "allgather"}),
        (sgd, {"period": 1, "compression": hvd.Compression.none}),
        (adam, {"period": 1, "compression": hvd.Compression.fp16}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "-".join(map(str, value.values())),
)
def test_replicas_are_bit_identical_after_every_average(inner, options):
    bits = Bits()
    model = compiled(wrap(inner(), **options))
    fit(model, 9, callbacks=[bits])
    period = options["period"]
    assert bits.differed == [step % period != 0 for step in range(1, 10)]
    assert_replicas_equal(model)  # what was left of a period is averaged at the end
    stats = model.optimizer.communication_stats()
    assert (stats["steps"], stats["rounds"]) == (9, -(-9 // period))


def test_horovods_own_optimizer_lets_ranks_drift():
    """The control of the test above, and the reason for this front end: if it fails, Horovod has learned Keras 3."""
    bits = Bits()
    model = compiled(horovod.DistributedOptimizer(sgd()))
    fit(model, 3, callbacks=[bits])
    assert bits.differed == [True] * 3
