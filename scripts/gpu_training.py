"""Train on two ranks and a GPU under Horovod: the averages of a CPU, and what a step costs beside plain SGD.

    horovodrun -np 2 python scripts/gpu_training.py

``make gpu-check`` runs it. With two GPUs and a Horovod with NCCL that carries messages; the log says so. Adds what it
finds to ``build/bench/gpu.json``.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from typing import Any

import horovod.torch as horovod
import torch
from bench_tools import OUTPUT, format_table

import pqasgd_horovod.torch as hvd

WAYS: dict[str, dict[str, Any]] = {
    "gradients, 4 bits": {"compression": hvd.Compression.quantize(bits=4)},
    "4 bits every 8 steps": {"compression": hvd.Compression.quantize(bits=4), "period": 8},
    "the same, anchors on the host": {
        "compression": hvd.Compression.quantize(bits=4),
        "period": 8,
        "anchor_device": "cpu",
    },
    "top 1 % every 8 steps, feedback": {
        "compression": hvd.Compression.topk(density=0.01),
        "period": 8,
        "feedback": hvd.Feedback(),
    },
}


def make_model() -> torch.nn.Module:
    """A convolutional network of 25 M parameters."""
    torch.manual_seed(1)
    layers: list[torch.nn.Module] = []
    for inputs, outputs in ((3, 64), (64, 128), (128, 256), (256, 512), (512, 1024)):
        layers += [
            torch.nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
            torch.nn.BatchNorm2d(outputs),
            torch.nn.ReLU(),
            torch.nn.Conv2d(outputs, outputs, 3, padding=1),
            torch.nn.ReLU(),
        ]
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(1024, 1000))


def check_bits(device: torch.device) -> None:
    """Raise an error unless the mean of the ranks' numbers has the same bits on the GPU and on the CPU."""
    torch.manual_seed(horovod.rank())
    values = torch.randn(1_000_003)
    for i, compression in enumerate((hvd.Compression.eden(bits=2), hvd.Compression.qsgd(bits=4))):
        for method in ("allgather", "two_phase"):
            means = [
                hvd.compressed_allreduce(
                    values.to(place), compression=compression, exchange=method, name=f"{place}.{i}.{method}"
                ).cpu()
                for place in ("cpu", device)
            ]
            if not torch.equal(*means):
                raise SystemExit(f"{compression} by {method}: the GPU's mean differs from the CPU's")


def seconds_of_steps(device: torch.device, options: dict[str, Any] | None, steps: int = 32) -> float:
    """Return the mean time of a step over some periods, the median of three."""
    model = make_model().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9 if options and "period" in options else 0.0)
    if options is not None:
        optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), **options)
    images, labels = torch.randn(64, 3, 64, 64, device=device), torch.randint(0, 1000, (64,), device=device)
    found = []
    for repetition in range(4):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        torch.cuda.synchronize(device)
        if repetition:  # the first one warms up
            found.append((time.perf_counter() - started) / steps)
    return statistics.median(found)


def main() -> None:
    """Check, measure, print and write."""
    horovod.init()
    logging.basicConfig(level=logging.INFO if horovod.rank() == 0 else logging.WARNING, format="%(message)s")
    device = torch.device("cuda", horovod.local_rank() % torch.cuda.device_count())
    check_bits(device)
    plain = seconds_of_steps(device, None)
    times = {name: seconds_of_steps(device, options) for name, options in WAYS.items()}
    if horovod.rank():
        return
    rows = [["plain SGD, one rank's", f"{1e3 * plain:.1f}", ""]]
    rows += [[name, f"{1e3 * seconds:.1f}", f"{1e3 * (seconds - plain):+.1f}"] for name, seconds in times.items()]
    print(format_table([f"{horovod.size()} ranks", "ms a step", "more than plain"], rows))
    path = OUTPUT / "gpu.json"
    document = json.loads(path.read_text()) if path.exists() else {}
    document["steps"] = {
        "ranks": horovod.size(),
        "devices": torch.cuda.device_count(),
        "nccl": horovod.nccl_built(),
        "plain_seconds": plain,
        "seconds": times,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
