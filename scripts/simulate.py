#!/usr/bin/env python3
"""Predict what a training step takes, and what a rank sends, on 2 to 4,096 ranks: stock Horovod and ours.

    python scripts/simulate.py --parameters 25.6e6 --rate 1gbit --compute 0.05
    python scripts/simulate.py --rate 10gbit --per-node 8 --inside-rate 100gbit
    python scripts/simulate.py --calibrate

The cost model is scripts/simulation/model.py; its costs are in scripts/simulation_costs.json. `--calibrate` measures
them anew, on 2 to 8 hosts that this machine plays (see hosts.py), and writes that file. Predictions for more ranks than
were measured are extrapolations, and are marked so. A step takes what it computes, and what of an average it does not
hide: `--overlap` of the computation where something is averaged in each step, `--delay` steps where not.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hosts
from bench_tools import ROOT, format_table
from simulation import calibrate, model

from pqasgd_horovod import codecs
from pqasgd_horovod.averaging import ExchangeConfig

RANKS = tuple(2**power for power in range(1, 13))


class Setting(NamedTuple):
    """What is predicted for; rates in bits/s, times in seconds."""

    parameters: int = 25_557_032  # ResNet-50
    rate: float = 1e9
    compute: float = 0.05
    overlap: float = 2 / 3
    period: int = 8
    delay: int = 0
    per_node: int = 1
    inside_rate: float = 1e11
    bucket_mb: float = 8.0
    hop: float | None = None


class Prediction(NamedTuple):
    """What one way to average comes to."""

    way: model.Way
    ranks: int
    average_seconds: float
    step_seconds: float
    bytes_per_step: float
    """What leaves a node in a step, by the number of its ranks."""
    extrapolated: bool


def ways_of(setting: Setting) -> list[model.Way]:
    """Return what is compared."""
    hierarchy = "node" if setting.per_node > 1 else None

    def ours(bits: int, period: int) -> model.Way:
        config = ExchangeConfig(codecs.quantize(bits), hierarchy=hierarchy, bucket_cap_mb=setting.bucket_mb)
        name = f"{bits} bits, every step" if period == 1 else f"{bits} bits, every {period} steps"
        return model.Way(name, config=config, period=period)

    return [
        *model.STOCK,
        ours(4, 1),
        *([ours(4, setting.period), ours(2, setting.period)] if setting.period > 1 else []),
    ]


def predict(costs: model.Costs, way: model.Way, ranks: int, setting: Setting, most_measured: int) -> Prediction:
    """Return the prediction for a way on so many ranks, each with a core of its own."""
    if setting.hop is not None:
        costs = dataclasses.replace(costs, hop=setting.hop)
    work = model.work_of(way, setting.parameters, ranks, setting.per_node)
    seconds = costs.seconds(way, work, setting.rate, inside_rate=setting.inside_rate)
    hidden = setting.compute * (setting.overlap if way.period == 1 else setting.delay)
    exposed = max(0.0, seconds - hidden) / way.period
    nbytes = work.interface_bytes / setting.per_node / way.period
    extrapolated = ranks > most_measured or setting.per_node > 1
    return Prediction(way, ranks, seconds, setting.compute + exposed, nbytes, extrapolated)


def describe(setting: Setting) -> str:
    """Return the setting in words."""
    text = (
        f"{setting.parameters / 1e6:.3g} million parameters, {setting.rate / 1e9:g} Gbit/s, "
        f"{1e3 * setting.compute:g} ms of computation"
    )
    if setting.per_node > 1:
        text += f", nodes of {setting.per_node} ranks and {setting.inside_rate / 1e9:g} Gbit/s inside"
    return text


def table_of(predictions: Sequence[Prediction]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: for each number of ranks the time of a step and the bytes, of each way."""
    names = list(dict.fromkeys(each.way.name for each in predictions))
    header = ["ranks", *(f"{name}, {what}" for what in ("ms", "MB") for name in names)]
    rows = []
    for ranks in dict.fromkeys(each.ranks for each in predictions):
        own = {each.way.name: each for each in predictions if each.ranks == ranks}
        mark = " *" if any(each.extrapolated for each in own.values()) else ""
        rows.append(
            [f"{ranks:,}{mark}"]
            + [f"{1e3 * own[name].step_seconds:,.0f}" for name in names]
            + [f"{own[name].bytes_per_step / 1e6:,.2f}" for name in names]
        )
    return header, rows


def format_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as the documentation has it."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def calibration_tables(document: Mapping[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Return the costs and the errors of a calibration as tables."""
    costs: model.Costs = document["costs"]
    units = {
        "collective": (1e3, "ms"),
        "hop": (1e6, "us"),
        "efficiency": (100, "%"),
        "overlap": (100, "%"),
        "copy": (1e9, "ns a byte"),
    }
    rows = []
    for name in model.FITTED:
        scale, unit = units.get(name, (1e9, "ns a number"))
        rows.append([name, f"{scale * getattr(costs, name):.3g} {unit}", "fitted"])
    for name in costs.encode:
        for what, speeds in (("encode", costs.encode), ("decode", costs.decode)):
            rows.append([f"{what}, {name} bits", f"{1e9 * speeds[name]:.3g} ns a number", "measured"])
    errors = [
        [what, str(found["predictions"]), f"{100 * found['median']:.0f}", f"{100 * found['worst']:.0f}"]
        for what, found in document["errors"].items()
    ]
    return [
        (["cost", "value", "how"], rows),
        (["predictions of", "how many", "median error %", "worst %"], errors),
    ]


def draw_all(predictions: Sequence[Prediction], setting: Setting, most_measured: int, path: Path) -> None:
    """Draw the predictions."""
    from simulation import picture  # matplotlib, which takes a while, and ranks do not draw

    lines = []
    for name in dict.fromkeys(each.way.name for each in predictions):
        own = [each for each in predictions if each.way.name == name]
        ranks, seconds, nbytes = zip(
            *((each.ranks, each.step_seconds, each.bytes_per_step) for each in own), strict=True
        )
        lines.append(picture.Line(name, ranks, seconds, nbytes))
    picture.draw(lines, setting.compute, most_measured if setting.per_node == 1 else 0, describe(setting), path)


def _number_from(least: float, most: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no number from {least:g} to {most:g}")
        return value

    return parse


def _whole(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = _number_from(least, most)(text)
        if value != int(value):
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
        return int(value)

    return parse


def _rate(text: str) -> float:
    try:
        return calibrate.parse_rate(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Setting()
    add = parser.add_argument
    add("--parameters", type=_whole(1, 10**12), default=default.parameters, help="numbers of the model (%(default)s)")
    add("--rate", type=_rate, default=default.rate, help="of the network, in tc's notation (1gbit)")
    add("--compute", type=_number_from(0, 1e6), default=default.compute, help="seconds of a step alone (%(default)s)")
    add(
        "--overlap", type=_number_from(0, 1), default=default.overlap,
        help="what part of them hides an average of each step: about that of the backward pass (%(default).2f)",
    )  # fmt: skip
    add("--period", type=_whole(1, 10**6), default=default.period, help="steps of an average of ours (%(default)s)")
    add("--delay", type=_whole(0, 10**6), default=default.delay, help="steps that hide it (%(default)s)")
    add("--per-node", type=_whole(1, 1024), default=default.per_node, help="ranks of a node (%(default)s)")
    add("--inside-rate", type=_rate, default=default.inside_rate, help="of what joins them (100gbit)")
    add("--bucket-mb", type=_number_from(1e-3, 1024), default=default.bucket_mb, help="bucket_cap_mb (%(default)g)")
    add("--hop", type=_number_from(0, 1), help="seconds of a message, in place of what was measured here")
    add("--ranks", type=_whole(1, 2**20), nargs="+", help="how many (the powers of 2 to 4096)")
    add("--costs", type=Path, default=calibrate.COSTS, help="file of costs (scripts/simulation_costs.json)")
    add("--picture", type=Path, default=ROOT / "build" / "simulation" / "simulation.png", help="(%(default)s)")
    add("--markdown", action="store_true", help="print all tables as docs/simulation.md has them")
    add("--calibrate", action="store_true", help="measure, fit and write the costs")
    add("--refit", action="store_true", help="fit again to what the file of costs has measured")
    add("--repetitions", type=_whole(1, 1000), default=5, help="of each measured average (%(default)s)")
    add("--sizes", type=_whole(16, 10**9), nargs="+", default=list(calibrate.SIZES), help=argparse.SUPPRESS)
    add("--worker", type=Path, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.worker is not None:
        calibrate.work(hosts.INTERFACE["shaped"], options.sizes, options.repetitions, options.worker)
        return 0
    if options.calibrate:
        hosts.end_on_sigterm()
        calibrate.calibrate(sizes=options.sizes, repetitions=options.repetitions, output=options.costs)
    elif options.refit:
        calibrate.refit(options.costs)
    if options.per_node > 1 and options.ranks is None:
        options.ranks = [ranks for ranks in RANKS if ranks % options.per_node == 0]
    ranks = sorted(set(options.ranks or RANKS))
    wrong = [number for number in ranks if number % options.per_node]
    if wrong or not ranks:
        parser.error(f"--per-node is {options.per_node}, which has to divide --ranks: {wrong or list(RANKS)}")
    document = calibrate.read(options.costs)
    setting = Setting(**{name: getattr(options, name) for name in Setting._fields})
    most_measured = max(row["ranks"] for row in document["measured"])
    predictions = [
        predict(document["costs"], way, number, setting, most_measured) for way in ways_of(setting) for number in ranks
    ]
    show = format_markdown if options.markdown else format_table
    if options.markdown or options.calibrate or options.refit:
        for table in calibration_tables(document):
            print(show(*table), end="\n\n")
    print(f"{describe(setting)}; * extrapolated")
    print(show(*table_of(predictions)))
    draw_all(predictions, setting, most_measured, options.picture)
    print(f"Picture: {os.path.relpath(options.picture)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.TimeoutExpired as error:
        sys.exit(f"simulate: a job took longer than {error.timeout:g} s and was ended; is the machine busy?")
    except (calibrate.CalibrationError, hosts.NotAvailableError) as error:
        sys.exit(f"simulate: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
