"""Callbacks of ``horovod.tensorflow.keras``, made to work under Keras 3, and three more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import horovod.tensorflow as horovod
import keras
import numpy as np

from ...errors import ArgumentError
from ..functions import broadcast_variables
from ..optimizer import DistributedMethods, switch_off_xla
from ..variables import unwrap


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):
    """Give every rank the variables of one, of model and optimizer, before the first step.

    It also switches off XLA (``jit_compile``), which Keras turns on where there is a GPU and which cannot compile
    Horovod's ops.

    Args:
        root_rank: the rank whose values everybody gets.
        device: accepted for Horovod's sake.

    >>> import pqasgd_horovod.tensorflow.keras as hvd
    >>> callback = hvd.callbacks.BroadcastGlobalVariablesCallback(root_rank=0)
    """

    def __init__(self, root_rank: int, device: str = "") -> None:
        super().__init__()
        self.root_rank = root_rank
        self.broadcast_done = False
        self._local: list[Any] = []

    def register_local_var(self, var: Any) -> None:
        """Leave a variable alone."""
        self._local.append(unwrap(var))

    def on_train_begin(self, logs: Any = None) -> None:
        """Broadcast; Keras has built model and optimizer by now, if it could before the first batch."""
        if isinstance(self.model.optimizer, DistributedMethods) and switch_off_xla(self.model):
            self.model.make_train_function(force=True)
        if self.broadcast_done:
            return
        optimizer = self.model.optimizer
        variables = [*self.model.variables, *optimizer.variables]
        state = getattr(optimizer, "_pqasgd_state", None)
        if state is not None:
            variables += state.common().values()
        broadcast_variables(
            [v for v in variables if not any(unwrap(v) is local for local in self._local)], self.root_rank
        )
        self.broadcast_done = True


class MetricAverageCallback(keras.callbacks.Callback):
    """Replace metrics by their means over the ranks, at the end of each epoch, when all ranks have ended it.

    Put it before callbacks that use metrics. A metric that some ranks do not have is averaged over those that do.

    >>> import pqasgd_horovod.tensorflow.keras as hvd
    >>> callback = hvd.callbacks.MetricAverageCallback()
    """

    def __init__(self, device: str = "", process_set: Any = horovod.global_process_set) -> None:
        super().__init__()
        self._process_set = process_set

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Average ``logs`` in place."""
        if logs is None:
            return
        _join_if_due(self.model)  # or the ranks that have more batches would wait for this one
        own = {name: float(value) for name, value in logs.items() if np.ndim(value) == 0}
        everybody = horovod.allgather_object(own, name="pqasgd.metrics", process_set=self._process_set)
        for name in own:
            logs[name] = float(np.mean([metrics[name] for metrics in everybody if name in metrics]))


class LearningRateScheduleCallback(keras.callbacks.Callback):
    r"""Set the learning rate to ``initial_lr`` times a multiplier, from ``start_epoch`` to ``end_epoch``.

    With ``momentum_correction`` SGD's momentum is scaled by :math:`\eta_{new} / \eta_{old}` whenever the rate changes:
    Keras keeps the rate inside of it, so without that a change would act on old gradients too.

    Args:
        initial_lr: the rate that is multiplied.
        multiplier: a function of the epoch, fractional with ``staircase=False``; or a constant c: c^(epoch - start).
        start_epoch: the first epoch of the schedule.
        end_epoch: the first epoch after it; None: to the end.
        staircase: change the rate at the beginning of each epoch only.
        momentum_correction: see above.
        steps_per_epoch: found out by itself, mostly.

    Source: Goyal et al., "Accurate, large minibatch SGD: training ImageNet in 1 hour", 2017, section 2.1.

    >>> import pqasgd_horovod.tensorflow.keras as hvd
    >>> callback = hvd.callbacks.LearningRateScheduleCallback(0.1, multiplier=0.5, start_epoch=2)
    >>> callback.multiplier(4)
    0.25
    """

    def __init__(
        self,
        initial_lr: float,
        multiplier: float | Callable[[float], float],
        start_epoch: int = 0,
        end_epoch: int | None = None,
        staircase: bool = True,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__()
        if initial_lr is None:
            raise ArgumentError("initial_lr is None; it must be the learning rate that is multiplied")
        self.initial_lr = initial_lr
        self.multiplier = multiplier if callable(multiplier) else lambda epoch: multiplier ** (epoch - start_epoch)
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch
        self.staircase = staircase
        self.momentum_correction = momentum_correction
        self.steps_per_epoch = steps_per_epoch
        self._epoch = 0

    def on_train_begin(self, logs: Any = None) -> None:
        """Find out how long an epoch is."""
        if not self.staircase and not self.steps_per_epoch:
            self.steps_per_epoch = self.params.get("steps")
            if not self.steps_per_epoch:
                raise ArgumentError(
                    f"steps_per_epoch is {self.steps_per_epoch}, and Keras does not know it: pass it to "
                    f"{type(self).__name__}"
                )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Take note of the epoch."""
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Set the rate."""
        if self._epoch < self.start_epoch or (self.end_epoch is not None and self._epoch >= self.end_epoch):
            return
        if self.staircase:
            if batch == 0:
                self._set(self._epoch)
        else:
            assert self.steps_per_epoch
            self._set(self._epoch + batch / self.steps_per_epoch)

    def _set(self, epoch: float) -> None:
        optimizer = self.model.optimizer
        old, new = float(optimizer.learning_rate), self.initial_lr * self.multiplier(epoch)
        optimizer.learning_rate = new
        momentums = getattr(getattr(optimizer, "inner_optimizer", optimizer), "momentums", None)
        if self.momentum_correction and momentums and old > 0 and new != old:
            for momentum in momentums:
                momentum.assign(momentum * (new / old))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Log the rate."""
        if logs is not None:
            logs["lr"] = float(self.model.optimizer.learning_rate)


class LearningRateWarmupCallback(LearningRateScheduleCallback):
    """Raise the learning rate from ``initial_lr / size`` to ``initial_lr`` in the first epochs.

    Args:
        initial_lr: the rate at the end.
        warmup_epochs: how many epochs it takes.
        momentum_correction: as in :class:`LearningRateScheduleCallback`.
        steps_per_epoch: likewise.
        verbose: 1: say so when it is done.

    Source: Goyal et al., 2017, section 2.2.

    >>> import pqasgd_horovod.tensorflow.keras as hvd
    >>> callback = hvd.callbacks.LearningRateWarmupCallback(0.1, warmup_epochs=3)
    """

    def __init__(
        self,
        initial_lr: float,
        warmup_epochs: int = 5,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        verbose: int = 0,
    ) -> None:
        def multiplier(epoch: float) -> float:
            assert self.steps_per_epoch
            size = horovod.size()
            # As Horovod: round numbers at the ends of epochs.
            return 1.0 / size * ((epoch + 1.0 / self.steps_per_epoch) * (size - 1) / warmup_epochs + 1)

        super().__init__(initial_lr, multiplier, 0, warmup_epochs, False, momentum_correction, steps_per_epoch)
        self.verbose = verbose

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Log the rate, and say when it is there."""
        super().on_epoch_end(epoch, logs)
        if self.verbose and self.end_epoch is not None and epoch == self.end_epoch - 1 and horovod.rank() == 0:
            rate = float(self.model.optimizer.learning_rate)
            print(f"\nEpoch {epoch + 1}: finished gradual learning rate warmup to {rate:g}.")


class BestModelCheckpoint(keras.callbacks.ModelCheckpoint):
    """Keep the best model so far; ``filepath`` is to be set before ``fit``.

    >>> import pqasgd_horovod.tensorflow.keras as hvd
    >>> callback = hvd.callbacks.BestModelCheckpoint(monitor="val_loss")
    >>> callback.filepath = "best.keras"
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        verbose: int = 0,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: str | int = "epoch",
    ) -> None:
        filepath = "best.weights.h5" if save_weights_only else "best.keras"
        super().__init__(filepath, monitor, verbose, True, save_weights_only, mode, save_freq)


class FlushCallback(keras.callbacks.Callback):
    """Average a last partial period before the model is evaluated or saved, and at the end: on every rank.

    Put it before callbacks that save; and, with :class:`MetricAverageCallback` after it, before those that decide by
    metrics (``EarlyStopping``, ``ReduceLROnPlateau``), or each rank decides by its own. Without it ``fit`` ends with a
    flush all the same, but what is validated or saved before is this rank's replica.

    >>> import pqasgd_horovod.tensorflow.keras as hvd
    >>> callback = hvd.callbacks.FlushCallback()
    """

    def _flush(self) -> None:
        optimizer = _distributed(self)
        _join_if_due(self.model)
        optimizer.flush()

    def on_test_begin(self, logs: Any = None) -> None:
        """Flush before validation."""
        self._flush()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Flush before callbacks that save."""
        self._flush()

    def on_train_end(self, logs: Any = None) -> None:
        """Flush at the end."""
        self._flush()


class JoinCallback(keras.callbacks.Callback):
    """Call ``optimizer.join()`` at the end of each epoch, for ranks with different numbers of batches: on every rank.

    A rank whose epoch has ended takes part in the averages of the others, with weight zero, until theirs have; then all
    replicas are the same, and are validated and saved. Put it before callbacks that save, or do something with other
    ranks; ``FlushCallback`` is not needed beside it. The number of epochs has to be the same on every rank.

    Raises ArgumentError at the beginning of training where ``join()`` is not possible.

    >>> import pqasgd_horovod.tensorflow.keras as hvd
    >>> callback = hvd.callbacks.JoinCallback()
    """

    def on_train_begin(self, logs: Any = None) -> None:
        """Refuse what cannot be joined."""
        _distributed(self)._check_for_join()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Take note that there are batches to come."""
        self.model.optimizer._pqasgd_join_is_due = True

    def on_test_begin(self, logs: Any = None) -> None:
        """Join before validation, which comes before the end of the epoch."""
        _join_if_due(self.model)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Join before callbacks that save."""
        _join_if_due(self.model)


def _distributed(callback: keras.callbacks.Callback) -> Any:
    """Return the optimizer of the callback's model; raise ArgumentError unless it is one of ours."""
    optimizer = callback.model.optimizer
    if not isinstance(optimizer, DistributedMethods):
        raise ArgumentError(
            f"the model's optimizer is a {type(optimizer).__name__}; {type(callback).__name__} needs a "
            "DistributedOptimizer of pqasgd_horovod.tensorflow.keras"
        )
    return optimizer


def _join_if_due(model: Any) -> None:
    """Join, once, if there is a :class:`JoinCallback` and this rank has ended an epoch; collective."""
    if getattr(model.optimizer, "_pqasgd_join_is_due", False):
        model.optimizer._pqasgd_join_is_due = False
        model.optimizer.join()


class CommunicationLogger(keras.callbacks.Callback):
    """Log what was communicated at the end of each epoch: ``bytes_sent``, ``rounds`` and ``compression_ratio``.

    Put it before callbacks that write logs, such as TensorBoard and CSVLogger, which then have it too.

    >>> import pqasgd_horovod.tensorflow.keras as hvd
    >>> callback = hvd.callbacks.CommunicationLogger()
    """

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add the totals so far."""
        optimizer = _distributed(self)
        if logs is not None:
            _join_if_due(self.model)
            statistics = optimizer.communication_stats()
            logs.update({name: statistics[name] for name in ("bytes_sent", "rounds", "compression_ratio")})
