#!/usr/bin/env python3
"""Train a network with Horovod, PQASGD and Keras 3, by model.fit.

    horovodrun --gloo -np 2 python scripts/train_keras.py
    horovodrun -np 4 python scripts/train_keras.py --dataset cifar10 --data cifar-10-batches-py --bits 2 --period 16
    python scripts/train_keras.py               # one rank; nothing is sent

--stock sends what stock Horovod does, float32 gradients by Horovod's own allreduce, to compare with. Horovod's own
wrapper cannot be that: under Keras 3 it communicates nothing. train_tf.py is the same with a loop of one's own;
train.py, with PyTorch, also has a text model.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import horovod.tensorflow as horovod
import keras
from training.arguments import parse_arguments
from training.data import Task
from training.ranks import compression_of, on_all_ranks
from training.tensorflow.models import DATASETS
from training.tensorflow.trainer import Trainer, make_optimizer, start_ranks

import pqasgd_horovod.tensorflow.keras as hvd


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says."""
    args = parse_arguments(__doc__, argv, DATASETS)
    trainer = FitTrainer(start_ranks(args), args)
    if args.resume:
        trainer.resume()
    trainer.train()


class FitTrainer(Trainer):
    """Lets Keras train."""

    def __init__(self, task: Task, args: argparse.Namespace) -> None:
        super().__init__(task, args)
        optimizer = make_optimizer(args)
        self.optimizer = on_all_ranks(
            horovod,
            lambda: hvd.DistributedOptimizer(
                optimizer, compression=compression_of(hvd, args), period=args.period, seed=args.seed
            ),
            ValueError,
        )
        self.model.compile(self.optimizer, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))

    def train(self) -> None:
        """Train up to the last step, or the one to stop after; evaluate on the way."""
        progress = self.progress
        callbacks: list[Any] = [StepCallback(self), hvd.callbacks.CommunicationLogger()]
        if not self.args.resume:  # otherwise each rank has its own momentum to go on with
            callbacks.insert(0, hvd.callbacks.BroadcastGlobalVariablesCallback(root_rank=0))
        progress.start(self.task.sizes)
        self.model.fit(
            self.batches(),
            # Keras counts epochs from where it starts; a resumed run may do so in the middle of one.
            epochs=math.ceil((progress.total_steps - progress.step) / progress.steps_per_epoch),
            steps_per_epoch=progress.steps_per_epoch,
            callbacks=callbacks,
            shuffle=False,  # they come shuffled
            verbose=0,
        )
        progress.end(self.counted_bytes)


class StepCallback(keras.callbacks.Callback):
    """Does between Keras' steps what is due by their number, which an epoch need not be a multiple of."""

    def __init__(self, trainer: FitTrainer) -> None:
        super().__init__()
        self._trainer = trainer

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Set the learning rate, and have the loss be that of this batch, not the mean of the epoch so far."""
        self._trainer.set_learning_rate()
        self.model.reset_metrics()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Count, evaluate, save, stop."""
        self.model.stop_training = self._trainer.finish_step(float(logs["loss"]))


if __name__ == "__main__":
    main()
