#!/usr/bin/env python3
"""Recompute the Lloyd-Max centroids of the normal law and compare or rewrite the table in codecs/lloyd_max.py.

A quantizer of N(0, 1) with 2K levels, symmetric about zero, has the least mean squared error when every centroid is the
mean of its cell and every threshold is halfway between its neighbours (Lloyd 1957, Max 1960). With positive centroids
c_0 < .. < c_{K-1}, thresholds t_0 = 0, t_k = (c_{k-1} + c_k) / 2, t_K = infinity, this is the system

    F_k(c) = c_k - E[x | t_k < x < t_{k+1}] = 0,      E[x | a < x < b] = (phi(a) - phi(b)) / (Phi(b) - Phi(a)).

F_k depends on c_{k-1}, c_k and c_{k+1} only, so each Newton step solves a tridiagonal system. The start is the
high-resolution optimum, whose levels have density proportional to phi(x)^(1/3): quantiles of N(0, 3). Standard library
only.

    python3 scripts/make_lloyd_max.py            check the table against the solver (exit status 1 if a number differs)
    python3 scripts/make_lloyd_max.py --write    rewrite the table
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import re
import struct
import sys
from pathlib import Path
from statistics import NormalDist

TABLE_FILE = Path(__file__).resolve().parent.parent / "pqasgd_horovod" / "codecs" / "lloyd_max.py"
MAX_BITS = 8
VALUES_PER_LINE = 8
TOLERANCE = 1e-11  # rounding leaves Newton steps of some 1e-12; float32 resolves 1e-8


def density(x: float) -> float:
    """Density of N(0, 1)."""
    return math.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)


def mass(a: float, b: float) -> float:
    """P(a < x < b) for 0 <= a < b, from the complementary error function, which keeps its precision in the tail."""
    return 0.5 * (math.erfc(a / math.sqrt(2.0)) - math.erfc(b / math.sqrt(2.0)))


def cell_mean(a: float, b: float) -> float:
    """E[x | a < x < b]."""
    return (density(a) - density(b)) / mass(a, b)


def thresholds(centroids: list[float]) -> list[float]:
    """Cell boundaries of the positive half: zero, the midpoints, infinity."""
    return [0.0, *((low + high) / 2 for low, high in itertools.pairwise(centroids)), math.inf]


def newton_step(centroids: list[float]) -> list[float]:
    """Return the correction dc that solves F'(c) dc = -F(c) by elimination in the tridiagonal system."""
    t = thresholds(centroids)
    diagonal: list[float] = []
    upper: list[float] = []
    right: list[float] = []
    for k, c in enumerate(centroids):
        a, b = t[k], t[k + 1]
        mean, p = cell_mean(a, b), mass(a, b)
        by_a = density(a) * (mean - a) / p if k > 0 else 0.0  # dE/da; the threshold 0 does not move
        by_b = density(b) * (b - mean) / p if math.isfinite(b) else 0.0
        low, mid, high, rhs = -by_a / 2, 1 - (by_a + by_b) / 2, -by_b / 2, mean - c
        if k > 0:
            factor = low / diagonal[-1]
            mid -= factor * upper[-1]
            rhs -= factor * right[-1]
        diagonal.append(mid)
        upper.append(high)
        right.append(rhs)
    step = [0.0] * len(centroids)
    for k in reversed(range(len(centroids))):
        following = step[k + 1] if k + 1 < len(centroids) else 0.0
        step[k] = (right[k] - upper[k] * following) / diagonal[k]
    return step


def is_rising(centroids: list[float]) -> bool:
    """True if 0 < c_0 < c_1 < ..."""
    return all(low < high for low, high in itertools.pairwise([0.0, *centroids]))


def solve(bits: int) -> list[float]:
    """Return the 2^(bits-1) positive centroids, rising."""
    half = 1 << (bits - 1)
    wide = NormalDist(0.0, math.sqrt(3.0))
    centroids = [wide.inv_cdf(0.5 + (k + 0.5) / (2 * half)) for k in range(half)]
    for _ in range(100):
        step = newton_step(centroids)
        while not is_rising(moved := [c + s for c, s in zip(centroids, step, strict=True)]):
            step = [s / 2 for s in step]
        centroids = moved
        if max(map(abs, step)) < TOLERANCE:
            return centroids
    raise RuntimeError(f"Newton's method did not converge for {bits} bits: the last step was {max(map(abs, step)):g}")


def mean_squared_error(centroids: list[float]) -> float:
    """Distortion of N(0, 1); at the optimum it is 1 - sum of p_k c_k^2 over all cells."""
    t = thresholds(centroids)
    return 1.0 - 2.0 * sum(mass(t[k], t[k + 1]) * c * c for k, c in enumerate(centroids))


def float32(x: float) -> float:
    """Nearest float32."""
    (nearest,) = struct.unpack("<f", struct.pack("<f", x))
    return float(nearest)


def literal(x: float) -> str:
    """Shortest decimal number that is the same float32."""
    return next(text for digits in range(1, 18) if float32(float(text := f"{float32(x):.{digits}g}")) == float32(x))


def table(all_centroids: list[list[float]]) -> str:
    """Source text of the table."""
    lines = ["POSITIVE_CENTROIDS: tuple[tuple[float, ...], ...] = ("]
    for bits, centroids in enumerate(all_centroids, start=1):
        plural = "s" if bits > 1 else ""
        lines.append(f"    (  # {bits} bit{plural}, mean squared error {mean_squared_error(centroids):.4e}")
        words = [literal(c) + "," for c in centroids]
        for at in range(0, len(words), VALUES_PER_LINE):
            lines.append("        " + " ".join(words[at : at + VALUES_PER_LINE]))
        lines.append("    ),")
    return "\n".join([*lines, ")"])


def main() -> int:
    """Check or rewrite the table; return the exit status."""
    parser = argparse.ArgumentParser(description="Check or rewrite the Lloyd-Max table.")
    parser.add_argument("--write", action="store_true", help=f"rewrite the table in {TABLE_FILE.name}")
    arguments = parser.parse_args()
    solved = [solve(bits) for bits in range(1, MAX_BITS + 1)]
    if arguments.write:
        old = TABLE_FILE.read_text()
        pattern = re.compile(r"^POSITIVE_CENTROIDS.*?^\)$", re.MULTILINE | re.DOTALL)
        new, count = pattern.subn(lambda _: table(solved), old, count=1)
        if count != 1:
            raise RuntimeError(f"{TABLE_FILE} holds no table 'POSITIVE_CENTROIDS ... )' to replace")
        TABLE_FILE.write_text(new)
        return 0
    spec = importlib.util.spec_from_file_location("lloyd_max", TABLE_FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if tuple(tuple(float(literal(c)) for c in row) for row in solved) != module.POSITIVE_CENTROIDS:
        print(f"the table in {TABLE_FILE} differs from the solver's; rewrite it with --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
