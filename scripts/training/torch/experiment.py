"""One training of a small network on CIFAR-10, for experiments: ranks are threads of this process, or Horovod's."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from pqasgd_horovod.exchange.carriers.threads import ThreadCarrier, run_ranks
from training.batches import batches_after, count_steps
from training.data import Task
from training.schedule import warmup_cosine
from training.torch.models import SmallCifarNet, average_buffers
from training.torch.threads import ThreadedOptimizer

Options = Mapping[str, Any]
"""Keyword arguments of `DistributedOptimizer`."""

TIMEOUT_SECONDS = 24 * 3600.0


class Worker:
    """One rank: its replica, its part of the data, and the optimizer that a single process would use."""

    def __init__(self, task: Task, settings: argparse.Namespace, rank: int, num_ranks: int) -> None:
        torch.manual_seed(settings.seed)
        self.model = SmallCifarNet()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            settings.lr,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            weight_decay=settings.weight_decay,
        )
        self.steps_per_epoch = count_steps(task, settings, num_ranks)
        self.total_steps = settings.epochs * self.steps_per_epoch
        warmup_steps = int(settings.warmup * self.total_steps)
        self._rate_factor = warmup_cosine(warmup_steps, self.total_steps)
        self._rate = settings.lr
        self._batches = batches_after(0, task, settings, rank, num_ranks)

    def train(self, optimizer: Any, turn: AbstractContextManager[Any]) -> list[float]:
        """Take all steps with the optimizer of all ranks, computing gradients within `turn`; return the losses."""
        losses = []
        for step in range(self.total_steps):
            for group in optimizer.param_groups:
                group["lr"] = self._rate * self._rate_factor(step)
            with turn:
                losses.append(self._compute_gradients())
            optimizer.step()
        optimizer.flush()
        return losses

    def _compute_gradients(self) -> float:
        images, labels = next(self._batches)
        outputs = self.model(torch.from_numpy(images).contiguous(memory_format=torch.channels_last))
        loss = cross_entropy(outputs, torch.from_numpy(labels))
        self.model.zero_grad()
        loss.backward()
        return loss.item()


@torch.no_grad()
def evaluate(model: torch.nn.Module, task: Task) -> dict[str, Any]:
    """Return accuracy and loss on the test data, and a checksum of the model."""
    model.eval()
    images = torch.from_numpy(task.prepare(task.test.inputs, None)).contiguous(memory_format=torch.channels_last)
    targets = torch.from_numpy(task.test.targets)
    outputs = torch.cat([model(part) for part in images.split(250)])
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in model.state_dict().values()))
    return {
        "accuracy": (outputs.argmax(dim=1) == targets).double().mean().item(),
        "test_loss": cross_entropy(outputs, targets).item(),
        "model": digest.hexdigest()[:16],
    }


def train_in_threads(task: Task, settings: argparse.Namespace, options: Options, num_ranks: int) -> dict[str, Any]:
    """Train on `num_ranks` ranks, which are threads of this process and compute in turn; return what came of it."""
    turn = threading.Lock()

    def program(carrier: ThreadCarrier) -> tuple[torch.nn.Module, list[float], dict[str, Any]]:
        with turn:  # torch's global generator makes the model
            worker = Worker(task, settings, carrier.rank, num_ranks)
        optimizer = ThreadedOptimizer(worker.optimizer, worker.model, carrier, seed=settings.seed, **options)
        losses = worker.train(optimizer, turn)
        return worker.model, losses, optimizer.communication_stats()

    started = time.process_time()
    models, losses, stats = zip(*run_ranks(num_ranks, program, timeout=TIMEOUT_SECONDS), strict=True)
    for name, buffer in models[0].named_buffers():
        if buffer.is_floating_point():  # where only gradients were averaged
            buffer.copy_(torch.stack([model.get_buffer(name) for model in models]).mean(dim=0))
    return _summarize(models[0], task, settings, losses, stats) | {"cpu_seconds": time.process_time() - started}


def train_with_horovod(task: Task, settings: argparse.Namespace, options: Options) -> dict[str, Any] | None:
    """Train on the ranks of the launcher, this process being one of them; return on rank 0 what came of it."""
    hvd: Any = importlib.import_module("pqasgd_horovod.torch")
    hvd.init()
    worker = Worker(task, settings, hvd.rank(), hvd.size())
    named_parameters = worker.model.named_parameters()
    optimizer = hvd.DistributedOptimizer(worker.optimizer, named_parameters, seed=settings.seed, **options)
    losses = worker.train(optimizer, nullcontext())
    average_buffers(hvd, worker.model)
    gathered = hvd.allgather_object((losses, optimizer.communication_stats()), name="result")
    if hvd.rank() != 0:
        return None
    return _summarize(worker.model, task, settings, *zip(*gathered, strict=True))


def _summarize(
    model: torch.nn.Module,
    task: Task,
    settings: argparse.Namespace,
    losses: Sequence[Sequence[float]],
    stats: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    steps = len(losses[0])
    epoch = steps // settings.epochs
    return {
        **evaluate(model, task),
        "training_losses": [
            round(statistics.fmean(x for own in losses for x in own[start : start + epoch]), 4)
            for start in range(0, steps, epoch)
        ],
        "steps": steps,
        "rounds": stats[0]["rounds"],
        "num_elements": stats[0]["num_elements"],
        "bytes_sent": statistics.fmean(each["bytes_sent"] for each in stats),  # shards differ a little in size
        "uncompressed_bytes": stats[0]["uncompressed_bytes"],
    }
