#!/usr/bin/env python3
"""Measure the recipes of `pqasgd_horovod.recipes`: the accuracy of full SGD at one percent of its bytes.

Four ranks, threads of one process that compute in turn, train a network of 0.28 million parameters on 10,000 images of
CIFAR-10: 12 epochs, batches of 32 on each rank. --data names the folder cifar-10-batches-py, of which the first 1,000
training and 200 test images of each class are taken, or an .npz of JPEG files. docs/recipes.md has the result.

Leaves in build/reproduce-recipe: runs.jsonl, a line for each run, report.json and recipes.png. Runs that are in
runs.jsonl already are not done again. --search adds the configurations among which the recipes were chosen; those
whose name begins with "outside" have the momentum outside the inner optimizer.

    mpirun -np 4 python scripts/reproduce_recipe.py --data DATA --with-horovod balanced

trains once on real ranks and prints the run, which has the same bits as that of the first seed on threads; only
max_fidelity has others, since there gradients travel in the order of the backward pass.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from bench_tools import ROOT, format_table
from training.batches import count_steps
from training.data import DataError, Task, first_of_each_class, load_cifar10, prepare_cifar10

from pqasgd_horovod import codecs, recipes
from pqasgd_horovod.averaging import GrowingPeriod, Nesterov, PeriodicAveraging, PostLocal, Replace, SlowMo
from pqasgd_horovod.averaging.outer import Outer
from pqasgd_horovod.averaging.schedule import Schedule

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

NUM_RANKS = 4
# The learning rate is the one that is best for full SGD, of 0.2, 0.4 and 0.8.
SETTINGS = {
    "epochs": 12, "batch_size": 32, "lr": 0.4, "momentum": 0.9, "nesterov": False, "warmup": 0.05, "weight_decay": 5e-4,
}  # fmt: skip
SHIFT_PIXELS = 2  # less than usual: twelve epochs are few
FIRST_SEED = 100

Options = dict[str, Any]  # of `DistributedOptimizer`


class Configuration(NamedTuple):
    """What is compared."""

    name: str
    options: Callable[[int], Options]  # for so many steps
    settings: Mapping[str, Any] = MappingProxyType({})  # where they are others
    color: str = "#999999"  # of the Okabe-Ito palette, which colour-blind people can tell apart


def _full(steps: int) -> Options:
    return {"compression": codecs.none(), "period": 1}


NESTEROV = MappingProxyType({"nesterov": True})
MOMENTUM_OUTSIDE = MappingProxyType({"momentum": 0.0})
CONFIGURATIONS = (
    Configuration("full SGD", _full, color="#000000"),
    Configuration("full SGD, Nesterov", _full, NESTEROV, "#888888"),
    Configuration("max_fidelity, Nesterov", lambda steps: recipes.max_fidelity(), NESTEROV, "#0072B2"),
    Configuration("balanced", recipes.balanced, MOMENTUM_OUTSIDE, "#009E73"),
    Configuration("max_saving", lambda steps: recipes.max_saving(), {**MOMENTUM_OUTSIDE, "lr": 0.8}, "#D55E00"),
)
RECIPES = [each.name for each in CONFIGURATIONS[2:]]


def _tried(
    name: str, bits: int, period: int | Schedule, outer: Outer | None = None, lr: float = 0.4, momentum: float = 0.9
) -> Configuration:
    averaging = PeriodicAveraging(period, outer=Replace() if outer is None else outer)
    options = {"compression": codecs.quantize(bits), "averaging": averaging}
    return Configuration(name, lambda steps: options, {"lr": lr, "momentum": momentum})


def _outside(name: str, bits: int, period: int | Schedule, outer: Outer, lr: float) -> Configuration:
    return _tried(name, bits, period, outer, lr, momentum=0.0)


GROWING = GrowingPeriod(2, 16, 270)
SEARCH = (
    *(Configuration(f"full SGD, lr {lr}", _full, {"lr": lr}) for lr in (0.2, 0.8)),
    Configuration("full SGD, Nesterov, lr 0.8", _full, {**NESTEROV, "lr": 0.8}),
    _tried("gradients, 2 bits", 2, 1),
    _tried("gradients, 1 bit", 1, 1),
    _tried("1 bit, period 1, of parameters", 1, PostLocal(1, 1)),
    _tried("1 bit, period 4", 1, 4),
    _tried("1 bit, period 4, SlowMo(0.5, 0.7)", 1, 4, SlowMo(0.5, 0.7)),
    _tried("1 bit, period 4, Nesterov(0.9, 0.2)", 1, 4, Nesterov(0.9, 0.2)),
    _tried("2 bits, period 8", 2, 8),
    _tried("2 bits, period 8, SlowMo(0.5, 0.7)", 2, 8, SlowMo(0.5, 0.7)),
    _tried("1 bit, 100 steps at 1, then 8", 1, PostLocal(8, 100)),
    _tried("1 bit, 150 steps at 1, then 10", 1, PostLocal(10, 150)),
    _tried("1 bit, 150 steps at 1, then 10, SlowMo(0.5, 0.7)", 1, PostLocal(10, 150), SlowMo(0.5, 0.7)),
    _tried("1 bit, 187 steps at 1, then 13", 1, PostLocal(13, 187)),
    _tried("1 bit, 187 steps at 1, then 13, SlowMo(0.5, 0.7)", 1, PostLocal(13, 187), SlowMo(0.5, 0.7)),
    _tried("2 bits, 78 steps at 1, then 16", 2, PostLocal(16, 78)),
    _tried("2 bits, 78 steps at 1, then 16, SlowMo(0.5, 0.7)", 2, PostLocal(16, 78), SlowMo(0.5, 0.7)),
    _tried("1 bit, period 1 to 16", 1, GrowingPeriod(1, 16, 94)),
    _tried("1 bit, period 2 to 16", 1, GROWING),
    _outside("outside: 1 bit, period 4, SlowMo(0.9, 1)", 1, 4, SlowMo(0.9, 1.0), 0.4),
    _outside("outside: 1 bit, period 4, SlowMo(0.8, 1), lr 0.8", 1, 4, SlowMo(0.8, 1.0), 0.8),
    _outside("outside: 1 bit, period 4, SlowMo(0.66, 1), lr 1.36", 1, 4, SlowMo(0.66, 1.0), 1.36),
    _outside("outside: 1 bit, period 4, Nesterov(1, 0.9)", 1, 4, Nesterov(1.0, 0.9), 0.4),
    _outside("outside: 1 bit, period 4, Nesterov(1, 0.8), lr 0.8", 1, 4, Nesterov(1.0, 0.8), 0.8),
    _outside("outside: 1 bit, period 4, Nesterov(1, 0.66), lr 1.36", 1, 4, Nesterov(1.0, 0.66), 1.36),
    _outside("outside: 1 bit, period 4, Nesterov(2, 0.8)", 1, 4, Nesterov(2.0, 0.8), 0.4),
    _outside("outside: 1 bit, period 2 to 16, SlowMo(0.8, 1), lr 0.8", 1, GROWING, SlowMo(0.8, 1.0), 0.8),
    _outside("outside: 1 bit, period 2 to 16, Nesterov(1, 0.8), lr 0.8", 1, GROWING, Nesterov(1.0, 0.8), 0.8),
    _outside("outside: 1 bit, period 8, SlowMo(0.7, 1), lr 1.2", 1, 8, SlowMo(0.7, 1.0), 1.2),
    _outside("outside: 2 bits, period 8, SlowMo(0.7, 1), lr 1.2", 2, 8, SlowMo(0.7, 1.0), 1.2),
    _outside("outside: 1 bit, period 8, Nesterov(1, 0.8), lr 0.8", 1, 8, Nesterov(1.0, 0.8), 0.8),
    _outside("outside: 1 bit, period 8, Nesterov(1, 0.9)", 1, 8, Nesterov(1.0, 0.9), 0.4),
    _outside("outside: 1 bit, period 16, SlowMo(0.7, 1), lr 1.2", 1, 16, SlowMo(0.7, 1.0), 1.2),
    _outside("outside: 1 bit, period 16, Nesterov(2, 0.8)", 1, 16, Nesterov(2.0, 0.8), 0.4),
)


def main(argv: list[str] | None = None) -> None:
    """Train, print the table, draw the picture and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder cifar-10-batches-py, or an .npz")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each configuration (%(default)s)")
    parser.add_argument("--epochs", type=int, default=SETTINGS["epochs"], help="of each run (%(default)s)")
    parser.add_argument("--search", type=int, default=0, metavar="SEEDS", help="runs of each configuration not chosen")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time (cores)")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "reproduce-recipe", help="folder (%(default)s)")
    parser.add_argument("--with-horovod", choices=RECIPES, help="one run; see above")
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
    runs.complete([(each, FIRST_SEED + seed) for seed in range(args.seeds) for each in CONFIGURATIONS])
    runs.complete([(each, FIRST_SEED + seed) for seed in range(args.search) for each in SEARCH])

    rows = [summarize(each, runs.of(each), runs.of(CONFIGURATIONS[0])) for each in CONFIGURATIONS]
    print(f"\n{NUM_RANKS} ranks, means with 95 % intervals, differences by seed\n\n{make_table(rows)}\n")
    searched = [summarize(each, runs.of(each), runs.of(CONFIGURATIONS[0])) for each in SEARCH if runs.of(each)]
    if searched:
        print(f"The search\n\n{make_table(searched)}\n")
    report = {
        "settings": SETTINGS | {"epochs": args.epochs},
        "num_ranks": NUM_RANKS,
        "recipes": rows,
        "search": searched,
    }
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


def settings_of(configuration: Configuration, epochs: int) -> dict[str, Any]:
    """Return what a run is trained with, besides its seed."""
    return {**SETTINGS, "epochs": epochs, **configuration.settings}


def prepare(
    data: Path, configuration: Configuration, epochs: int, seed: int
) -> tuple[Task, argparse.Namespace, Options]:
    """Return what a training takes."""
    task, settings = load(data), argparse.Namespace(**settings_of(configuration, epochs), seed=seed)
    return task, settings, configuration.options(epochs * count_steps(task, settings, NUM_RANKS))


def train(data: Path, name: str, epochs: int, seed: int) -> dict[str, Any]:
    """Return a run, made in this process."""
    import torch
    from training.torch.experiment import train_in_threads

    torch.set_num_threads(1)
    configuration = next(each for each in (*CONFIGURATIONS, *SEARCH) if each.name == name)
    return train_in_threads(*prepare(data, configuration, epochs, seed), NUM_RANKS)


def train_with_horovod(args: argparse.Namespace) -> None:
    """Train once on the ranks of a launcher; the first one prints the run."""
    import torch
    from training.torch import experiment

    torch.set_num_threads(1)
    configuration = next(each for each in CONFIGURATIONS if each.name == args.with_horovod)
    run = experiment.train_with_horovod(*prepare(args.data, configuration, args.epochs, FIRST_SEED))
    if run is not None:
        print(json.dumps(run))


class Runs:
    """All runs that there are, kept in a file."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._path = args.output / "runs.jsonl"
        self._runs: list[dict[str, Any]] = []
        if self._path.exists():
            self._runs = [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]

    def of(self, configuration: Configuration) -> list[dict[str, Any]]:
        """Return the runs of a configuration, by seed."""
        settings = settings_of(configuration, self._args.epochs)
        own = [run for run in self._runs if run["name"] == configuration.name and run["settings"] == settings]
        return sorted(own, key=lambda run: int(run["seed"]))

    def complete(self, wanted: Sequence[tuple[Configuration, int]]) -> None:
        """Do what is missing."""
        missing = [(each, seed) for each, seed in wanted if seed not in (run["seed"] for run in self.of(each))]
        if not missing:
            return
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
        with (
            concurrent.futures.ProcessPoolExecutor(min(self._args.jobs, len(missing)), context) as pool,
            self._path.open("a", encoding="utf-8") as file,
        ):
            futures = {}
            for configuration, seed in missing:
                future = pool.submit(train, self._args.data, configuration.name, self._args.epochs, seed)
                settings = settings_of(configuration, self._args.epochs)
                futures[future] = {"name": configuration.name, "seed": seed, "settings": settings}
            for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
                run = {**futures[future], **future.result()}
                self._runs.append(run)
                file.write(json.dumps(run) + "\n")
                file.flush()
                print(
                    f"{done:3}/{len(missing)}  {run['name']}, seed {run['seed']}: accuracy {run['accuracy']:.2%} with "
                    f"{share_of_bytes(run):.3%} of the bytes",
                    flush=True,
                )


def share_of_bytes(run: dict[str, Any]) -> float:
    """Return what was sent, over what stock Horovod would have sent."""
    return float(run["bytes_sent"] / run["uncompressed_bytes"])


def summarize(
    configuration: Configuration, runs: list[dict[str, Any]], reference: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return what the runs have in common; the difference is to the runs of the same seeds in `reference`."""
    by_seed = {run["seed"]: 100 * run["accuracy"] for run in reference if run not in runs}
    differences = [100 * run["accuracy"] - by_seed[run["seed"]] for run in runs if run["seed"] in by_seed]
    return {
        "name": configuration.name,
        "seeds": len(runs),
        "accuracy": mean_and_half([100 * run["accuracy"] for run in runs]),
        "difference": mean_and_half(differences) if differences else None,
        "test_loss": mean_and_half([run["test_loss"] for run in runs]),
        "share_of_bytes": max(map(share_of_bytes, runs)),
        "rounds": runs[0]["rounds"],
    }


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half of its 95 % interval by Student's t, NaN for a single value."""
    from scipy.special import stdtrit

    count = len(values)
    if count < 2:
        return float(np.mean(values)), float("nan")
    return float(np.mean(values)), float(stdtrit(count - 1, 0.975) * np.std(values, ddof=1) / np.sqrt(count))


def show(interval: tuple[float, float] | None, digits: int, sign: str = "") -> str:
    """Return an interval as text; a single value has none."""
    if interval is None:
        return ""
    mean, half = interval
    return f"{mean:{sign}.{digits}f}" + ("" if np.isnan(half) else f" ± {half:.{digits}f}")


def make_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as text."""
    header = ["configuration", "seeds", "test accuracy %", "difference", "test loss", "bytes %", "averages"]
    return format_table(
        header,
        [
            [
                row["name"],
                str(row["seeds"]),
                show(row["accuracy"], 2),
                show(row["difference"], 2, "+"),
                show(row["test_loss"], 3),
                f"{100 * row['share_of_bytes']:.3f}",
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
    mean, half = rows[0]["accuracy"]
    left.axhspan(mean - half, mean + half, color="#000000", alpha=0.07, lw=0)
    left.axhline(mean - 0.5, color="#000000", linewidth=0.8, linestyle=":")
    left.annotate("half a point below full SGD", (0.58, mean - 0.5), xycoords=("axes fraction", "data"), ha="right",
                  va="top", fontsize=9, xytext=(0, -2), textcoords="offset points")  # fmt: skip
    left.axvline(1, color="#000000", linewidth=0.8, linestyle=":")
    if searched:
        x, y = [_percent(row) for row in searched], [row["accuracy"][0] for row in searched]
        left.plot(x, y, "o", color="#BBBBBB", markersize=4, label="also tried, on fewer seeds")
    for configuration, row in zip(CONFIGURATIONS, rows, strict=True):
        mean, half = row["accuracy"]
        label = f"{row['name']}: {show(row['accuracy'], 1)} %, {_percent(row):.3g} % of the bytes"
        left.errorbar(_percent(row), mean, half, fmt="o", color=configuration.color, capsize=3, markersize=7,
                      label=label)  # fmt: skip
        losses = np.array([run["training_losses"] for run in runs.of(configuration)])
        epochs = np.arange(1, losses.shape[1] + 1)
        right.plot(epochs, losses.mean(axis=0), color=configuration.color, linewidth=1.6)
    means = [row["accuracy"][0] for row in rows]
    left.set(
        xscale="log",
        xlabel="bytes sent, % of a ring allreduce in fp32 of all steps",
        ylabel="test accuracy, %",
        ylim=(min(means) - 4, max(means) + 1.5),  # the worst that were tried are below
    )
    left.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    left.xaxis.set_minor_formatter(NullFormatter())
    right.set(xlabel="epoch", ylabel="training loss", xlim=(1, None))
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    figure.suptitle(
        f"CIFAR-10, 10,000 images, {NUM_RANKS} ranks: mean of {rows[0]['seeds']} seeds and its 95 % interval",
        weight="bold",
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _percent(row: dict[str, Any]) -> float:
    return float(100 * row["share_of_bytes"])


if __name__ == "__main__":
    main()
