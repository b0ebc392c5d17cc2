#!/usr/bin/env python3
"""Train a network with Horovod, PQASGD and TensorFlow, in a loop of one's own.

    horovodrun --gloo -np 2 python scripts/train_tf.py
    horovodrun -np 4 python scripts/train_tf.py --dataset cifar10 --data cifar-10-batches-py --bits 2 --period 16
    python scripts/train_tf.py                  # one rank; nothing is sent

--stock trains with Horovod's own gradient tape instead, to compare with. train_keras.py is the same with model.fit;
train.py, with PyTorch, also has a text model.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import keras
import tensorflow as tf
from training.arguments import parse_arguments
from training.data import Task
from training.ranks import compression_of, on_all_ranks
from training.tensorflow.models import DATASETS
from training.tensorflow.trainer import Trainer, make_optimizer, start_ranks


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says."""
    args = parse_arguments(__doc__, argv, DATASETS)
    hvd = importlib.import_module("horovod.tensorflow" if args.stock else "pqasgd_horovod.tensorflow")
    trainer = LoopTrainer(hvd, start_ranks(args), args)
    if args.resume:
        trainer.resume()
    trainer.train()


class LoopTrainer(Trainer):
    """Trains step by step."""

    def __init__(self, hvd: Any, task: Task, args: argparse.Namespace) -> None:
        super().__init__(task, args)
        self.hvd = hvd
        # Horovod's own functions know the variables of TensorFlow only, which those of Keras hold.
        self.weights = [variable.value for variable in self.model.trainable_variables]
        hvd.broadcast_variables([variable.value for variable in self.model.variables], root_rank=0)
        optimizer = make_optimizer(args)
        if args.stock:  # the tape averages, the optimizer is a plain one
            self.optimizer = optimizer
            return
        # With period=1 a DistributedGradientTape would do as well; but the optimizer saves where its rounding noise is.
        self.optimizer = on_all_ranks(
            hvd,
            lambda: hvd.DistributedOptimizer(
                optimizer,
                compression=compression_of(hvd, args),
                period=args.period,
                seed=args.seed,
                model=self.model,  # whose BatchNorm statistics are averaged too
            ),
            ValueError,
        )

    def train(self) -> None:
        """Train up to the last step, or the one to stop after; evaluate on the way."""
        self.optimizer.build(self.model.trainable_variables)
        loss_function = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

        @tf.function
        def take_step(inputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
            tape = tf.GradientTape()
            if self.args.stock:
                tape = self.hvd.DistributedGradientTape(tape)
            with tape:
                loss = loss_function(targets, self.model(inputs, training=True))
            gradients = tape.gradient(loss, self.weights)
            self.optimizer.apply_gradients(zip(gradients, self.model.trainable_variables, strict=True))
            return loss

        self.progress.start(self.task.sizes)
        for inputs, targets in self.batches():
            self.set_learning_rate()
            loss = take_step(tf.constant(inputs), tf.constant(targets))
            if self.finish_step(float(loss)):
                break
        self.progress.end(self.counted_bytes)


if __name__ == "__main__":
    main()
