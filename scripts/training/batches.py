"""Which examples a rank trains on, and in what order: it follows from seed, rank and step, without any state."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import count

import numpy as np

from training.data import Array, DataError, Task

_ORDER, _AUGMENTATION = range(2)


def count_steps(task: Task, args: argparse.Namespace, num_ranks: int) -> int:
    """Return the steps of an epoch; raise DataError if there is none."""
    share = task.sizes[0] // num_ranks
    if args.batch_size > share:
        raise DataError(f"--batch-size is {args.batch_size}, but each of {num_ranks} ranks has only {share} examples")
    return share // args.batch_size


def augmentation(seed: int, rank: int, step: int) -> np.random.Generator:
    """Return the random numbers that change a batch's images."""
    return np.random.default_rng((seed, _AUGMENTATION, rank, step))


def batches_after(
    step: int, task: Task, args: argparse.Namespace, rank: int, num_ranks: int
) -> Iterator[tuple[Array, Array]]:
    """Yield this rank's batches of step + 1, step + 2, ..., epoch after epoch without end.

    In an epoch no two ranks see the same example. PyTorch has a sampler of its own instead.
    """
    steps = count_steps(task, args, num_ranks)
    first_epoch, done = divmod(step, steps)
    for epoch in count(first_epoch):
        order = np.random.default_rng((args.seed, _ORDER, epoch)).permutation(task.sizes[0])[rank::num_ranks]
        for i in range(done if epoch == first_epoch else 0, steps):
            chosen = order[i * args.batch_size : (i + 1) * args.batch_size]
            generator = augmentation(args.seed, rank, epoch * steps + i)
            yield task.prepare(task.train.inputs[chosen], generator), task.train.targets[chosen]
