"""How long two ranks take to average a model of 25 million parameters: stock Horovod, ours, and raw MPI.

Everything is measured in one job, one repetition of each in turn: stock Horovod's allreduce of ResNet-50's 161 tensors
in fp32 and in fp16, fused by Horovod as in training; an average by our optimizer of the same tensors at 8, 4 and 2
bits; and the same bytes as ours through one plain MPI allgather, the speed of light. Then the same in TensorFlow, in a
job of its own, against stock Horovod in TensorFlow. And eight training steps of PyTorch with one average at 4 bits,
applied at once or with a delay, against the same steps alone: what they take longer is the part of the exchange that is
exposed; the steps compute on the core that codes and sends too, or elsewhere. All of it over the loopback interface,
and between two hosts on a link of 1 Gbit/s (network namespaces and a token bucket, see hosts.py). Times are medians
of the slower rank's.
Bytes are those that one rank sends for one average: by our counters (for stock by the formula of a ring allreduce), and
by the interface's.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hosts
from bench_tools import OUTPUT, describe_machine, format_table, warn_if_busy, write_json
from exchange_candidates import Candidate, resnet50_shapes

LINKS = {"loopback": "loopback", "1gbit": "shaped"}  # row name: link of hosts.py
TARGETS = {
    ("1gbit", "ours 4 bits"): 6.0,
    ("1gbit", "ours 2 bits"): 8.0,
    ("loopback", "ours 4 bits"): 1.0,
    ("loopback", "ours 2 bits"): 1.0,
}
FRAMEWORKS = ("pytorch", "tensorflow", "overlap")  # the last one is PyTorch too
# For mpirun, the same for all. MPI waits by spinning; where a rank has one core, as here, that takes it from coding.
SETTINGS = ("--mca", "mpi_yield_when_idle", "1")
TOLERATED_BYTES = 0.05


def transmitted_bytes(interface: str) -> int:
    """What an interface has sent, from /proc/net/dev."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            return int(counters.split()[8])
    raise RuntimeError(f"interface {interface} is not in /proc/net/dev")


def time_candidates(candidates: Sequence[Candidate], interface: str, repetitions: int) -> list[dict[str, Any]]:
    """Run all candidates in turn, again and again, as one of the ranks; return a row for each."""
    from mpi4py import MPI  # Horovod has initialised it

    world = MPI.COMM_WORLD
    ranks_behind_interface = world.size if interface == "lo" else 1
    seconds: list[list[float]] = [[] for _ in candidates]
    on_interface: list[list[int]] = [[] for _ in candidates]
    for repetition in range(2 + repetitions):
        for index, candidate in enumerate(candidates):
            candidate.prepare()
            world.Barrier()
            before = transmitted_bytes(interface)
            begin = time.perf_counter()
            candidate.run()
            taken = time.perf_counter() - begin
            world.Barrier()  # what other ranks have received, this one has sent
            sent = transmitted_bytes(interface) - before
            slowest = world.allreduce(taken, MPI.MAX)
            if repetition >= 2:
                seconds[index].append(slowest)
                on_interface[index].append(sent // ranks_behind_interface)
    return [
        {
            "name": candidate.name,
            "seconds": statistics.median(times),
            "fastest": min(times),
            "slowest": max(times),
            "bytes_sent": candidate.bytes_sent(),
            "interface_bytes": int(statistics.median(counts)),
        }
        for candidate, times, counts in zip(candidates, seconds, on_interface, strict=True)
    ]


def write_together(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """Write the rows on the first rank, and let all of them end together: Horovod ends with the first one that does."""
    from mpi4py import MPI

    if MPI.COMM_WORLD.rank == 0:
        output.write_text(json.dumps(rows))
    MPI.COMM_WORLD.Barrier()


def measure(link: str, framework: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the job on one link and return its rows; raises NotAvailableError with the reason if that cannot be had."""
    kind = LINKS[link]
    with tempfile.TemporaryDirectory(prefix="pqasgd_bench_") as folder:
        output = Path(folder) / "rows.json"
        command = [sys.executable, os.path.abspath(__file__)]
        command += ["--worker", hosts.INTERFACE[kind], "--worker-output", str(output), "--frameworks", framework]
        command += ["--repetitions", str(options.repetitions), "--scale", str(options.scale)]
        mpirun_arguments = [*SETTINGS, *options.mpirun]
        try:
            hosts.check_available(kind)
            status = hosts.run(kind, command, mpirun_arguments=mpirun_arguments, timeout=options.timeout)
        except hosts.NotAvailableError as error:
            if kind != "loopback":
                raise
            print(f"note: on the loopback interface of this host, which others use too, because {error}")
            status = hosts.run_here(command, mpirun_arguments=mpirun_arguments, timeout=options.timeout)
        if status != 0:
            raise RuntimeError(f"the job on {link} ended with status {status}; what it printed is above")
        rows = json.loads(output.read_text())
    first = rows[0]["seconds"]
    compared: list[dict[str, Any]] = []
    for row in rows:
        seconds = row["seconds"]
        if framework != "overlap":
            against = {"speedup_over_fp32": first / seconds}
        else:
            first = first if row["bytes_sent"] else seconds  # a row without communication begins the next comparison
            against = {"exposed_seconds": seconds - first}
        compared.append({"link": link, "name": row["name"], "seconds": seconds, **against, **row})
    return compared


def _show(row: dict[str, Any]) -> list[str]:
    target = TARGETS.get((row["link"], row["name"]))
    texts = [f"{row['link']}: {row['name']}", f"{row['seconds']:.4f}", f"{row['fastest']:.4f} - {row['slowest']:.4f}"]
    texts += [f"{row['speedup_over_fp32']:.2f}" if "speedup_over_fp32" in row else ""]
    texts += [f"{row['exposed_seconds']:.4f}" if "exposed_seconds" in row else ""]
    texts += ["" if target is None else f">= {target:g}"]
    return [*texts, f"{row['bytes_sent'] / 1e6:.3f}", f"{row['interface_bytes'] / 1e6:.3f}"]


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS), help="which links (default: all)")
    parser.add_argument(
        "--frameworks", nargs="+", choices=FRAMEWORKS, default=list(FRAMEWORKS), help="which ones (default: all)"
    )
    parser.add_argument(
        "--repetitions", type=int, default=9, help="timed repetitions of everything (default: %(default)s)"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="size of the model, 1 is ResNet-50 (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout", type=float, default=300.0, help="seconds that one link may take (default: %(default)s)"
    )
    parser.add_argument(
        "--mpirun", action="append", default=[], metavar="ARG", help="one more argument for mpirun (may be repeated)"
    )
    parser.add_argument(
        "--output", type=Path, default=OUTPUT / "exchange.json", help="where the JSON goes (default: %(default)s)"
    )
    parser.add_argument("--worker", metavar="INTERFACE", help=argparse.SUPPRESS)
    parser.add_argument("--worker-output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        candidates = importlib.import_module(f"exchange_candidates.{options.frameworks[0]}").candidates(options.scale)
        write_together(time_candidates(candidates, options.worker, options.repetitions), options.worker_output)
        return 0

    hosts.end_on_sigterm()
    machine = describe_machine()
    warn_if_busy(machine)
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for link in options.links:
        print(f"measuring on {link} ...", flush=True)
        try:
            for framework in options.frameworks:
                rows += measure(link, framework, options)
        except hosts.NotAvailableError as error:
            skipped[link] = str(error)
            print(f"skipped {link}: {error}")
    header = [
        "link and candidate",
        "seconds",
        "fastest - slowest",
        "x fp32",
        "exposed s",
        "to reach",
        "MB by our count",
        "MB by the interface",
    ]
    print(format_table(header, [_show(row) for row in rows]))
    for row in rows:
        if row["bytes_sent"] and abs(row["interface_bytes"] - row["bytes_sent"]) > TOLERATED_BYTES * row["bytes_sent"]:
            print(
                f"warning: {row['link']}, {row['name']}: the counts of bytes differ by more than {TOLERATED_BYTES:.0%}"
            )
    settings = [*SETTINGS, *options.mpirun]
    print(f"mpirun settings, for all: {' '.join(settings) or 'the defaults'}")
    document = {
        "rows": rows,
        "skipped": skipped,
        "machine": machine,
        "settings": settings,
        "repetitions": options.repetitions,
    }
    write_json(
        options.output, {**document, "parameters": sum(map(math.prod, resnet50_shapes())), "scale": options.scale}
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.TimeoutExpired as error:
        sys.exit(f"bench_exchange: a job took longer than {error.timeout:g} s and was ended; is the machine busy?")
    except RuntimeError as error:
        sys.exit(f"bench_exchange: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
