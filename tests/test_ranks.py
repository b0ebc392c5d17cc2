"""The tests in tests/ranks, tests/ranks_tensorflow and, for nodes, tests/ranks_nodes*, under each launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
TIMEOUT_SECONDS = 1500  # TensorFlow traces graphs anew for each fit: 2 cores need 400, and other work on them more
LAUNCHERS = {
    "gloo": [str(BIN / "horovodrun"), "--gloo"],
    # Two names of this machine are two hosts.
    "nodes": [str(BIN / "horovodrun"), "--gloo", "-H", "localhost:2,127.0.0.1:2"],
    "mpi": [str(BIN / "mpirun"), "--allow-run-as-root", "--oversubscribe", "--tag-output"],
}


def files(folder: str, *parts: str) -> list[str]:
    """Some tests of a folder."""
    return [f"tests/{folder}/test_{part}.py" for part in parts]


# What depends on the number of ranks, and what on who carries bytes. Under all launchers all of it takes too long.
BY_SIZE = ("feedback", "functions", "join", "methods", "mismatch", "periodic", "quantized", "sign", "sparse_codecs")
BY_CARRIER = ("functions", "join", "mismatch", "periodic", "quantized", "stock")


@pytest.mark.timeout(TIMEOUT_SECONDS + 60)
@pytest.mark.parametrize(
    ("launcher", "size", "paths"),
    [
        ("gloo", 2, ["tests/ranks"]),
        ("gloo", 4, files("ranks", *BY_SIZE)),
        ("mpi", 2, files("ranks", *BY_CARRIER)),
        ("nodes", 4, ["tests/ranks_nodes"]),
        ("nodes", 4, ["tests/ranks_nodes_tensorflow"]),
        ("gloo", 2, ["tests/ranks_tensorflow"]),
        ("gloo", 4, files("ranks_tensorflow", "replicas", "periodic", "functions", "join")),
        ("mpi", 2, files("ranks_tensorflow", "replicas", "functions")),
        pytest.param("gloo", 4, ["tests/ranks"], marks=pytest.mark.long),
        pytest.param("mpi", 2, ["tests/ranks"], marks=pytest.mark.long),
        pytest.param("gloo", 2, ["tests/ranks_tensorflow", "-m", "long"], marks=pytest.mark.long),
    ],
    ids=[
        "gloo-2",
        "gloo-4",
        "mpi-2",
        "nodes",
        "tensorflow-nodes",
        "tensorflow-gloo-2",
        "tensorflow-gloo-4",
        "tensorflow-mpi-2",
        "gloo-4-all",
        "mpi-2-all",
        "tensorflow-gloo-2-long",
    ],
)
def test_all_ranks_pass(launcher, size, paths):
    tests = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *paths]
    status, output = run(launcher, size, *tests, "-o", "timeout_method=thread", "-o", "timeout=120")
    assert status == 0, output
    assert output.count(" passed") == size, output


@pytest.mark.parametrize("launcher", ["gloo", "mpi"])
def test_a_device_that_breaks_in_the_middle_ends_the_job(launcher):
    status, output = run(launcher, 2, "-m", "tests.ranks.broken_device", timeout=100)
    assert status != 0
    assert output.count("training") >= 2, output
    assert "_pack: CUDA refuses: unspecified launch failure" in output, output
    assert "not reached" not in output


def run(launcher: str, size: int, *arguments: str, timeout: float = TIMEOUT_SECONDS) -> tuple[int, str]:
    """Run Python on several ranks; return the exit status, and what they printed."""
    # What this process set up for its own one rank is not for theirs.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HOROVOD_", "OMPI_"))}
    process = subprocess.Popen(
        [*LAUNCHERS[launcher], "-np", str(size), sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"still running after {timeout} s:\n{output}")
    return process.returncode, output
