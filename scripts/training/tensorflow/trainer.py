"""One rank of a run: what `model.fit` and a loop of one's own have in common."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import horovod.tensorflow as horovod
import keras
import numpy as np
import tensorflow as tf

from training import checkpoint
from training.batches import batches_after, count_steps
from training.data import Array, DataError, Task, load_task
from training.progress import Progress
from training.ranks import on_all_ranks, require_same, threads_per_rank
from training.tensorflow import files
from training.tensorflow.models import make_model

MOMENTUM = 0.9


def start_ranks(args: argparse.Namespace) -> Task:
    """Start Horovod, limit TensorFlow to this rank's cores, and return the data."""
    horovod.init()
    threads = threads_per_rank(horovod, args)
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    tf.config.experimental.enable_op_determinism()  # a resumed run is to repeat every bit

    task = on_all_ranks(horovod, lambda: load_task(args), DataError)
    require_same(horovod, "numbers of training and test examples", task.sizes)
    return task


def make_optimizer(args: argparse.Namespace) -> keras.optimizers.Optimizer:
    """Return the optimizer as a single process would use it."""
    if args.optimizer == "adamw":
        return keras.optimizers.AdamW(args.lr, weight_decay=args.weight_decay)
    # Keras keeps decay out of the momentum, in which PyTorch's adds up to 1 / (1 - momentum) times as much.
    decay = args.weight_decay / (1 - MOMENTUM) if args.weight_decay else None
    return keras.optimizers.SGD(args.lr, momentum=MOMENTUM, weight_decay=decay)


class Trainer:
    """Model and position in the data; subclasses make the optimizer of all ranks together, and train."""

    optimizer: Any

    def __init__(self, task: Task, args: argparse.Namespace) -> None:
        self.task, self.args = task, args
        self.rank, self.size = horovod.rank(), horovod.size()
        steps_per_epoch = on_all_ranks(horovod, lambda: count_steps(task, args, self.size), DataError)
        keras.utils.set_random_seed(args.seed)
        self.model = make_model(args.dataset)
        num_parameters = sum(int(np.prod(variable.shape)) for variable in self.model.trainable_variables)
        self.progress = Progress(
            args, self.rank, self.size, steps_per_epoch=steps_per_epoch, num_parameters=num_parameters
        )
        self._totals = tf.function(
            self._evaluate_batch,
            input_signature=[
                tf.TensorSpec((None, *self.model.input_shape[1:]), tf.float32),
                tf.TensorSpec((None,), tf.int64),
            ],
        )

    def batches(self) -> Iterator[tuple[Array, Array]]:
        """Return this rank's batches, those of the next step first."""
        return batches_after(self.progress.step, self.task, self.args, self.rank, self.size)

    # ---- checkpoints ----

    def resume(self) -> None:
        """Take over the checkpoint: the next step is the one that would have followed it."""
        path, settings = self.args.checkpoint, self.progress.settings
        saved = on_all_ranks(horovod, lambda: checkpoint.read(path, settings, files.load), checkpoint.CheckpointError)
        common, own = saved["common"], saved["ranks"][self.rank]
        self.progress.resume(common, own["bytes_sent"])
        self.model.set_weights(common["model"])
        self.optimizer.build(self.model.trainable_variables)
        self.optimizer.load_own_variables(own["optimizer"])

    def save(self) -> None:
        """Write the checkpoint, if one is wanted; collective."""
        if self.args.checkpoint is None:
            return
        common = {**self.progress.common_state(), "model": self.model.get_weights()}
        optimizer: dict[str, Any] = {}
        self.optimizer.save_own_variables(optimizer)  # the anchor and all counters are among them
        own = {"optimizer": optimizer, "bytes_sent": self.progress.bytes_sent(self.counted_bytes)}
        checkpoint.save(horovod, self.args.checkpoint, common, own, files.write)

    # ---- between steps ----

    @property
    def counted_bytes(self) -> int | None:
        """What this process has sent to train; None for Horovod, which does not count."""
        statistics = getattr(self.optimizer, "communication_stats", None)
        return None if statistics is None else int(statistics()["bytes_sent"])

    def set_learning_rate(self) -> None:
        """Set the rate of the next step."""
        self.optimizer.learning_rate = self.progress.learning_rate

    def finish_step(self, loss: float) -> bool:
        """Count a step, evaluate and save if that is due, and return whether to stop."""
        progress = self.progress
        progress.count_step(loss, self.counted_bytes)
        if progress.is_complete and hasattr(self.optimizer, "flush"):
            self.optimizer.flush()
        if not progress.evaluation_is_due:
            return False
        with progress.pause():
            test_loss, accuracy = self.evaluate()
            progress.evaluated(test_loss, accuracy, self.counted_bytes)
            self.save()
        return progress.is_over

    def evaluate(self) -> tuple[float, float]:
        """Return loss and accuracy on the test data, of which every rank takes its share; collective."""
        self._average_statistics()
        inputs, targets = (part[self.rank :: self.size] for part in self.task.test)
        totals = tf.zeros(3, tf.float64)
        for start in range(0, len(targets), self.args.batch_size):
            batch = slice(start, start + self.args.batch_size)
            totals += self._totals(self.task.prepare(inputs[batch], None), targets[batch])
        total_loss, correct, count = horovod.allreduce(totals, name="evaluation", op=horovod.Sum).numpy()
        return float(total_loss / count), float(correct / count)

    def _evaluate_batch(self, inputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        outputs = self.model(inputs, training=False)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, outputs)
        correct = tf.math.count_nonzero(tf.argmax(outputs, axis=1) == targets)
        return tf.stack([tf.cast(each, tf.float64) for each in (tf.reduce_sum(losses), correct, tf.size(targets))])

    def _average_statistics(self) -> None:
        """Replace BatchNorm's statistics, which each rank gathers on its own data, by their mean over the ranks."""
        for i, variable in enumerate(self.model.non_trainable_variables):
            variable.assign(horovod.allreduce(variable.value, name=f"statistics.{i}", op=horovod.Average))
