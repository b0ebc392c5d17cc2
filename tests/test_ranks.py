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


@pytest.mark.timeout(TIMEOUT_SECONDS + 60)
@pytest.mark.parametrize(
    ("launcher", "size", "paths"),
    [
        ("gloo", 2, ["ranks"]),
        ("gloo", 4, ["ranks"]),
        ("mpi", 2, ["ranks"]),
        ("nodes", 4, ["ranks_nodes"]),
        ("nodes", 4, ["ranks_nodes_tensorflow"]),
        ("gloo", 2, ["ranks_tensorflow"]),
        # Graphs take long to trace. Here is what depends on the number of ranks, or on who carries bytes.
        ("gloo", 4, [f"ranks_tensorflow/test_{part}.py" for part in ("replicas", "periodic", "functions", "join")]),
        ("mpi", 2, ["ranks_tensorflow/test_replicas.py", "ranks_tensorflow/test_functions.py"]),
        pytest.param("gloo", 2, ["ranks_tensorflow"], marks=pytest.mark.long),
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
        "tensorflow-gloo-2-long",
    ],
)
def test_all_ranks_pass(launcher, size, paths, request):
    tests = [sys.executable, "-m", "pytest", *(f"tests/{path}" for path in paths), "-x", "-q", "-p", "no:cacheprovider"]
    if request.node.get_closest_marker("long"):
        tests += ["-m", "long"]
    # What this process set up for its own one rank is not for theirs.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HOROVOD_", "OMPI_"))}
    process = subprocess.Popen(
        [*LAUNCHERS[launcher], "-np", str(size), *tests, "-o", "timeout_method=thread", "-o", "timeout=120"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"still running after {TIMEOUT_SECONDS} s:\n{output}")
    assert process.returncode == 0, output
    assert output.count(" passed") == size, output
