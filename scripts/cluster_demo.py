#!/usr/bin/env python3
"""Train on a cluster of containers, with stock Horovod and with PQASGD, and count what crosses the network.

    make cluster-demo [BASE_IMAGE=.. BUILD_IMAGE=..]

Every worker is a container with an address of its own; a launcher starts `horovodrun` over ssh. Leaves
build/cluster/report.json. Needs a Docker engine and Compose, no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import sys
from typing import Any, NamedTuple

from cluster import (
    ROOT,
    Cluster,
    ClusterError,
    add_base_arguments,
    build_image,
    compose_command,
    docker,
    require_engine,
)
from rich.console import Console
from rich.table import Table

TRAINER = "/opt/pqasgd_horovod/scripts/train.py"
LOG = "/tmp/demo.jsonl"
RUN_SECONDS = 900.0


class Configuration(NamedTuple):
    """A row of the table."""

    name: str
    arguments: str


CONFIGURATIONS = (
    Configuration("stock Horovod fp32", "--stock"),
    Configuration("4 bits, period 8", "--bits 4 --period 8"),
    Configuration("2 bits, period 16", "--bits 2 --period 16"),
)


def main(argv: list[str] | None = None) -> None:
    """Build the image, train on it, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_base_arguments(parser)
    parser.add_argument("--workers", type=int, default=3, help="containers that train (%(default)s)")
    parser.add_argument("--rate", default="1gbit", help="of each container's link, in tc's notation (%(default)s)")
    parser.add_argument("--launcher", choices=("mpi", "gloo"), default="mpi", help="of horovodrun (%(default)s)")
    parser.add_argument("--epochs", type=int, default=16, help="of each run (%(default)s)")
    args = parser.parse_args(argv)
    if min(args.workers, args.epochs) < 1:
        parser.error("--workers and --epochs must be at least 1")

    console = Console(width=max(Console().width, 110), highlight=False)
    require_engine()
    compose_command()  # now, and not only when the image is built
    console.print("Building the image; the first time takes some minutes.")
    image = build_image("cpu", args.base, args.build_base)
    console.print(f"Starting {args.workers} workers and a launcher of {image}, links at {args.rate}.")
    with Cluster(image, args.workers, args.rate) as cluster:
        rows = []
        for configuration in CONFIGURATIONS:
            rows.append(train(cluster, configuration, args.launcher, args.epochs))
            console.print(f"{configuration.name}: accuracy {rows[-1]['accuracy']:.2%}, {rows[-1]['seconds']:.1f} s")
    console.print(make_table(rows, args))
    console.print(
        f"Digits, PyTorch, {args.epochs} epochs, one seed, the same hyper-parameters in every row. Containers share "
        f"{len(os.sched_getaffinity(0))} cores. Seconds: the training loop. Counted: what rank 0's optimizer counts; "
        "stock's by the ring formula. Sent: what a worker's interface has sent in all, start and evaluations included, "
        "mean (least - most). Ratio: of what was sent, to stock."
    )
    report = {
        "settings": {name: getattr(args, name) for name in ("workers", "rate", "launcher", "epochs")},
        "runs": rows,
    }
    folder = ROOT / "build" / "cluster"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def train(cluster: Cluster, configuration: Configuration, launcher: str, epochs: int) -> dict[str, Any]:
    """Return the row of one job."""
    program = ["python", TRAINER, *shlex.split(configuration.arguments), "--epochs", str(epochs)]
    program += ["--threads", "1", "--quiet", "--log-file", LOG]
    before = cluster.bytes_sent()
    cluster.run(program, launcher, RUN_SECONDS)
    sent = {node: total - before[node] for node, total in cluster.bytes_sent().items()}
    end = json.loads(docker("exec", cluster.workers[0], "tail", "-n", "1", LOG))
    return {
        "name": configuration.name,
        "accuracy": end["final_test_accuracy"],
        "seconds": end["seconds"],
        "steps": end["step"],
        "bytes_counted": end["bytes_sent"],
        "launcher_bytes": sent[cluster.launcher],
        "worker_bytes": [sent[worker] for worker in cluster.workers],
    }


def make_table(rows: list[dict[str, Any]], args: argparse.Namespace) -> Table:
    """Return the table: the first row is what the others are compared with."""
    title = f"{args.workers} containers joined by {args.rate}, horovodrun --{args.launcher}"
    table = Table(title=title, title_justify="left")
    table.add_column("configuration")
    for heading in ("test accuracy %", "seconds", "MB counted", "MB sent per worker", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    stock = statistics.fmean(rows[0]["worker_bytes"])
    for row in rows:
        megabytes = [number / 1e6 for number in row["worker_bytes"]]
        mean = statistics.fmean(megabytes)
        table.add_row(
            row["name"],
            f"{100 * row['accuracy']:.2f}",
            f"{row['seconds']:.1f}",
            f"{row['bytes_counted'] / 1e6:,.2f}",
            f"{mean:,.2f} ({min(megabytes):,.2f} - {max(megabytes):,.2f})",
            f"{stock / 1e6 / mean:,.1f}",
        )
    return table


def end_on_signal(number: int, _frame: object) -> None:
    """Unwind the program, so that everything it has started is taken down."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_on_signal)
    try:
        main()
    except ClusterError as error:
        sys.exit(f"cluster_demo.py: {error}")
