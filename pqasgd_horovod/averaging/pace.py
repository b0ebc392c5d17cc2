"""How far it is to the next average, and what the learning rate has done: the state of schedule and outer step."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import DesynchronizedError
from ..exchange.wire import format_by_rank
from .outer import Coefficients
from .schedule import Observed
from .strategy import PeriodicAveraging

# What a rank says in a meeting: its learning rate, and how far it was from the mean; 0 where they do not matter.
_FLOATS, _BITS = struct.Struct("<ff"), struct.Struct("<Q")


def rounded(number: float) -> float:
    """Return the nearest float32: what the ranks tell each other is what all of them calculate with."""
    with np.errstate(over="ignore"):
        return float(np.float32(number))


def unpack_details(details: Sequence[int]) -> tuple[list[float], list[float]]:
    """Return the learning rates and the squared distances that the ranks have sent, as float32."""
    pairs = [_FLOATS.unpack(_BITS.pack(detail)) for detail in details]
    return [rate for rate, _ in pairs], [distance for _, distance in pairs]


def check_learning_rates(details: Sequence[int]) -> None:
    """Raise DesynchronizedError unless all ranks have sent the same learning rate."""
    rates, _ = unpack_details(details)
    if len(set(rates)) > 1:
        shown = format_by_rank((rank, str(np.float32(rate))) for rank, rate in enumerate(rates))
        raise DesynchronizedError(
            f"the learning rate is {shown}; the schedule or the outer optimizer depends on it, so it has to be the "
            "same on every rank"
        )


class Pace:
    """The state of a schedule, alike on all ranks, and how far this replica was from the mean."""

    def __init__(self, averaging: PeriodicAveraging) -> None:
        self._averaging = averaging
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.period = int(self._averaging.schedule.next_period(0, False))
        self.learning_rate: float | None = None  # at the last average
        self.has_dropped = False
        self.distance = -1.0  # squared, at the last average; this rank's
        self.memory = (0.0, 0.0)

    @property
    def uses_drift(self) -> bool:
        """Whether the distance from the mean matters."""
        return self._averaging.schedule.uses_drift

    def detail(self, learning_rate: float) -> int:
        """Return what ranks tell each other in a meeting; ``learning_rate`` is :func:`rounded`."""
        rate = learning_rate if self._averaging.uses_learning_rate else 0.0
        return int(_BITS.unpack(_FLOATS.pack(rate, rounded(self.distance) if self.uses_drift else 0.0))[0])

    def coefficients(self, learning_rate: float) -> Coefficients | None:
        """Return the outer step of an average at this learning rate."""
        ratio = 1.0
        if self.learning_rate is not None:
            ratio = learning_rate / self.learning_rate if self.learning_rate else 0.0
        return self._averaging.outer.coefficients(ratio)

    def advance(self, steps: int, learning_rate: float, details: Sequence[int]) -> None:
        """Decide on the next period, after an average in which the ranks have said ``details``."""
        if self.learning_rate is not None and learning_rate < self.learning_rate:
            self.has_dropped = True
        self.learning_rate = learning_rate
        distances = np.array(unpack_details(details)[1], np.float32)
        known = distances[~(distances < 0)]  # not at first, and not on a rank that was absent
        drift = float(known.mean(dtype=np.float64)) if self.uses_drift and len(known) else -1.0
        seen = Observed(steps, self.has_dropped, learning_rate, drift, self.period, self.memory)
        period, (first, second) = self._averaging.schedule.advance(seen)
        self.period, self.memory = int(period), (float(first), float(second))

    def common_state(self) -> dict[str, Any]:
        """Return what all ranks have alike."""
        return {
            "period": self.period,
            "learning_rate": self.learning_rate,
            "has_dropped": self.has_dropped,
            "memory": list(self.memory),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what is saved."""
        return {**self.common_state(), "distance": self.distance}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what was saved."""
        self.period, self.learning_rate = state["period"], state["learning_rate"]
        self.has_dropped = state["has_dropped"]
        self.memory = (state["memory"][0], state["memory"][1])
        self.distance = state["distance"]
