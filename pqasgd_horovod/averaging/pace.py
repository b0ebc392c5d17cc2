"""How far it is to the next average, and what the learning rate has done: the state of schedule and outer step."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DesynchronizedError
from ..exchange.wire import format_by_rank
from .outer import Coefficients
from .strategy import PeriodicAveraging

_FLOAT, _BITS = struct.Struct("<d"), struct.Struct("<Q")


def check_learning_rates(details: Sequence[int]) -> None:
    """Raise DesynchronizedError unless all ranks have sent the same learning rate, as the bits of a float64."""
    if len(set(details)) > 1:
        rates = (_FLOAT.unpack(_BITS.pack(detail))[0] for detail in details)
        raise DesynchronizedError(
            f"the learning rate is {format_by_rank(enumerate(rates))}; the schedule or the outer optimizer depends on "
            "it, so it has to be the same on every rank"
        )


class Pace:
    """The state of a schedule, alike on all ranks."""

    def __init__(self, averaging: PeriodicAveraging) -> None:
        self._averaging = averaging
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.period = int(self._averaging.schedule.next_period(0, False))
        self.learning_rate: float | None = None  # at the last average
        self.has_dropped = False

    def detail(self, learning_rate: float) -> int:
        """Return what ranks tell each other in a meeting."""
        return int(_BITS.unpack(_FLOAT.pack(learning_rate))[0]) if self._averaging.uses_learning_rate else 0

    def coefficients(self, learning_rate: float) -> Coefficients | None:
        """Return the outer step of an average at this learning rate."""
        ratio = 1.0
        if self.learning_rate is not None:
            ratio = learning_rate / self.learning_rate if self.learning_rate else 0.0
        return self._averaging.outer.coefficients(ratio)

    def advance(self, steps: int, learning_rate: float) -> None:
        """Decide on the next period, after an average."""
        if self.learning_rate is not None and learning_rate < self.learning_rate:
            self.has_dropped = True
        self.learning_rate = learning_rate
        self.period = int(self._averaging.schedule.next_period(steps, self.has_dropped))

    def state_dict(self) -> dict[str, Any]:
        """Return what is saved."""
        return {"period": self.period, "learning_rate": self.learning_rate, "has_dropped": self.has_dropped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what was saved."""
        self.period, self.learning_rate = state["period"], state["learning_rate"]
        self.has_dropped = state["has_dropped"]
