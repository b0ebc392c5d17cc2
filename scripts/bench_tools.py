"""What the benchmarks share: a table, a description of the machine, and the JSON file."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pqasgd_horovod import native

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "build" / "bench"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay text out in columns, the first one to the left and the others to the right.

    >>> print(format_table(["codec", "q"], [["none", "0"], ["eden", "0.13"]]))
    codec     q
    -----  ----
    none      0
    eden   0.13
    """
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            text.rjust(width) if column else text.ljust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def describe_machine() -> dict[str, Any]:
    """Return what a reader needs to compare numbers from different machines; the load says whether it was quiet."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "isa": native.isa(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def warn_if_busy(machine: dict[str, Any]) -> None:
    """Say so if other programs were running."""
    if machine["load_average"] > 0.7:
        print(f"note: the load average is {machine['load_average']}; times are only good on a quiet machine")


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write ``document``, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written to {path}")
