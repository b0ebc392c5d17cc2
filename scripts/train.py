#!/usr/bin/env python3
"""Train a network with Horovod and PQASGD.

    horovodrun --gloo -np 2 python scripts/train.py
    horovodrun -np 4 python scripts/train.py --dataset cifar10 --data cifar-10-batches-py --bits 2 --period 16
    mpirun -np 2 python scripts/train.py --dataset text --data book.txt --checkpoint book.pt --log-file book.jsonl
    python scripts/train.py                     # one rank; nothing is sent

--stock trains with Horovod's own optimizer instead, to compare with. train_keras.py and train_tf.py do the same with
TensorFlow, on digits and CIFAR-10.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset
from training import checkpoint
from training.arguments import parse_arguments
from training.batches import augmentation, count_steps
from training.data import DataError, Examples, Task, load_task
from training.progress import Progress
from training.ranks import compression_of, on_all_ranks, require_same, threads_per_rank
from training.torch import files
from training.torch.models import average_buffers, make_model


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says."""
    args = parse_arguments(__doc__, argv)
    hvd = importlib.import_module("horovod.torch" if args.stock else "pqasgd_horovod.torch")
    hvd.init()
    torch.set_num_threads(threads_per_rank(hvd, args))

    task = on_all_ranks(hvd, lambda: load_task(args), DataError)
    require_same(hvd, "numbers of training and test examples", task.sizes)
    trainer = Trainer(hvd, task, args)
    if args.resume:
        trainer.resume()
    trainer.train()


def distribute(hvd: Any, optimizer: torch.optim.Optimizer, model: torch.nn.Module, args: argparse.Namespace) -> Any:
    """Return the optimizer of all ranks together: Horovod's own, or this package's."""
    if args.stock:
        return hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    return hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        compression=compression_of(hvd, args),
        period=args.period,
        seed=args.seed,
    )


class Trainer:
    """One rank of a run: model, optimizer and position in the data."""

    def __init__(self, hvd: Any, task: Task, args: argparse.Namespace) -> None:
        self.hvd, self.task, self.args = hvd, task, args
        steps_per_epoch = on_all_ranks(hvd, lambda: count_steps(task, args, hvd.size()), DataError)
        self.loader, self.sampler = make_loader(hvd, task.train, args)

        torch.manual_seed(args.seed)
        self.model = make_model(task, args.dataset)
        hvd.broadcast_parameters(self.model.state_dict(), root_rank=0)
        num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.progress = Progress(
            args, hvd.rank(), hvd.size(), steps_per_epoch=steps_per_epoch, num_parameters=num_parameters
        )
        optimizer = make_optimizer(self.model, args)
        self.optimizer = on_all_ranks(hvd, lambda: distribute(hvd, optimizer, self.model, args), ValueError)
        self.schedule = LambdaLR(self.optimizer, self.progress.rate_factor)
        torch.manual_seed(args.seed * 1_000_003 + hvd.rank())  # dropout differs from rank to rank

    def resume(self) -> None:
        """Take over the checkpoint: the next step is the one that would have followed it."""
        path, settings = self.args.checkpoint, self.progress.settings
        saved = on_all_ranks(self.hvd, lambda: checkpoint.read(path, settings, files.load), checkpoint.CheckpointError)
        common, own = saved["common"], saved["ranks"][self.hvd.rank()]
        self.progress.resume(common, own["bytes_sent"])
        self.model.load_state_dict(common["model"])
        self.schedule.load_state_dict(common["schedule"])
        self.optimizer.load_state_dict(own["optimizer"])
        torch.set_rng_state(own["random"])

    def save(self) -> None:
        """Write the checkpoint, if one is wanted; collective."""
        if self.args.checkpoint is None:
            return
        common = {
            **self.progress.common_state(),
            "model": self.model.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        own = {
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "bytes_sent": self.progress.bytes_sent(self.counted_bytes),
        }
        checkpoint.save(self.hvd, self.args.checkpoint, common, own, files.write)

    @property
    def counted_bytes(self) -> int | None:
        """What this process has sent to train; None for Horovod, which does not count."""
        return None if self.args.stock else int(self.optimizer.communication_stats()["bytes_sent"])

    def train(self) -> None:
        """Train up to the last step, or the one to stop after; evaluate on the way."""
        hvd, args, progress = self.hvd, self.args, self.progress
        progress.start(self.task.sizes)
        self.model.train()
        for inputs, targets in batches_after(progress.step, self.loader, self.sampler):
            generator = augmentation(args.seed, hvd.rank(), progress.step)
            prepared = torch.from_numpy(self.task.prepare(inputs.numpy(), generator))
            loss = cross_entropy(self.model(prepared), targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            progress.count_step(loss.item(), self.counted_bytes)

            if progress.is_complete and not args.stock:
                self.optimizer.flush()
            if progress.evaluation_is_due:
                with progress.pause():
                    test_loss, accuracy = evaluate(hvd, self.model, self.task, args.batch_size)
                    progress.evaluated(test_loss, accuracy, self.counted_bytes)
                    self.save()
                if progress.is_over:
                    break
        progress.end(self.counted_bytes)


def make_loader(hvd: Any, train: Examples, args: argparse.Namespace) -> tuple[DataLoader[Any], DistributedSampler[Any]]:
    """Return the training batches of this rank: a part of the data that no other rank sees in the same epoch."""
    dataset = as_dataset(train)
    sampler: DistributedSampler[Any] = DistributedSampler(
        dataset, hvd.size(), hvd.rank(), shuffle=True, seed=args.seed, drop_last=True
    )
    loader = DataLoader(
        dataset,
        sampler=BatchSampler(sampler, args.batch_size, drop_last=True),
        batch_size=None,  # the sampler gives whole batches: one index into tensors each
        generator=torch.Generator(),  # so that the global one, which a checkpoint holds, is left alone
    )
    return loader, sampler


def as_dataset(examples: Examples) -> TensorDataset:
    """Return examples as PyTorch takes them."""
    return TensorDataset(*map(torch.from_numpy, examples))


def batches_after(step: int, loader: DataLoader[Any], sampler: DistributedSampler[Any]) -> Iterator[Any]:
    """Yield the batches of step + 1, step + 2, ..., epoch after epoch without end."""
    first_epoch, done = divmod(step, len(loader))
    for epoch in count(first_epoch):
        sampler.set_epoch(epoch)  # another order in each epoch
        yield from islice(loader, done if epoch == first_epoch else 0, None)


def make_optimizer(model: torch.nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """Return the optimizer as a single process would use it."""
    if args.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay)
    return torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)


@torch.no_grad()
def evaluate(hvd: Any, model: torch.nn.Module, task: Task, batch_size: int) -> tuple[float, float]:
    """Return loss and accuracy on the test data, of which every rank takes its share; collective."""
    average_buffers(hvd, model)
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64)
    test = as_dataset(task.test)
    share = range(hvd.rank(), task.sizes[1], hvd.size())
    for indices in BatchSampler(share, batch_size, drop_last=False):
        inputs, targets = test[indices]
        outputs = model(torch.from_numpy(task.prepare(inputs.numpy(), None)))
        loss = cross_entropy(outputs, targets, reduction="sum")
        totals += torch.tensor([loss, (outputs.argmax(dim=1) == targets).sum(), targets.numel()])
    model.train()
    total_loss, correct, num_targets = hvd.allreduce(totals, name="evaluation", op=hvd.Sum).tolist()
    return total_loss / num_targets, correct / num_targets


if __name__ == "__main__":
    main()
