#!/usr/bin/env python3
"""Compare PQASGD with stock Horovod: accuracy, bytes and time of the same training on two ranks of this machine.

Four configurations, three seeds each; every run is a job of its own, `mpirun -np 2 python scripts/train.py`,
on scikit-learn's digits. Leaves in build/demo: report.json, demo.png, and what each run wrote. With --framework keras
it is scripts/train_keras.py, and build/demo-tf.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter, NullFormatter, PercentFormatter

ROOT = Path(__file__).resolve().parent.parent
NUM_RANKS = 2
RUN_TIMEOUT_SECONDS = 600.0


class Configuration(NamedTuple):
    """A row of the table and a curve of the picture."""

    name: str
    arguments: str
    color: str  # of the Okabe-Ito palette, which colour-blind people can tell apart
    line: Any

    @property
    def slug(self) -> str:
        """The name in file names."""
        return self.name.replace(",", "").replace(" ", "-")


CONFIGURATIONS = (
    Configuration("stock Horovod fp32", "--stock", "#000000", "-"),
    Configuration("4 bits, period 1", "--bits 4 --period 1", "#E69F00", (0, (5, 1))),
    Configuration("4 bits, period 8", "--bits 4 --period 8", "#0072B2", "-"),
    Configuration("2 bits, period 16", "--bits 2 --period 16", "#D55E00", "-"),
)


class Framework(NamedTuple):
    """What trains."""

    title: str
    script: str
    folder: str
    environment: dict[str, str]
    remark: str


FRAMEWORKS = {
    "torch": Framework("PyTorch", "train.py", "demo", {}, ""),
    "keras": Framework(
        "Keras 3",
        "train_keras.py",
        "demo-tf",
        {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"},  # otherwise it talks while it is imported
        "Stock is our optimizer with Compression.none and period=1, which is Horovod's own allreduce: Horovod's own "
        "Keras wrapper communicates nothing under Keras 3. Seconds include the tracing of graphs. ",
    ),
}


class RunError(Exception):
    """A run did not end well."""


class Run(NamedTuple):
    """What a run wrote in its log."""

    configuration: Configuration
    seed: int
    start: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    end: dict[str, Any]

    @property
    def row(self) -> dict[str, Any]:
        """The run in report.json."""
        keys = ("final_test_accuracy", "bytes_sent", "compression_ratio", "seconds")
        return {
            "name": self.configuration.name,
            "seed": self.seed,
            **{key: self.end[key] for key in keys},
            "steps": self.end["step"],
        }


def main(argv: list[str] | None = None) -> None:
    """Train, print the table, draw the picture and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=FRAMEWORKS, default="torch", help="(%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each configuration (%(default)s)")
    parser.add_argument("--epochs", type=int, default=16, help="of each run (%(default)s)")
    folders = " or ".join(f"build/{framework.folder}" for framework in FRAMEWORKS.values())
    parser.add_argument("--output", type=Path, help=f"folder ({folders})")
    args = parser.parse_args(argv)
    if min(args.seeds, args.epochs) < 1:
        parser.error("--seeds and --epochs must be at least 1")

    framework = FRAMEWORKS[args.framework]
    output = args.output or ROOT / "build" / framework.folder
    console = Console(width=max(Console().width, 110), highlight=False)
    output.mkdir(parents=True, exist_ok=True)
    num_runs = len(CONFIGURATIONS) * args.seeds
    console.print(
        f"Training {num_runs} times with {framework.title} on {NUM_RANKS} ranks, {args.epochs} epochs of "
        "scikit-learn's digits each."
    )
    started = time.perf_counter()
    runs: list[Run] = []
    # Seed by seed, so that a machine that gets slower or faster meanwhile does so for all configurations.
    for seed in range(args.seeds):
        for configuration in CONFIGURATIONS:
            run = train(framework, configuration, seed, args.epochs, output)
            runs.append(run)
            console.print(
                f"{len(runs):3}/{num_runs}  {configuration.name:18}  seed {seed}  "
                f"accuracy {run.end['final_test_accuracy']:7.2%}  "
                f"{run.end['bytes_sent'] / 1e6:8,.1f} MB sent per rank  {run.end['seconds']:5.1f} s"
            )
    seconds = time.perf_counter() - started

    summary = [summarize([run for run in runs if run.configuration is each]) for each in CONFIGURATIONS]
    console.print(make_table(framework, summary))
    num_images = runs[0].start["test_examples"]
    console.print(
        f"Accuracy: mean (lowest - highest) of {args.seeds} seeds on the same {num_images} held-out images; one is "
        f"{100 / num_images:.2f} points. "
        "Bytes: as the optimizer counts them; for stock Horovod, which does not count, by the formula of a ring "
        "allreduce, 2 (n - 1) / n * 4 per parameter and step. Seconds: mean time of the training loop; both ranks "
        f"share this machine, where bytes cost little. {framework.remark}".rstrip()
    )
    report = {
        "runs": [run.row for run in runs],
        "summary": summary,
        "num_ranks": NUM_RANKS,
        "num_cores": len(os.sched_getaffinity(0)),
        "total_seconds": round(seconds, 1),
    }
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw(runs, output / "demo.png")
    console.print(f"Took {seconds:.0f} s. Picture: {output / 'demo.png'}  Report: {output / 'report.json'}")


def train(framework: Framework, configuration: Configuration, seed: int, epochs: int, folder: Path) -> Run:
    """Return a finished run; raise RunError if it fails."""
    log = folder / f"{configuration.slug}-seed{seed}.jsonl"
    log.unlink(missing_ok=True)
    program = [str(ROOT / "scripts" / framework.script), *shlex.split(configuration.arguments)]
    program += ["--seed", str(seed), "--epochs", str(epochs)]
    # Every configuration is evaluated after the same steps, which end a period of each.
    program += ["--eval-every", "16", "--quiet", "--log-file", str(log)]
    run_on_ranks(f"{configuration.name}, seed {seed}", program, log.with_suffix(".txt"), framework.environment)
    return read_run(configuration, seed, log)


def run_on_ranks(name: str, program: Sequence[str], output: Path, environment: Mapping[str, str]) -> None:
    """Run a Python program with its arguments on all ranks; raise RunError, with the end of its output, if it fails."""
    # horovodrun would do as well, but imports every framework that Horovod was built with before it starts a job.
    launcher = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if launcher is None:
        raise RunError("mpirun is not there: run `make setup`, or install Open MPI into this environment")
    command = [launcher, "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
    # Or else the MPI thread of a rank that waits takes the core that the other one computes on.
    command += ["--mca", "mpi_yield_when_idle", "1", "-np", str(NUM_RANKS), sys.executable, *program]
    with output.open("w", encoding="utf-8") as file:
        file.write(shlex.join(command) + "\n")
        file.flush()
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(RUN_TIMEOUT_SECONDS)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise RunError(f"{output}: the run did not end within {RUN_TIMEOUT_SECONDS:.0f} s") from None
            raise
    if code != 0:
        tail = "\n".join(output.read_text(encoding="utf-8").splitlines()[-20:])
        raise RunError(f"{name} failed with exit code {code}; the end of {output}:\n{tail}")


def read_run(configuration: Configuration, seed: int, log: Path) -> Run:
    """Return the run that wrote `log`."""
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps, evaluations = ([r for r in records if r["event"] == event] for event in ("step", "eval"))
    return Run(configuration, seed, records[0], steps, evaluations, records[-1])


def summarize(runs: list[Run]) -> dict[str, Any]:
    """Return what a configuration's runs have in common."""
    accuracies = [run.end["final_test_accuracy"] for run in runs]
    return {
        "name": runs[0].configuration.name,
        "accuracy_mean": statistics.fmean(accuracies),
        "accuracy_min": min(accuracies),
        "accuracy_max": max(accuracies),
        "bytes_sent": statistics.fmean(run.end["bytes_sent"] for run in runs),
        "compression_ratio": statistics.fmean(run.end["compression_ratio"] for run in runs),
        "seconds": statistics.fmean(run.end["seconds"] for run in runs),
        "steps": runs[0].end["step"],
    }


def make_table(framework: Framework, summary: list[dict[str, Any]]) -> Table:
    """Return the table: the first row is what the others are compared with."""
    table = Table(
        title=f"Digits, {framework.title}, two ranks, the same hyper-parameters in every row", title_justify="left"
    )
    table.add_column("configuration")
    for heading in ("test accuracy %", "against stock", "bytes sent per rank", "ratio", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    stock = summary[0]["accuracy_mean"]
    for row in summary:
        low, mean, high = (100 * row[f"accuracy_{which}"] for which in ("min", "mean", "max"))
        table.add_row(
            row["name"],
            f"{mean:.2f} ({low:.2f} - {high:.2f})",
            "" if row is summary[0] else f"{mean - 100 * stock:+.2f} points",
            f"{row['bytes_sent']:,.0f}",
            f"{row['compression_ratio']:,.1f}",
            f"{row['seconds']:.1f}",
        )
    return table


def draw(runs: list[Run], path: Path) -> None:
    """Draw accuracy and loss against bytes and against steps: lines are means, bands go from least to most."""
    plt.rcParams.update(
        {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    )
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), sharex="col", sharey="row", layout="constrained")
    for configuration in CONFIGURATIONS:
        own = [run for run in runs if run.configuration is configuration]
        steps = np.array([record["step"] for record in own[0].evaluations])
        nbytes = np.mean([[record["bytes_sent"] for record in run.evaluations] for run in own], axis=0)
        accuracies = np.array([[record["accuracy"] for record in run.evaluations] for run in own])
        losses = np.array([training_losses(run) for run in own])
        ratio = own[0].end["compression_ratio"]
        label = (
            configuration.name if configuration is CONFIGURATIONS[0] else f"{configuration.name}: bytes / {ratio:.0f}"
        )
        style = {"color": configuration.color, "linestyle": configuration.line}
        for row, values in zip(axes, (accuracies, losses), strict=True):
            for axis, x in zip(row, (nbytes, steps), strict=True):
                axis.plot(x, values.mean(axis=0), **style, linewidth=1.8, label=label)
                axis.fill_between(
                    x, values.min(axis=0), values.max(axis=0), color=configuration.color, alpha=0.15, lw=0
                )
                axis.plot(x[-1], values[:, -1].mean(), "o", color=configuration.color, markersize=6)

    (accuracy_by_bytes, _), (loss_by_bytes, loss_by_steps) = axes
    # The interesting part, unless the runs are too short to get there.
    lowest = 0.8 if min(run.end["final_test_accuracy"] for run in runs) > 0.85 else 0.0
    accuracy_by_bytes.set(ylabel="test accuracy", ylim=(lowest, 1.0), yticks=np.linspace(lowest, 1.0, 5))
    accuracy_by_bytes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    loss_by_bytes.set(ylabel="training loss", yscale="log", xscale="log", xlabel="bytes sent per rank (log scale)")
    loss_by_bytes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    loss_by_bytes.xaxis.set_minor_formatter(NullFormatter())
    loss_by_steps.set(xlabel="steps", xlim=(0, None))
    num_seeds = len({run.seed for run in runs})
    parameters = runs[0].start["parameters"] / 1e6
    figure.suptitle("Accuracy and loss against what was sent, and against steps", fontsize=14, weight="bold")
    figure.legend(
        *accuracy_by_bytes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(CONFIGURATIONS),
        frameon=False,
        title=f"handwritten digits, {parameters:.1f} million parameters, {NUM_RANKS} ranks; mean and range of "
        f"{num_seeds} seeds",
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def training_losses(run: Run) -> list[float]:
    """Return for each evaluation the mean loss of the steps since the one before."""
    losses = [record["loss"] for record in run.steps]
    ends = [record["step"] for record in run.evaluations]
    return [statistics.fmean(losses[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        raise SystemExit(f"demo.py: error: {error}") from None
