"""Starts the trainers as users do."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
BIN = Path(sys.executable).parent
TIMEOUT_SECONDS = 200
LAUNCHERS = {
    "horovodrun": [str(BIN / "horovodrun"), "--gloo", "-np", "2"],
    "mpirun": [
        str(BIN / "mpirun"), "--allow-run-as-root", "--oversubscribe", "--bind-to", "none",
        "--mca", "mpi_yield_when_idle", "1", "-np", "2",
    ],
    "python": [],
}  # fmt: skip


def launch_train(*arguments: Any, launcher: str = "horovodrun") -> subprocess.CompletedProcess[str]:
    """Run the trainer on two ranks (one with `launcher="python"`); return exit code and output, stderr included."""
    return launch([sys.executable, str(SCRIPTS / "train.py"), *map(str, arguments), "--threads", "1"], launcher)


def launch(command: list[str], launcher: str = "horovodrun") -> subprocess.CompletedProcess[str]:
    command = [*LAUNCHERS[launcher], *command]
    # What this process set up for its own one rank is not for theirs.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HOROVOD_", "OMPI_"))}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # the launcher ends its ranks
        output, _ = process.communicate()
        pytest.fail(f"{shlex.join(command)}: still running after {TIMEOUT_SECONDS} s:\n{output}")
    return subprocess.CompletedProcess(command, process.returncode, output)


def train(*arguments: Any, launcher: str = "horovodrun") -> str:
    """Run the trainer, which must end well; return its output."""
    result = launch_train(*arguments, "--quiet", launcher=launcher)
    assert result.returncode == 0, f"{shlex.join(map(str, arguments))}:\n{result.stdout}"
    return result.stdout


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
