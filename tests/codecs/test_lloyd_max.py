"""The table of centroids is the best quantizer of the normal law, and the C++ build gets the same numbers."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pqasgd_horovod.codecs import lloyd_max

ROOT = Path(__file__).parents[2]

# Mean squared error of the best quantizers of N(0, 1): Max (1960), table I, for 2, 4, 8, 16 and 32 levels.
MAX_1960 = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}


@pytest.mark.parametrize("bits", range(1, 9))
def test_each_centroid_is_the_mean_of_its_cell(bits):
    centroids = np.array(lloyd_max.POSITIVE_CENTROIDS[bits - 1])
    assert centroids.size == 1 << (bits - 1)
    assert (np.diff(centroids, prepend=0) > 0).all()
    edges = [0.0, *((centroids[:-1] + centroids[1:]) / 2), math.inf]
    density = [math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi) for x in edges]
    tail = [0.5 * math.erfc(x / math.sqrt(2)) for x in edges]
    means = -np.diff(density) / -np.diff(tail)
    np.testing.assert_allclose(centroids, means, rtol=1e-6)


@pytest.mark.parametrize(("bits", "error"), MAX_1960.items())
def test_errors_of_max(bits, error):
    centroids = np.array(lloyd_max.POSITIVE_CENTROIDS[bits - 1])
    edges = np.array([0.0, *((centroids[:-1] + centroids[1:]) / 2), math.inf])
    tail = np.array([0.5 * math.erfc(x / math.sqrt(2)) for x in edges])
    assert 1 - 2 * float(np.sum(-np.diff(tail) * centroids**2)) == pytest.approx(error, rel=3e-3)


def test_numbers_are_float32():
    for row in lloyd_max.POSITIVE_CENTROIDS:
        assert [float(str(np.float32(c))) for c in row] == list(row)


def test_the_c_table_holds_the_same_numbers():
    """Run as the native build does: as a script, by an interpreter that cannot import NumPy or the package."""
    script = ROOT / "pqasgd_horovod" / "codecs" / "lloyd_max.py"
    text = subprocess.run([sys.executable, "-I", "-S", str(script)], capture_output=True, text=True, check=True).stdout
    assert "PQ_TABLE const float kLloydMax[8][128] = {" in text
    rows = re.findall(r"\{((?:0x[^{}]*f,\s*)+)\}", text)
    assert len(rows) == 8
    for row, centroids in zip(rows, lloyd_max.POSITIVE_CENTROIDS, strict=True):
        numbers = [float.fromhex(word) for word in re.findall(r"(0x\S+)f,", row)]
        assert numbers == [float(np.float32(c)) for c in centroids]


def test_the_solver_makes_this_table():
    subprocess.run([sys.executable, str(ROOT / "scripts" / "make_lloyd_max.py")], check=True)
