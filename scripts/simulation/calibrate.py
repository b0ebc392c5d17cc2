"""Measures averages between hosts that this machine plays, and fits the cost model to them.

Whole jobs are held back: numbers of ranks and rates of which the fit has seen nothing. And the model is fitted anew
without each number of ranks in turn, to see how well it foretells that one from the others.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hosts
import numpy as np
from bench_tools import ROOT, describe_machine, warn_if_busy

from pqasgd_horovod import codecs, native

from . import model

COSTS = ROOT / "scripts" / "simulation_costs.json"
SIZES = (400_000, 1_200_000, 3_600_000)
CODEC_ELEMENTS = 2**20
_UNITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


class Job(NamedTuple):
    """What is measured together."""

    ranks: int
    rate: str
    held_back: bool = False


# At 10 Gbit/s it is the processor that limits, at the others mostly the wire.
JOBS = (
    Job(2, "1gbit"),
    Job(2, "10gbit"),
    Job(3, "1gbit"),
    Job(4, "1gbit"),
    Job(4, "10gbit"),
    Job(8, "10gbit"),
    Job(2, "500mbit", held_back=True),
    Job(3, "500mbit", held_back=True),
    Job(8, "1gbit", held_back=True),
)
# For mpirun. Rings and pairs, as in the model, where Open MPI would choose by size; messages in both directions at
# once, which it has above its eager limit only so (docs/cluster.md); a rank that waits leaves its core to others.
SETTINGS = {
    "mpi_yield_when_idle": "1",
    "btl_tcp_eager_limit": str(2**25),
    "coll_tuned_use_dynamic_rules": "1",
    "coll_tuned_allreduce_algorithm": "4",
    "coll_tuned_allgatherv_algorithm": "3",
    "coll_tuned_alltoallv_algorithm": "2",
}


class CalibrationError(RuntimeError):
    """It could not be measured, or what was measured cannot be used."""


def parse_rate(text: str) -> float:
    """Return bits per second of a rate in tc's notation; raises ValueError.

    >>> parse_rate("2.5gbit")
    2500000000.0
    """
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    unit = text[len(number) :]
    try:
        rate = float(number) * _UNITS[unit]
    except (KeyError, ValueError):
        rate = 0.0
    if not 0 < rate < 1e15:
        raise ValueError(f"rate is {text!r}; it must be a number above 0 and one of {', '.join(_UNITS)}: 1gbit")
    return rate


def work(interface: str, sizes: Sequence[int], repetitions: int, output: Path) -> None:
    """What each rank runs: all ways to average, of each size, and the codecs, while the other ranks run them too."""
    bench = importlib.import_module("bench_exchange")
    importlib.import_module("exchange_candidates.pytorch").start()
    native.set_num_threads(1)  # as a rank with one core
    make = importlib.import_module("exchange_candidates.calibration").candidates
    rows: list[dict[str, Any]] = []
    for num_elements in sizes:
        rows += [
            {"elements": num_elements, **row}
            for row in bench.time_candidates(make(num_elements), interface, repetitions)
        ]
    bench.write_together([*rows, *_time_codecs(repetitions)], output)


def _time_codecs(repetitions: int) -> list[dict[str, Any]]:
    from bench_codecs import measure_times, subject_of

    values = np.random.default_rng(0).standard_normal(CODEC_ELEMENTS).astype(np.float32)
    total = np.zeros_like(values)
    payloads = np.zeros(codecs.none().payload_nbytes(values.size), np.uint8)
    subjects = [subject_of(name, codec, values, total, payloads) for name, codec in model.CODECS.items()]
    measure_times(subjects, values, repetitions)
    return [
        {
            "codec": subject.name,
            "encode": statistics.median(subject.encode_seconds) / values.size,
            "decode": statistics.median(subject.decode_seconds) / values.size,
        }
        for subject in subjects
    ]


def measure(
    job: Job, sizes: Sequence[int], repetitions: int, timeout: float
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """Return the rows of a job, and of each codec what an element takes; raises CalibrationError, NotAvailableError."""
    with tempfile.TemporaryDirectory(prefix="pqasgd_simulate_") as folder:
        output = Path(folder) / "rows.json"
        command = [sys.executable, str(ROOT / "scripts" / "simulate.py"), "--worker", str(output)]
        command += ["--sizes", *map(str, sizes), "--repetitions", str(repetitions)]
        settings = [text for name, value in SETTINGS.items() for text in ("--mca", name, value)]
        status = hosts.run(
            "shaped", command, rate=job.rate, hosts=job.ranks, mpirun_arguments=settings, timeout=timeout
        )
        if status != 0:
            raise CalibrationError(f"the job on {job.ranks} hosts ended with status {status}; what it printed is above")
        found = json.loads(output.read_text())
    speeds = {row["codec"]: {key: row[key] for key in ("encode", "decode")} for row in found if "codec" in row}
    rows = []
    for row in found:
        if "codec" in row:
            continue
        seconds = {key: round(row[key], 6) for key in ("seconds", "fastest", "slowest")}
        nbytes = {key: row[key] for key in ("bytes_sent", "interface_bytes")}
        rate = parse_rate(job.rate)
        rows.append(
            {"ranks": job.ranks, "rate": rate, "elements": row["elements"], "way": row["name"], **seconds, **nbytes}
            | {"held_back": job.held_back}
        )
    return rows, speeds


def check_bytes(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise CalibrationError unless each average has sent exactly what the model says."""
    for row in rows:
        predicted, _ = model.bytes_sent(model.way_of(row), row["elements"], row["ranks"])
        if predicted != row["bytes_sent"]:
            raise CalibrationError(
                f"{row['way']} of {row['elements']} elements on {row['ranks']} ranks has sent {row['bytes_sent']} "
                f"bytes from rank 0, and the model says {predicted}"
            )


def summarize(errors: Sequence[float]) -> dict[str, float]:
    """Return what is told of errors."""
    return {
        "predictions": len(errors),
        "median": round(statistics.median(errors), 4),
        "worst": round(max(errors), 4),
    }


def evaluate(
    rows: Sequence[Mapping[str, Any]], cores: int, speeds: Mapping[str, Mapping[str, float]]
) -> tuple[model.Costs, dict[str, dict[str, float]]]:
    """Fit to what is not held back; return the costs, and the errors by what was predicted."""
    encode, decode = ({name: each[key] for name, each in speeds.items()} for key in ("encode", "decode"))
    seen = [row for row in rows if not row["held_back"]]
    costs = model.fit(seen, cores, encode, decode)
    held_back = [row for row in rows if row["held_back"]]
    found = {
        "fitted": summarize(model.errors(costs, seen, cores)),
        "held back": summarize(model.errors(costs, held_back, cores)),
    }
    for ranks in sorted({row["ranks"] for row in rows}):
        others = model.fit([row for row in rows if row["ranks"] != ranks], cores, encode, decode)
        own = [row for row in rows if row["ranks"] == ranks]
        found[f"{ranks} ranks, from the others"] = summarize(model.errors(others, own, cores))
    return costs, found


def calibrate(
    jobs: Sequence[Job] = JOBS,
    sizes: Sequence[int] = SIZES,
    repetitions: int = 5,
    timeout: float = 300.0,
    output: Path = COSTS,
) -> None:
    """Measure, fit, and write the costs; raises CalibrationError or NotAvailableError."""
    hosts.check_available(hosts=max(job.ranks for job in jobs))
    machine = describe_machine()
    warn_if_busy(machine)
    del machine["system"]  # what is committed names no kernel of somebody's
    rows: list[dict[str, Any]] = []
    speeds: dict[str, dict[str, float]] = {}
    for job in jobs:
        print(f"measuring on {job.ranks} hosts at {job.rate} ...", flush=True)
        measured, codec_speeds = measure(job, sizes, repetitions, timeout)
        rows += measured
        if job.ranks <= machine["cores"]:  # each rank has a core
            speeds = speeds or codec_speeds
    fit_and_write(machine, repetitions, rows, speeds, output)


def refit(path: Path = COSTS) -> None:
    """Fit anew to what a file has measured, and write it again."""
    document = read(path)
    costs = document["costs"]
    speeds = {name: {"encode": costs.encode[name], "decode": costs.decode[name]} for name in costs.encode}
    fit_and_write(document["machine"], document["repetitions"], document["measured"], speeds, path)


def fit_and_write(
    machine: Mapping[str, Any],
    repetitions: int,
    rows: Sequence[Mapping[str, Any]],
    speeds: Mapping[str, Mapping[str, float]],
    output: Path,
) -> None:
    """Fit the costs to measurements of this machine, and write both."""
    check_bytes(rows)
    costs, errors = evaluate(rows, machine["cores"], speeds)
    document = {
        "machine": machine,
        "settings": SETTINGS,
        "repetitions": repetitions,
        "costs": dataclasses.asdict(costs),
        "errors": errors,
    }
    lines = [json.dumps(row) for row in rows]
    text = json.dumps(document, indent=1)[:-2] + ',\n "measured": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    print(f"written to {os.path.relpath(output)}")


def read(path: Path = COSTS) -> dict[str, Any]:
    """Return what :func:`calibrate` has written, with ``costs`` as :class:`~.model.Costs`; raises CalibrationError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        costs = model.Costs(**document["costs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CalibrationError(
            f"{path} has no costs, which `python scripts/simulate.py --calibrate` writes: {error!r}"
        ) from None
    return {**document, "costs": costs}
