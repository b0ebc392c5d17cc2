#!/usr/bin/env python3
r"""Show that quantized, periodic averaging converges as fast as theory says: O(1/sqrt(nK)), with n ranks and K steps.

P. Jiang and G. Agrawal (NeurIPS 2018) prove it for smooth, non-convex functions: with a learning rate of
c sqrt(n / K) the squared norm of the gradient, averaged over the steps, falls as 1/sqrt(nK) as long as period and
quantizer are not too coarse. Here n = 1, 2, 4, 8 ranks, threads of this process, minimize

    f = mean of f_i,   f_i(x) = sum over j of h_j (1 - cos x_j) + b_ij x_j,   sum over i of b_ij = 0,

which is non-convex and L-smooth with L = max h_j <= 1. Each rank i knows f_i only (its part of the data), by gradients
with Gaussian noise of standard deviation 1, and averages through this package. docs/convergence.md has the result.

Leaves in build/reproduce: report.json and convergence.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from bench_tools import ROOT, format_table
from numpy.typing import NDArray

from pqasgd_horovod import codecs
from pqasgd_horovod.averaging import (
    ArrayView,
    ExchangeConfig,
    GradientAverager,
    PeriodicAverager,
    PeriodicAveraging,
    SparseAveraging,
)
from pqasgd_horovod.codecs import Codec
from pqasgd_horovod.exchange.carriers.threads import ThreadCarrier, run_ranks

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

RANKS = (1, 2, 4, 8)
STEPS = (256, 512, 1024, 2048, 4096)
DIMENSION = 4096
TIMEOUT_SECONDS = 600.0

Array = NDArray[np.float32]


class Method(NamedTuple):
    """A way to train."""

    name: str
    codec: Codec
    averaging: Callable[[int], PeriodicAveraging]  # for so many steps
    breaks: str  # the condition that does not hold; "" if all do
    color: str  # of the Okabe-Ito palette, which colour-blind people can tell apart
    exchange: str = "allgather"  # the mean of what each rank has coded, as in the paper


METHODS = (
    Method("SGD", codecs.none(), lambda steps: PeriodicAveraging(1), "", "#000000"),
    Method("QG, 2 bits", codecs.quantize(bits=2), lambda steps: PeriodicAveraging(1), "", "#0072B2"),
    Method("SPA, period 4", codecs.none(), lambda steps: SparseAveraging(4), "", "#56B4E9"),
    Method("PQASGD, 2 bits, period 4", codecs.quantize(bits=2), lambda steps: PeriodicAveraging(4), "", "#009E73"),
    Method(
        "the same, two-phase exchange",
        codecs.quantize(bits=2),
        lambda steps: PeriodicAveraging(4),
        "",
        "#E69F00",
        exchange="two_phase",
    ),
    Method(
        "PQASGD, 2 bits, period K/4",
        codecs.quantize(bits=2),
        lambda steps: PeriodicAveraging(steps // 4),
        "period grows as fast as K",
        "#D55E00",
    ),
    Method(
        "QG, QSGD of 2 bits in blocks of 4096",
        codecs.qsgd(bits=2, block_size=4096),
        lambda steps: PeriodicAveraging(1),
        "q = 50 is not O(1)",
        "#CC79A7",
    ),
)


class Problem:
    """What `num_ranks` ranks minimize, with random numbers that follow from `seed`."""

    def __init__(self, num_ranks: int, dimension: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.curvature = generator.uniform(0.5, 1.0, dimension).astype(np.float32)
        self.start = generator.uniform(0, 2 * np.pi, dimension).astype(np.float32)
        slopes = generator.normal(0, 0.5, (num_ranks, dimension))
        self.slopes = (slopes - slopes.mean(axis=0)).astype(np.float32)

    def gradient(self, x: Array) -> Array:
        """Return the gradient of f."""
        return self.curvature * np.sin(x)

    def stochastic_gradient(self, x: Array, rank: int, generator: np.random.Generator) -> Array:
        """Return the gradient of f_i with noise."""
        return self.gradient(x) + self.slopes[rank] + generator.standard_normal(x.size, np.float32)


def simulate(method: Method, num_ranks: int, steps: int, seed: int, dimension: int = DIMENSION) -> float:
    """Return the mean over the steps of |grad f|^2 at the mean of the replicas, over that at the start."""
    problem = Problem(num_ranks, dimension, seed)
    rate = np.float32(np.sqrt(num_ranks / steps))
    averaging = method.averaging(steps)
    config = ExchangeConfig(method.codec, method=method.exchange, seed=seed)
    # Before each step every rank shows its replica, and rank 0 looks at their mean while the others go on: two places.
    shown = np.empty((2, num_ranks, dimension), np.float32)
    barrier = threading.Barrier(num_ranks, timeout=TIMEOUT_SECONDS)

    def program(carrier: ThreadCarrier) -> float:
        generator = np.random.default_rng((seed, carrier.rank))
        x, total = problem.start.copy(), 0.0
        gradient = ArrayView("gradient", np.zeros_like(x))
        averager: GradientAverager | PeriodicAverager
        if averaging.exchanges_gradients:
            averager = GradientAverager(carrier, config, name="example")
            averager.prepare([gradient])
        else:
            averager = PeriodicAverager(carrier, averaging, config, name="example")
            averager.prepare([ArrayView("x", x)])
        try:
            for step in range(steps):
                place = shown[step % 2]
                place[carrier.rank] = x
                barrier.wait()
                if carrier.rank == 0:
                    total += float(np.square(problem.gradient(place.mean(axis=0))).sum())
                gradient.array[:] = problem.stochastic_gradient(x, carrier.rank, generator)
                if isinstance(averager, GradientAverager):
                    averager.finish()
                x -= rate * gradient.array
                if isinstance(averager, PeriodicAverager):
                    averager.count_step(float(rate))
        except BaseException:
            barrier.abort()
            raise
        return total / steps

    mean = run_ranks(num_ranks, program, timeout=TIMEOUT_SECONDS)[0]
    return float(mean / np.square(problem.gradient(problem.start)).sum())


class Point(NamedTuple):
    """One run."""

    method: str
    num_ranks: int
    steps: int
    seed: int
    gradient: float


class Slopes(NamedTuple):
    """Exponents a of gradient ~ x^a: of x = nK, and of n and K apart; each with the half of its 95 % interval."""

    both: tuple[float, float]
    ranks: tuple[float, float]
    steps: tuple[float, float]


def fit(points: Sequence[Point]) -> Slopes:
    """Fit straight lines to the logarithms by least squares; one rank sends nothing and does not count."""
    several = [point for point in points if point.num_ranks > 1]
    n, k, y = (np.log([getattr(point, name) for point in several]) for name in ("num_ranks", "steps", "gradient"))
    return Slopes(*_least_squares(y, n + k), *_least_squares(y, n, k))


def _least_squares(y: NDArray[Any], *x: NDArray[Any]) -> list[tuple[float, float]]:
    from scipy.special import stdtrit

    design = np.stack([np.ones_like(y), *x], axis=1)
    coefficients = np.linalg.lstsq(design, y)[0]
    freedom = len(y) - design.shape[1]
    variance = np.square(y - design @ coefficients).sum() / freedom
    deviations = np.sqrt(np.diag(variance * np.linalg.inv(design.T @ design)))
    halves = stdtrit(freedom, 0.975) * deviations
    return [(float(c), float(half)) for c, half in list(zip(coefficients, halves, strict=True))[1:]]


def make_table(methods: Sequence[Method], points: Sequence[Point]) -> str:
    """Return the slopes as text."""
    rows = []
    for method in methods:
        slopes = fit([point for point in points if point.method == method.name])
        rows.append([method.name, *(f"{slope:.3f} ± {half:.3f}" for slope, half in slopes), method.breaks or "holds"])
    return format_table(["method", "in nK", "in n", "in K", "condition"], rows)


def draw(methods: Sequence[Method], points: Sequence[Point], path: Path) -> None:
    """Draw the mean of the seeds by nK; the left side is where the conditions hold."""
    plt.rcParams.update(
        {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    )
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.2), sharey=True, layout="constrained")
    ranks = sorted({point.num_ranks for point in points})
    markers = dict(zip(ranks, itertools.cycle("os^D"), strict=False))
    samples = np.array(sorted({point.num_ranks * point.steps for point in points}), float)
    for axis, title, chosen in (
        (axes[0], "where the conditions hold", [method for method in methods if not method.breaks]),
        (axes[1], "where one is broken", [method for method in methods if method.breaks]),
    ):
        for method in chosen:
            own = [point for point in points if point.method == method.name]
            for n in ranks:
                steps = sorted({point.steps for point in own})
                y = [np.mean([p.gradient for p in own if (p.num_ranks, p.steps) == (n, k)]) for k in steps]
                style = {"color": method.color, "marker": markers[n], "markersize": 6, "linewidth": 1}
                axis.plot(n * np.array(steps), y, **style, alpha=0.85, markerfacecolor="none")
        reference = [p.gradient * np.sqrt(p.num_ranks * p.steps) for p in points if p.method == methods[0].name]
        axis.plot(samples, np.mean(reference) / np.sqrt(samples), "--", color="#888888", linewidth=1.2, zorder=0)
        axis.set(xscale="log", yscale="log", xlabel="n K: gradients of all ranks together", title=title)
        handles = [
            Line2D([], [], color=method.color, label=f"{method.name}: slope {slope:.3f} ± {half:.3f}")
            for method in chosen
            for slope, half in [fit([p for p in points if p.method == method.name]).both]
        ]
        axis.legend(handles=handles, loc="lower left", frameon=False, fontsize=9.5)
    axes[0].set_ylabel("mean of |∇f|² over the steps, relative to the start")
    handles = [
        Line2D([], [], color="#555555", marker=markers[n], markerfacecolor="none", linestyle="", label=f"n = {n}")
        for n in ranks
    ]
    handles.append(Line2D([], [], color="#888888", linestyle="--", label="1 / √(nK)"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle("Squared gradient norm of a non-convex function, learning rate √(n/K)", weight="bold")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Run all methods, print the slopes, draw the picture and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method, n and K (%(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "reproduce", help="folder (%(default)s)")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")

    args.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    points: list[Point] = []
    for method in METHODS:
        for num_ranks, steps, seed in itertools.product(RANKS, STEPS, range(args.seeds)):
            gradient = simulate(method, num_ranks, steps, seed)
            points.append(Point(method.name, num_ranks, steps, seed, gradient))
        print(f"{method.name}: done after {time.perf_counter() - started:.0f} s", flush=True)
    print(f"\nSlopes in log-log, with 95 % intervals; theory has -0.5\n\n{make_table(METHODS, points)}\n")
    report = {
        "points": [point._asdict() for point in points],
        "slopes": {m.name: fit([p for p in points if p.method == m.name])._asdict() for m in METHODS},
        "breaks": {m.name: m.breaks for m in METHODS},
    }
    (args.output / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(METHODS, points, args.output / "convergence.png")
    print(f"Picture: {args.output / 'convergence.png'}  Report: {args.output / 'report.json'}")


if __name__ == "__main__":
    main()
