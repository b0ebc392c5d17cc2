#!/usr/bin/env python3
"""Compare the methods of docs/methods.md: the accuracy that each reaches, and the bytes that it sends for that.

Every method trains a perceptron of 77,000 parameters on scikit-learn's digits for 300 steps, on two ranks of this
machine under mpirun. Leaves in build/demo-family: report.json, family.png, and what each run wrote.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import demo
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.path import Path as MplPath
from matplotlib.ticker import EngFormatter, NullFormatter
from matplotlib.transforms import Bbox
from rich.console import Console
from rich.table import Table
from training.torch.methods import NUM_STEPS, Method, read_methods, train

from pqasgd_horovod.compression import CodecCompressor

WIDTH = 1024
STOCK = Method("stock Horovod", "compression=hvd.Compression.none, period=1", "")

# Of the Okabe-Ito palette, which colour-blind people can tell apart: what is sent.
KINDS = {
    "in full": "#000000",
    "quantized": "#0072B2",
    "signs": "#D55E00",
    "sparse": "#009E73",
    "low rank": "#CC79A7",
    "other": "#888888",
}
KIND_OF_CODEC = {"none": "in full", "signsgd": "signs", "onebit": "signs", "powersgd": "low rank"} | dict.fromkeys(
    ("topk", "randomk", "threshold"), "sparse"
)
# When it is sent.
MARKERS = {"in every step": "o", "from time to time": "s", "from time to time, with momentum on the mean": "D"}


class Row(NamedTuple):
    """What a method came to, on the mean of all seeds."""

    name: str
    kind: str
    when: str
    accuracy: float
    lowest: float
    highest: float
    bytes_sent: float
    compression_ratio: float


def main(argv: list[str] | None = None) -> None:
    """Train, print the table, draw the picture and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (%(default)s)")
    folder = demo.ROOT / "build" / "demo-family"
    parser.add_argument("--output", type=Path, default=folder, help="folder (%(default)s)")
    parser.add_argument("--methods", default="", metavar="REGEX", help="only those whose name it finds; (all)")
    parser.add_argument("--run", nargs=2, metavar=("SEED", "LOG"), help=argparse.SUPPRESS)  # as a rank
    args = parser.parse_args(argv)
    if args.run is not None:
        train_all(choose(args.methods), int(args.run[0]), Path(args.run[1]))
        return
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    num_methods = len(choose(args.methods))

    console = Console(width=max(Console().width, 110), highlight=False)
    args.output.mkdir(parents=True, exist_ok=True)
    console.print(f"Training {num_methods} methods on {demo.NUM_RANKS} ranks, {NUM_STEPS} steps, {args.seeds} seeds.")
    started = time.perf_counter()
    runs = []
    for seed in range(args.seeds):
        log = args.output / f"seed{seed}.jsonl"
        log.unlink(missing_ok=True)
        program = [str(Path(__file__).resolve()), "--methods", args.methods, "--run", str(seed), str(log)]
        demo.run_on_ranks(f"seed {seed}", program, log.with_suffix(".txt"), {"OMP_NUM_THREADS": "1"})
        runs += [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        console.print(f"seed {seed}: done after {time.perf_counter() - started:.0f} s")

    rows = summarize(runs)
    console.print(make_table(rows))
    (args.output / "report.json").write_text(
        json.dumps({"runs": runs, "summary": [row._asdict() for row in rows]}, indent=1) + "\n", encoding="utf-8"
    )
    draw(rows, args.seeds, args.output / "family.png")
    console.print(f"Picture: {args.output / 'family.png'}  Report: {args.output / 'report.json'}")


def choose(pattern: str) -> list[Method]:
    """Return stock Horovod and the methods whose name a regular expression finds."""
    return [STOCK, *(method for method in read_methods() if re.search(pattern, method.name))]


def train_all(methods: Sequence[Method], seed: int, log: Path) -> None:
    """Train with methods on the ranks of the launcher, this process being one of them; the first one writes the log."""
    hvd: Any = importlib.import_module("pqasgd_horovod.torch")
    hvd.init()
    lines = []
    for method in methods:
        trained = train(hvd, method, WIDTH, seed)
        totals = {key: trained.stats[key] for key in ("bytes_sent", "compression_ratio")}
        run = {"name": method.name, "seed": seed, **describe(method.options(hvd)), "accuracy": trained.accuracy}
        lines.append(json.dumps(run | totals))
    if hvd.rank() == 0:
        log.write_text("\n".join(lines) + "\n", encoding="utf-8")


def describe(options: Mapping[str, Any]) -> dict[str, str]:
    """Return what a method sends, and when."""
    from pqasgd_horovod.averaging.outer import Replace
    from pqasgd_horovod.averaging.strategy import resolve_averaging

    compression = options["compression"]
    codec = compression.codec if isinstance(compression, CodecCompressor) else compression
    averaging = resolve_averaging(options.get("period"), options.get("averaging"))
    when = list(MARKERS)[0 if averaging.exchanges_gradients else 1 if averaging.outer == Replace() else 2]
    return {"kind": KIND_OF_CODEC.get(codec.id, "quantized"), "when": when}


def summarize(runs: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return a row for each method, in the order of the runs."""
    rows = []
    for name in dict.fromkeys(run["name"] for run in runs):
        own = [run for run in runs if run["name"] == name]
        accuracies = [run["accuracy"] for run in own]
        rows.append(
            Row(
                name,
                own[0]["kind"],
                own[0]["when"],
                statistics.fmean(accuracies),
                min(accuracies),
                max(accuracies),
                statistics.fmean(run["bytes_sent"] for run in own),
                statistics.fmean(run["compression_ratio"] for run in own),
            )
        )
    return rows


def make_table(rows: Sequence[Row]) -> Table:
    """Return the table, those that send the most first."""
    table = Table(title=f"Digits, two ranks, {NUM_STEPS} steps", title_justify="left")
    table.add_column("method")
    for heading in ("test accuracy %", "bytes sent per rank", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda row: -row.bytes_sent):
        accuracy = f"{100 * row.accuracy:.1f} ({100 * row.lowest:.1f} - {100 * row.highest:.1f})"
        table.add_row(row.name, accuracy, f"{row.bytes_sent:,.0f}", f"{row.compression_ratio:,.1f}")
    return table


def draw(rows: Sequence[Row], num_seeds: int, path: Path) -> None:
    """Draw accuracy against bytes; bars go from the lowest to the highest accuracy."""
    plt.rcParams.update(
        {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    )
    figure, axis = plt.subplots(figsize=(12, 8), dpi=150, layout="constrained")
    for row in rows:
        color, marker = KINDS[row.kind], MARKERS[row.when]
        axis.plot([row.bytes_sent] * 2, [100 * row.lowest, 100 * row.highest], color=color, linewidth=1.2, alpha=0.6)
        axis.plot(
            row.bytes_sent, 100 * row.accuracy, marker, color=color, markersize=8.5, markeredgecolor="white", zorder=3
        )
    accuracies = [100 * row.accuracy for row in rows]
    margin = 0.25 * (max(accuracies) - min(accuracies)) + 0.2  # for names
    axis.set_ylim(min(100 * row.lowest for row in rows) - margin / 4, max(accuracies) + margin)
    axis.set(xscale="log", xlabel="bytes sent per rank (log scale)", ylabel="test accuracy, %")
    axis.set_xlim(min(row.bytes_sent for row in rows) / 2, max(row.bytes_sent for row in rows) * 2)
    axis.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    kinds = [kind for kind in KINDS if any(row.kind == kind for row in rows)]
    handles = [Line2D([], [], color=KINDS[kind], marker="o", linestyle="", label=kind) for kind in kinds]
    handles += [
        Line2D([], [], color="#555555", marker=marker, markerfacecolor="none", linestyle="", label=when)
        for when, marker in MARKERS.items()
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=4,
        frameon=False,
        title=f"handwritten digits, {NUM_STEPS} steps on {demo.NUM_RANKS} ranks; mean and range of {num_seeds} seeds",
    )
    figure.suptitle("Accuracy, and what was sent for it: the methods of docs/methods.md", fontsize=14, weight="bold")
    figure.draw_without_rendering()  # places what labels must not cover
    figure.set_layout_engine("none")  # from now on everything stays where it is
    label(axis, rows)
    figure.savefig(path)  # with the same dpi: names are placed in pixels
    plt.close(figure)


def shorten(names: Sequence[str]) -> list[str]:
    """Return names without sources, and without what follows a comma where that is not needed to tell them apart."""
    whole = [re.sub(r" \(.*?\)", "", name) for name in names]
    short = [name.partition(",")[0] for name in whole]
    return [one if short.count(one) == 1 else full for one, full in zip(short, whole, strict=True)]


def label(axis: Any, rows: Sequence[Row]) -> list[Bbox]:
    """Write each name beside its point, where it covers nothing, the most crowded points first; return the places."""
    figure = axis.figure
    renderer = figure.canvas.get_renderer()
    unit = figure.dpi / 100
    points = [axis.transData.transform((row.bytes_sent, 100 * row.accuracy)) for row in rows]
    markers = [Bbox([point - 8 * unit, point + 8 * unit]) for point in points]
    bars = []
    for row in rows:
        ends = [axis.transData.transform((row.bytes_sent, 100 * end)) for end in (row.lowest, row.highest)]
        bars.append(Bbox(ends).padded(2 * unit))
    names_of_rows = shorten([row.name for row in rows])
    names: list[Bbox] = []
    lines: list[MplPath] = []
    inside = axis.get_window_extent(renderer)

    def crowd(i: int) -> float:
        return sum(1 / (1 + np.hypot(*(points[i] - other))) for other in points)

    for i in sorted(range(len(rows)), key=crowd, reverse=True):
        color = KINDS[rows[i].kind]
        text = axis.annotate(
            names_of_rows[i], points[i], xycoords="figure pixels", xytext=points[i],
            textcoords="figure pixels", ha="center", va="center", fontsize=9.5, color=color, zorder=4,
        )  # fmt: skip
        others = names + [marker for j, marker in enumerate(markers) if j != i]

        def cost(place: _Place, others: Sequence[Bbox] = others) -> float:
            covered = sum(place.box.overlaps(each) for each in [*names, *markers, *bars])
            covered += sum(line.intersects_bbox(place.box) for line in lines)
            covered += not (inside.contains(*place.box.min) and inside.contains(*place.box.max))
            crossed = sum(place.line.intersects_bbox(each) for each in others)
            crossed += sum(place.line.intersects_path(each, filled=False) for each in lines)
            return place.distance + unit * (300 * covered + 150 * crossed)

        best = min(_places(points[i], text.get_window_extent(renderer), unit), key=cost)
        text.set_position(((best.box.x0 + best.box.x1) / 2, (best.box.y0 + best.box.y1) / 2))
        names.append(best.box)
        lines.append(best.line)
        axis.add_artist(
            Line2D(*np.asarray(best.line.vertices).T, transform=None, color=color, linewidth=0.7, alpha=0.6)
        )
    return names


class _Place(NamedTuple):
    distance: float
    box: Bbox
    line: MplPath  # from the point to the box


def _places(point: Any, box: Bbox, unit: float) -> Iterator[_Place]:
    """Yield places for a text around a point."""
    width, height = box.width + 6 * unit, box.height + 4 * unit
    for radius, angle in itertools.product(np.arange(14, 214, 8) * unit, np.linspace(0, 2 * np.pi, 36, endpoint=False)):
        center = point + radius * np.array([np.cos(angle), np.sin(angle)])
        center[0] += np.sign(np.round(np.cos(angle), 6)) * width / 2  # it begins or ends there
        place = Bbox.from_bounds(center[0] - width / 2, center[1] - height / 2, width, height)
        nearest = np.clip(point, place.min, place.max)
        yield _Place(float(np.hypot(*(nearest - point))), place, MplPath([point, nearest]))


if __name__ == "__main__":
    try:
        main()
    except demo.RunError as error:
        raise SystemExit(f"demo_family.py: error: {error}") from None
