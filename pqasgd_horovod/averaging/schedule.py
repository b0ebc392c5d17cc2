"""When to average: the strategy that ``averaging=`` takes."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from ..codecs.base import check_integer
from ..errors import ArgumentError

BUFFER_POLICIES = ("statistics", "all", "local")


@dataclasses.dataclass(frozen=True)
class PeriodicAveraging:
    r"""Average the replicas every ``period`` steps.

    Each step :math:`x_i \leftarrow x_i - g\,\nabla_i` is local; after ``period`` of them
    :math:`a \leftarrow a + \frac1n \sum_i Q(x_i - a)` and :math:`x_i \leftarrow a`, with the anchor :math:`a` of the
    last average. With ``period=1`` the gradients are exchanged instead, as Horovod does.

    Source: P. Jiang and G. Agrawal, "A Linear Speedup Analysis of Distributed Deep Learning with Sparse and Quantized
    Communication", NeurIPS 2018 (PQASGD).

    Args:
        period: steps between averages, at least 1. Larger: fewer bytes, and replicas that drift further apart.
        buffers: what becomes of floating-point buffers at an average. ``"statistics"``: the running statistics of
            normalization layers are averaged; ``"all"``: every floating-point buffer is; ``"local"``: none is. They
            travel as float32, uncompressed.

    Raises ArgumentError for other values.

    >>> PeriodicAveraging(period=8).due(steps_since_average=8)
    True
    """

    id: ClassVar[str] = "periodic"

    period: int = 8
    buffers: str = "statistics"

    def __post_init__(self) -> None:
        object.__setattr__(self, "period", check_integer("period", self.period, 1, 2**31))
        if self.buffers not in BUFFER_POLICIES:
            raise ArgumentError(
                f"buffers is {self.buffers!r}; it must be one of {', '.join(map(repr, BUFFER_POLICIES))}"
            )

    def due(self, steps_since_average: int) -> bool:
        """Return whether it is time to average after so many local steps."""
        return steps_since_average >= self.period

    def config(self) -> dict[str, Any]:
        """Return the configuration as a dict that JSON can hold."""
        return {"id": self.id, **dataclasses.asdict(self)}


def resolve_averaging(period: int | None, averaging: PeriodicAveraging | None) -> PeriodicAveraging:
    """Return the strategy that the arguments ``period`` and ``averaging`` of an optimizer stand for."""
    if averaging is None:
        return PeriodicAveraging(period=1 if period is None else period)
    if not isinstance(averaging, PeriodicAveraging):
        raise ArgumentError(
            f"averaging is {averaging!r}; it must be a strategy such as hvd.PeriodicAveraging(period=8)"
        )
    if period is not None and period != averaging.period:
        raise ArgumentError(
            f"period is {period} and averaging is {averaging}; give one of them, or the same period in both"
        )
    return averaging
