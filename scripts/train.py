#!/usr/bin/env python3
"""Train a network with Horovod and PQASGD.

    horovodrun --gloo -np 2 python scripts/train.py
    horovodrun -np 4 python scripts/train.py --dataset cifar10 --data cifar-10-batches-py --bits 2 --period 16
    mpirun -np 2 python scripts/train.py --dataset text --data book.txt --checkpoint book.pt --log-file book.jsonl
    python scripts/train.py                     # one rank; nothing is sent

--stock trains with Horovod's own optimizer instead, to compare with.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler
from tqdm import tqdm
from training import checkpoint
from training.arguments import CASTS, QUANTIZERS, SETTINGS, parse_arguments
from training.data import DataError, Task, load_cifar10, load_digits, load_text
from training.log import JsonLog
from training.ranks import average_buffers, on_all_ranks, require_same, ring_allreduce_nbytes


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says."""
    args = parse_arguments(__doc__, argv)
    hvd = importlib.import_module("horovod.torch" if args.stock else "pqasgd_horovod.torch")
    hvd.init()
    torch.set_num_threads(args.threads or max(1, len(os.sched_getaffinity(0)) // hvd.local_size()))

    task = on_all_ranks(hvd, lambda: load_task(args), DataError)
    require_same(hvd, "numbers of training and test examples", task.sizes)
    trainer = Trainer(hvd, task, args)
    if args.resume:
        trainer.resume()
    trainer.train()


def load_task(args: argparse.Namespace) -> Task:
    """Return the dataset and its model."""
    if args.dataset == "cifar10":
        return load_cifar10(args.data)
    if args.dataset == "text":
        return load_text(args.data, args.context)
    return load_digits()


def distribute(hvd: Any, optimizer: torch.optim.Optimizer, model: torch.nn.Module, args: argparse.Namespace) -> Any:
    """Return the optimizer of all ranks together: Horovod's own, or this package's."""
    if args.stock:
        return hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    compression = getattr(hvd.Compression, args.compression)
    if args.compression in QUANTIZERS:
        compression = compression(bits=args.bits)
    elif args.compression not in CASTS:
        compression = compression()
    return hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        compression=compression,
        period=args.period,
        seed=args.seed,
    )


class Trainer:
    """One rank of a run: model, optimizer and position in the data."""

    def __init__(self, hvd: Any, task: Task, args: argparse.Namespace) -> None:
        self.hvd, self.task, self.args = hvd, task, args
        self.loader, self.sampler = on_all_ranks(hvd, lambda: make_loader(hvd, task, args), DataError)
        self.total_steps = args.epochs * len(self.loader)

        torch.manual_seed(args.seed)
        self.model = task.make_model()
        hvd.broadcast_parameters(self.model.state_dict(), root_rank=0)
        optimizer = make_optimizer(self.model, args)
        self.optimizer = on_all_ranks(hvd, lambda: distribute(hvd, optimizer, self.model, args), ValueError)
        warmup_steps = round(args.warmup * self.total_steps)
        self.schedule = LambdaLR(self.optimizer, warmup_cosine(warmup_steps, self.total_steps))
        torch.manual_seed(args.seed * 1_000_003 + hvd.rank())  # dropout and augmentation differ from rank to rank

        self.settings = {name: getattr(args, name) for name in SETTINGS} | {"num_ranks": hvd.size()}
        self.step = 0
        self.seconds = 0.0
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self._sent_before = 0

    def resume(self) -> None:
        """Take over the checkpoint: the next step is the one that would have followed it."""
        path = self.args.checkpoint
        saved = on_all_ranks(self.hvd, lambda: checkpoint.read(path, self.settings), checkpoint.CheckpointError)
        common, own = saved["common"], saved["ranks"][self.hvd.rank()]
        self.step, self.seconds, self._sent_before = common["step"], common["seconds"], own["bytes_sent"]
        self.model.load_state_dict(common["model"])
        self.schedule.load_state_dict(common["schedule"])
        self.optimizer.load_state_dict(own["optimizer"])
        torch.set_rng_state(own["random"])

    def save(self) -> None:
        """Write the checkpoint, if one is wanted; collective."""
        if self.args.checkpoint is None:
            return
        common = {
            "settings": self.settings,
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        own = {
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "bytes_sent": self.bytes_sent,
        }
        checkpoint.save(self.hvd, self.args.checkpoint, common, own)

    @property
    def uncompressed_bytes(self) -> int:
        """What each rank sends in as many steps if all gradients travel as float32, by the ring formula."""
        return self.step * ring_allreduce_nbytes(self.num_parameters, self.hvd.size())

    @property
    def bytes_sent(self) -> int:
        """What this rank has sent to train."""
        if self.args.stock:  # Horovod does not count
            return self.uncompressed_bytes
        return self._sent_before + int(self.optimizer.communication_stats()["bytes_sent"])

    def train(self) -> None:
        """Train up to the last step, or the one to stop after; evaluate on the way."""
        hvd, args = self.hvd, self.args
        log = JsonLog(args.log_file if hvd.rank() == 0 else None, self.step if args.resume else None)
        log.write(
            "start",
            step=self.step,
            total_steps=self.total_steps,
            parameters=self.num_parameters,
            train_examples=self.task.sizes[0],
            test_examples=self.task.sizes[1],
            settings=self.settings,
            losses="training: of rank 0's batch; test: of all test data",
            bytes="2 (n - 1) / n * 4 * parameters per step, the ring formula" if args.stock else "counted by optimizer",
        )
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            unit="step",
            disable=args.quiet or hvd.rank() != 0,
            mininterval=0.2 if sys.stderr.isatty() else 10,
        )
        eval_every = args.eval_every or len(self.loader)
        due = (self.step // eval_every + 1) * eval_every
        stop_after = min(args.stop_after or self.total_steps, self.total_steps)

        self.model.train()
        started = time.perf_counter() - self.seconds
        for inputs, targets in batches_after(self.step, self.loader, self.sampler):
            loss = cross_entropy(self.model(self.task.prepare(inputs, True)), targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            learning_rate = self.schedule.get_last_lr()[0]
            self.schedule.step()
            self.step += 1
            log.write("step", step=self.step, loss=loss.item(), learning_rate=learning_rate, bytes_sent=self.bytes_sent)
            bar.update()

            if self.step == self.total_steps and not args.stock:
                self.optimizer.flush()
            elif self.step % args.period:
                continue  # between averages each rank has a model of its own
            last = self.step >= stop_after
            if self.step >= due or last:
                self.seconds = time.perf_counter() - started
                due = (self.step // eval_every + 1) * eval_every
                test_loss, accuracy = evaluate(hvd, self.model, self.task, args.batch_size)
                bar.set_postfix(test_loss=f"{test_loss:.3f}", accuracy=f"{accuracy:.2%}")
                log.write("eval", step=self.step, loss=test_loss, accuracy=accuracy, bytes_sent=self.bytes_sent)
                self.save()
                started = time.perf_counter() - self.seconds
            if last:
                break
        bar.close()

        sent, uncompressed = self.bytes_sent, self.uncompressed_bytes
        ratio = uncompressed / sent if sent else None
        if self.step == self.total_steps:
            log.write(
                "end",
                step=self.step,
                final_test_accuracy=accuracy,
                bytes_sent=sent,
                uncompressed_bytes=uncompressed,
                compression_ratio=ratio,
                seconds=self.seconds,
            )
        log.close()
        if hvd.rank() == 0:
            sending = "nothing sent" if ratio is None else f"{sent / 1e6:,.2f} MB sent per rank, ratio {ratio:,.1f}"
            print(f"step {self.step}: test accuracy {accuracy:.2%}, {sending}, {self.seconds:.1f} s", flush=True)


def make_loader(hvd: Any, task: Task, args: argparse.Namespace) -> tuple[DataLoader[Any], DistributedSampler[Any]]:
    """Return the training batches of this rank: a part of the data that no other rank sees in the same epoch."""
    share = task.sizes[0] // hvd.size()
    if args.batch_size > share:
        raise DataError(f"--batch-size is {args.batch_size}, but each of {hvd.size()} ranks has only {share} examples")
    sampler: DistributedSampler[Any] = DistributedSampler(
        task.train, hvd.size(), hvd.rank(), shuffle=True, seed=args.seed, drop_last=True
    )
    loader = DataLoader(
        task.train,
        sampler=BatchSampler(sampler, args.batch_size, drop_last=True),
        batch_size=None,  # the sampler gives whole batches: one index into tensors each
        generator=torch.Generator(),  # so that the global one, which a checkpoint holds, is left alone
    )
    return loader, sampler


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


def warmup_cosine(warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Return the learning rate's factor by step: a line up to 1, then half a cosine down to 0."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))

    return factor


@torch.no_grad()
def evaluate(hvd: Any, model: torch.nn.Module, task: Task, batch_size: int) -> tuple[float, float]:
    """Return loss and accuracy on the test data, of which every rank takes its share; collective."""
    average_buffers(hvd, model)
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64)
    share = range(hvd.rank(), task.sizes[1], hvd.size())
    for indices in BatchSampler(share, batch_size, drop_last=False):
        inputs, targets = task.test[indices]
        outputs = model(task.prepare(inputs, False))
        loss = cross_entropy(outputs, targets, reduction="sum")
        totals += torch.tensor([loss, (outputs.argmax(dim=1) == targets).sum(), targets.numel()])
    model.train()
    total_loss, correct, num_targets = hvd.allreduce(totals, name="evaluation", op=hvd.Sum).tolist()
    return total_loss / num_targets, correct / num_targets


if __name__ == "__main__":
    main()
