"""What the exchange benchmark compares, one module for each framework: averages of ResNet-50's tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

BITS = (8, 4, 2)


def resnet50_shapes() -> list[tuple[int, ...]]:
    """The 161 trainable tensors of ResNet-50, 25.6 million parameters."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, channels, 1, 1), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            shapes += [(4 * width, width, 1, 1), (4 * width,), (4 * width,)]
            if block == 0:
                shapes += [(4 * width, channels, 1, 1), (4 * width,), (4 * width,)]
            channels = 4 * width
    return [*shapes, (1000, channels), (1000,)]


def scaled_shapes(scale: float) -> list[tuple[int, ...]]:
    """The same, each shortened to ``scale`` of its first dimension."""
    return [(max(1, int(shape[0] * scale)), *shape[1:]) for shape in resnet50_shapes()]


class Candidate(NamedTuple):
    """One way to average: what is timed, what goes before it outside of the time, and the bytes that one rank sends."""

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object]
    bytes_sent: Callable[[], int]


def nothing() -> None:
    """There is nothing to prepare."""


def ring_bytes(num_elements: int, itemsize: int, size: int) -> int:
    """What each of ``size`` ranks sends in a ring allreduce."""
    return 2 * (size - 1) * num_elements * itemsize // size


def bytes_per_round(statistics: dict[str, Any]) -> int:
    """What one average has sent, by our own counters."""
    return int(statistics["bytes_sent"] // statistics["rounds"])
