"""PyTorch and TensorFlow train alike: the same bits from the same gradients, the same way from the same problem."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from .program import DIMENSION, PERIOD, STEPS

PROGRAM = Path(__file__).with_name("program.py")
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory):
    """Train in both frameworks, with gradients of their own and with given ones; by framework, kind and rank."""
    folder = tmp_path_factory.mktemp("frameworks")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HOROVOD_", "OMPI_"))}
    found = {}
    for framework in ("torch", "tensorflow"):
        command = [str(BIN / "mpirun"), "--allow-run-as-root", "--oversubscribe", "-np", "2"]
        command += [sys.executable, str(PROGRAM), framework, str(folder)]
        result = subprocess.run(
            command, env=environment, cwd=PROGRAM.parents[2], capture_output=True, text=True, timeout=240
        )
        assert result.returncode == 0, result.stdout + result.stderr
        for kind in ("given", "own"):
            for rank in range(2):
                found[framework, kind, rank] = np.load(folder / f"{framework}-{kind}-{rank}.npy")
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_the_same_gradients_give_the_same_bits(trajectories, rank):
    one, other = (trajectories[framework, "given", rank] for framework in ("torch", "tensorflow"))
    assert one.shape == (STEPS, DIMENSION)
    assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("kind", ["given", "own"])
@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_the_ranks_are_equal_after_each_average_and_at_no_other_time(trajectories, framework, kind):
    equal = [
        np.array_equal(one, other)
        for one, other in zip(*(trajectories[framework, kind, rank] for rank in range(2)), strict=True)
    ]
    assert equal == [step % PERIOD == PERIOD - 1 for step in range(STEPS)]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_same_problem_gives_the_same_trajectory(trajectories, rank):
    """Up to what the last bit of a gradient may do: it moves a number by 1e-7, and then across a level of the codec."""
    one, other = (trajectories[framework, "own", rank].astype(np.float64) for framework in ("torch", "tensorflow"))
    moved = np.abs(one - one[0]).max(axis=1)[1:]
    apart = np.abs(one - other).max(axis=1)[1:]
    # A level of the 4-bit codec is less than a half of the block's standard deviation, which is less than what moves.
    assert (apart <= 0.5 * moved).all()
    assert np.sqrt(np.mean((one - other) ** 2)) < 1e-4
    assert np.sqrt(np.mean((one[-1] - one[0]) ** 2)) > 0.1
