#!/usr/bin/env python3
"""Measure the recipes of `pqasgd_horovod.recipes`: the accuracy of full SGD at one percent of its bytes.

Four ranks, threads of one process that compute in turn, train a network of 0.28 million parameters on 10,000 images of
CIFAR-10: 12 epochs, batches of 32 on each rank. --data names the folder cifar-10-batches-py, of which the first 1,000
training and 200 test images of each class are taken, or an .npz of JPEG files. docs/recipes.md has the result.

Leaves in build/reproduce-recipe: runs.jsonl, a line for each run, report.json and recipes.png. Runs that are in
runs.jsonl already are not done again. --search adds the configurations among which the recipes were chosen.

    mpirun -np 4 python scripts/reproduce_recipe.py --data DATA --with-horovod balanced

trains once on real ranks and prints the run, which has the same bits as that on threads.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from bench_tools import ROOT, format_table
from training.batches import count_steps
from training.data import DataError, Task, first_of_each_class, load_cifar10, prepare_cifar10

from pqasgd_horovod import codecs, recipes

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

NUM_RANKS = 4
# The learning rate is the one that is best for full SGD; nothing is chosen anew for the others.
SETTINGS = {"epochs": 12, "batch_size": 32, "lr": 0.4, "warmup": 0.05, "weight_decay": 5e-4}
SHIFT_PIXELS = 2  # less than usual: twelve epochs are few
FIRST_SEARCH_SEED = 100  # no seed is used to choose and to measure


class Configuration(NamedTuple):
    """What is compared."""

    name: str
    options: Callable[[int], dict[str, Any]]
    """Arguments of `DistributedOptimizer` for so many steps."""
    color: str = "#999999"  # of the Okabe-Ito palette, which colour-blind people can tell apart


CONFIGURATIONS = (
    Configuration("full SGD, fp32", lambda steps: {"compression": codecs.none(), "period": 1}, "#000000"),
    Configuration("max_fidelity", recipes.max_fidelity, "#0072B2"),
    Configuration("balanced", recipes.balanced, "#009E73"),
    Configuration("max_saving", recipes.max_saving, "#D55E00"),
)
SEARCH: tuple[Configuration, ...] = ()


def main(argv: list[str] | None = None) -> None:
    """Train, print the table, draw the picture and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder cifar-10-batches-py, or an .npz")
    parser.add_argument("--seeds", type=int, default=8, help="runs of each configuration (%(default)s)")
    parser.add_argument("--epochs", type=int, default=SETTINGS["epochs"], help="of each run (%(default)s)")
    parser.add_argument("--search", type=int, metavar="SEEDS", help="so many runs of each configuration not chosen")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time (cores)")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "reproduce-recipe", help="folder (%(default)s)")
    parser.add_argument("--with-horovod", choices=[each.name for each in CONFIGURATIONS], help="one run; see above")
    args = parser.parse_args(argv)
    if min(args.seeds, args.epochs, args.jobs) < 1:
        parser.error("--seeds, --epochs and --jobs must be at least 1")
    try:
        load(args.data)
    except DataError as error:
        parser.error(str(error))
    if args.with_horovod is not None:
        train_with_horovod(args)
        return

    args.output.mkdir(parents=True, exist_ok=True)
    runs = Runs(args)
    wanted = [(each, seed) for seed in range(args.seeds) for each in CONFIGURATIONS]
    wanted += [(each, FIRST_SEARCH_SEED + seed) for seed in range(args.search or 0) for each in SEARCH]
    runs.complete([(each.name, seed) for each, seed in wanted])

    rows = [summarize(each, runs.of(each.name), runs.of(CONFIGURATIONS[0].name)) for each in CONFIGURATIONS]
    print(f"\n{NUM_RANKS} ranks, mean and 95 % interval of {args.seeds} seeds\n\n{make_table(rows)}\n")
    searched = [summarize(each, runs.of(each.name), []) for each in SEARCH if runs.of(each.name)]
    if searched:
        print(f"The search, on other seeds\n\n{make_table(searched)}\n")
    report = {"settings": runs.settings, "num_ranks": NUM_RANKS, "recipes": rows, "search": searched}
    (args.output / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(rows, searched, runs, args.output / "recipes.png")
    print(f"Picture: {args.output / 'recipes.png'}  Report: {args.output / 'report.json'}")


@functools.cache
def load(path: Path) -> Task:
    """Return 10,000 training and 2,000 test images, or fewer if there are no more."""
    task = load_cifar10(path)
    return dataclasses.replace(
        task,
        train=first_of_each_class(task.train, 1000),
        test=first_of_each_class(task.test, 200),
        prepare=functools.partial(prepare_cifar10, pixels=SHIFT_PIXELS),
    )


def options_of(name: str, task: Task, settings: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of a configuration."""
    total_steps = settings.epochs * count_steps(task, settings, NUM_RANKS)
    return next(each for each in (*CONFIGURATIONS, *SEARCH) if each.name == name).options(total_steps)


def train(data: Path, name: str, settings: argparse.Namespace) -> dict[str, Any]:
    """Return a run, made in this process."""
    import torch
    from training.torch.experiment import train_in_threads

    torch.set_num_threads(1)
    task = load(data)
    return train_in_threads(task, settings, options_of(name, task, settings), NUM_RANKS)


def train_with_horovod(args: argparse.Namespace) -> None:
    """Train once on the ranks of a launcher; the first one prints the run."""
    import torch
    from training.torch.experiment import train_with_horovod

    torch.set_num_threads(1)
    task = load(args.data)
    settings = argparse.Namespace(**SETTINGS | {"epochs": args.epochs}, seed=0)
    run = train_with_horovod(task, settings, options_of(args.with_horovod, task, settings))
    if run is not None:
        print(json.dumps(run))


class Runs:
    """All runs that there are, kept in a file."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.settings = SETTINGS | {"epochs": args.epochs}
        self._args = args
        self._path = args.output / "runs.jsonl"
        self._runs: dict[tuple[str, int], dict[str, Any]] = {}
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                run = json.loads(line)
                if run["settings"] == self.settings:
                    self._runs[run["name"], run["seed"]] = run

    def of(self, name: str) -> list[dict[str, Any]]:
        """Return the runs of a configuration, by seed."""
        return [run for (each, _), run in sorted(self._runs.items()) if each == name]

    def complete(self, wanted: Sequence[tuple[str, int]]) -> None:
        """Do what is missing."""
        missing = [each for each in wanted if each not in self._runs]
        if not missing:
            return
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
        with (
            concurrent.futures.ProcessPoolExecutor(min(self._args.jobs, len(missing)), context) as pool,
            self._path.open("a", encoding="utf-8") as file,
        ):
            futures = {
                pool.submit(train, self._args.data, name, argparse.Namespace(**self.settings, seed=seed)): (name, seed)
                for name, seed in missing
            }
            for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
                name, seed = futures[future]
                run = {"name": name, "seed": seed, "settings": self.settings, **future.result()}
                self._runs[name, seed] = run
                file.write(json.dumps(run) + "\n")
                file.flush()
                print(
                    f"{done:3}/{len(missing)}  {name:24}  seed {seed:3}  accuracy {run['accuracy']:7.2%}  "
                    f"{share_of_bytes(run):8.3%} of the bytes",
                    flush=True,
                )


def share_of_bytes(run: dict[str, Any]) -> float:
    """Return what was sent, over what stock Horovod would have sent."""
    return float(run["bytes_sent"] / run["uncompressed_bytes"])


def summarize(
    configuration: Configuration, runs: list[dict[str, Any]], reference: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return what the runs have in common; the difference is to the runs of the same seeds in `reference`."""
    by_seed = {run["seed"]: run["accuracy"] for run in reference}
    differences = [run["accuracy"] - by_seed[run["seed"]] for run in runs if run["seed"] in by_seed]
    return {
        "name": configuration.name,
        "seeds": len(runs),
        "accuracy": mean_and_half([run["accuracy"] for run in runs]),
        "difference": mean_and_half(differences) if differences else None,
        "test_loss": mean_and_half([run["test_loss"] for run in runs]),
        "share_of_bytes": max(map(share_of_bytes, runs)),
        "rounds": runs[0]["rounds"],
    }


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half of its 95 % interval by Student's t, 0 for a single value."""
    from scipy.special import stdtrit

    count = len(values)
    if count < 2:
        return float(np.mean(values)), 0.0
    return float(np.mean(values)), float(stdtrit(count - 1, 0.975) * np.std(values, ddof=1) / np.sqrt(count))


def make_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as text."""
    header = ["configuration", "seeds", "test accuracy %", "difference", "test loss", "bytes %", "averages"]
    return format_table(
        header,
        [
            [
                row["name"],
                str(row["seeds"]),
                "{:.2f} ± {:.2f}".format(*(100 * value for value in row["accuracy"])),
                "{:+.2f} ± {:.2f}".format(*(100 * value for value in row["difference"])) if row["difference"] else "",
                "{:.3f} ± {:.3f}".format(*row["test_loss"]),
                f"{row['share_of_bytes']:.3%}".rstrip("%"),
                str(row["rounds"]),
            ]
            for row in rows
        ],
    )


def draw(rows: Sequence[dict[str, Any]], searched: Sequence[dict[str, Any]], runs: Runs, path: Path) -> None:
    """Draw accuracy against bytes, and the training loss."""
    plt.rcParams.update(
        {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), width_ratios=[1.35, 1], layout="constrained")
    colors = {each.name: each.color for each in CONFIGURATIONS}
    mean, half = (100 * value for value in rows[0]["accuracy"])
    left.axhspan(mean - half, mean + half, color="#000000", alpha=0.07, lw=0)
    left.axhline(mean - 0.5, color="#000000", linewidth=0.8, linestyle=":")
    left.annotate("half a point below full SGD", (1.0, mean - 0.5), xycoords=("axes fraction", "data"), ha="right",
                  va="top", fontsize=9, xytext=(0, -2), textcoords="offset points")  # fmt: skip
    left.axvline(1, color="#000000", linewidth=0.8, linestyle=":")
    if searched:
        x, y = ([value(row) for row in searched] for value in (_percent, lambda row: 100 * row["accuracy"][0]))
        left.plot(x, y, "o", color="#BBBBBB", markersize=4, label="tried, on other seeds")
    for row in rows:
        mean, half = (100 * value for value in row["accuracy"])
        label = f"{row['name']}: {mean:.1f} ± {half:.1f} %, {_percent(row):.2g} % of the bytes"
        left.errorbar(_percent(row), mean, half, fmt="o", color=colors[row["name"]], capsize=3, markersize=7,
                      label=label)  # fmt: skip
        losses = np.array([run["training_losses"] for run in runs.of(row["name"])])
        epochs = np.arange(1, losses.shape[1] + 1)
        right.plot(epochs, losses.mean(axis=0), color=colors[row["name"]], linewidth=1.6)
    left.set(xscale="log", xlabel="bytes sent, % of a ring allreduce in fp32 of all steps", ylabel="test accuracy, %")
    left.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    left.xaxis.set_minor_formatter(NullFormatter())
    right.set(xlabel="epoch", ylabel="training loss", xlim=(1, None))
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    seeds = rows[0]["seeds"]
    figure.suptitle(
        f"CIFAR-10, 10,000 images, {NUM_RANKS} ranks: mean and 95 % interval of {seeds} seeds", weight="bold"
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _percent(row: dict[str, Any]) -> float:
    return float(100 * row["share_of_bytes"])


if __name__ == "__main__":
    main()
