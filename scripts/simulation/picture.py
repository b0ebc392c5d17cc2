"""Draws step time and bytes against ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

# Of the Okabe-Ito palette, which colour-blind people can tell apart.
COLORS = ("#000000", "#888888", "#0072B2", "#D55E00", "#009E73")


class Line(NamedTuple):
    """What one way comes to."""

    name: str
    ranks: Sequence[int]
    step_seconds: Sequence[float]
    nbytes: Sequence[float]


def spread(values: Sequence[float], distance: float) -> list[float]:
    """Move values apart until neighbours are ``distance`` from each other, in their order, and as little as may be.

    >>> spread([3.0, 1.0, 1.2], distance=1.0)
    [3.0, 0.6, 1.6]
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    groups: list[tuple[float, int]] = []  # means of neighbours that touch, and how many they are
    for i in order:
        center, count = values[i], 1
        while groups and center - (count - 1) * distance / 2 < groups[-1][0] + (groups[-1][1] + 1) * distance / 2:
            below, members = groups.pop()
            center = (below * members + center * count) / (members + count)
            count += members
        groups.append((center, count))
    places = [center + (k - (count - 1) / 2) * distance for center, count in groups for k in range(count)]
    moved = [0.0] * len(values)
    for i, place in zip(order, places, strict=True):
        moved[i] = round(place, 9)
    return moved


def draw(lines: Sequence[Line], compute: float, most_measured: int, title: str, path: Path) -> None:
    """Draw both panels; what is beyond ``most_measured`` ranks, the extrapolation, is dashed."""
    plt.rcParams.update(
        {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    )
    figure, (times, nbytes) = plt.subplots(1, 2, figsize=(14, 6.2), dpi=150, layout="constrained")
    _fill(times, lines, [[1e3 * value for value in line.step_seconds] for line in lines], most_measured)
    _fill(nbytes, lines, [[value / 1e6 for value in line.nbytes] for line in lines], most_measured)
    if compute > 0:
        times.set_ylim(bottom=min(times.get_ylim()[0], 1e3 * compute / 1.4))
        times.axhline(1e3 * compute, color="#555555", linewidth=1, linestyle=":")
        first = lines[0].ranks[0]
        times.annotate(
            "computation alone", (first, 1e3 * compute), (0, -4), textcoords="offset points", va="top", fontsize=9.5,
            color="#555555",
        )  # fmt: skip
    times.set(ylabel="ms of a step (log scale)", xlabel="ranks (log scale)")
    nbytes.set(ylabel="MB sent by a rank in a step (log scale)", xlabel="ranks (log scale)")
    figure.suptitle("Predicted step time and bytes", fontsize=14, weight="bold")
    figure.text(0.5, -0.03, f"{title}; dashed beyond {most_measured} ranks: extrapolated", ha="center", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def _fill(axis: Any, lines: Sequence[Line], values: Sequence[Sequence[float]], most_measured: int) -> None:
    axis.set(xscale="log", yscale="log" if any(value > 0 for own in values for value in own) else "linear")
    for line, color, own in zip(lines, COLORS, values, strict=False):
        split = sum(ranks <= most_measured for ranks in line.ranks)
        axis.plot(line.ranks[:split], own[:split], color=color, linewidth=2, marker="o", markersize=4)
        axis.plot(line.ranks[max(0, split - 1) :], own[max(0, split - 1) :], color=color, linewidth=1.6, linestyle="--")
    ranks = lines[0].ranks
    axis.set_xlim(ranks[0] / 1.2, ranks[-1] * 1.2)
    axis.set_xticks(ranks)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.tick_params(axis="x", labelsize=9)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    ends = [(line.name, color, own[-1]) for line, color, own in zip(lines, COLORS, values, strict=False) if own[-1] > 0]
    if not ends:
        return
    low, high = (math.log(limit) for limit in axis.get_ylim())
    places = spread([math.log(end) for _, _, end in ends], 0.05 * (high - low))
    for (name, color, end), place in zip(ends, places, strict=True):
        axis.annotate(
            name, (ranks[-1], end), (ranks[-1] * 1.35, math.exp(place)), color=color, va="center",
            fontsize=10, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2},
        )  # fmt: skip
