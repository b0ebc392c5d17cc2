"""When to average: how many local steps come before the next average.

A schedule is asked right after each average, and once at the beginning. Its answer depends on counters and on numbers
that the ranks have agreed on, so that all ranks give the same. It is written in operators that plain integers and a
framework's tensors share, so that a graph can ask too.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ..codecs.base import check_integer, is_number
from ..errors import ArgumentError

_LARGEST = 2**31


class Observed(NamedTuple):
    """What a schedule knows after an average; plain numbers, or a framework's tensors."""

    steps: Any
    """Steps made so far."""
    has_dropped: Any
    """Whether the learning rate has ever been below an earlier one."""
    learning_rate: Any
    drift: Any
    r"""Squared distance of the replicas from their mean, :math:`\frac1n \sum_i \|x_i - \bar x\|^2`, at the average
    before this one; negative at the first."""
    period: Any
    """The period that has just ended."""
    memory: tuple[Any, Any]
    """Two numbers of the schedule's own."""


@dataclasses.dataclass(frozen=True)
class Schedule(abc.ABC):
    """The base of schedules."""

    id: ClassVar[str]
    uses_drift: ClassVar[bool] = False
    """True if the distance of the replicas from each other enters, which the ranks then tell each other."""

    @property
    def uses_learning_rate(self) -> bool:
        """True if the inner learning rate enters, which the ranks then agree on."""
        return False

    @property
    @abc.abstractmethod
    def shortest_period(self) -> int:
        """The fewest steps between two averages that :meth:`advance` ever says."""

    @abc.abstractmethod
    def next_period(self, steps: Any, has_dropped: Any, xp: Any = np) -> Any:
        """Return the number of steps to the next average.

        Args:
            steps: steps made so far.
            has_dropped: whether the learning rate has ever been below an earlier one.
            xp: the module that has ``where`` and ``minimum`` for them, NumPy or a framework.
        """

    def advance(self, seen: Observed, xp: Any = np) -> tuple[Any, tuple[Any, Any]]:
        """Return :meth:`next_period`, and what the schedule remembers, after an average."""
        return self.next_period(seen.steps, seen.has_dropped, xp), seen.memory

    def config(self) -> dict[str, Any]:
        """Return the configuration as a dict that JSON can hold."""
        return {"id": self.id, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class FixedPeriod(Schedule):
    """Average every ``period`` steps, at least 1: ``period=8`` is short for ``FixedPeriod(8)``.

    >>> FixedPeriod(8).next_period(steps=80, has_dropped=False)
    8
    """

    id = "fixed"

    period: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "period", check_integer("period", self.period, 1, _LARGEST))

    @property
    def shortest_period(self) -> int:
        """``period``."""
        return self.period

    def next_period(self, steps: Any, has_dropped: Any, xp: Any = np) -> Any:
        """Always the same."""
        return self.period


@dataclasses.dataclass(frozen=True)
class PostLocal(Schedule):
    """Average after every step at first, then every ``period`` steps: post-local SGD.

    Args:
        period: steps between averages later on, at least 1.
        first_steps: how many steps are averaged one by one; None: until the learning rate first drops.

    Raises ArgumentError for other values.

    Source: Lin, Stich, Patel, Jaggi, "Don't use large mini-batches, use local SGD", ICLR 2020, section 4.

    >>> schedule = PostLocal(period=8, first_steps=100)
    >>> [int(schedule.next_period(steps, has_dropped=False)) for steps in (0, 99, 100)]
    [1, 1, 8]
    """

    id = "post_local"

    period: int = 8
    first_steps: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "period", check_integer("period", self.period, 1, _LARGEST))
        if self.first_steps is not None:
            object.__setattr__(self, "first_steps", check_integer("first_steps", self.first_steps, 0, _LARGEST))

    @property
    def uses_learning_rate(self) -> bool:
        """True if the learning rate says when."""
        return self.first_steps is None

    @property
    def shortest_period(self) -> int:
        """1, unless there are no first steps."""
        return self.period if self.first_steps == 0 else 1

    def next_period(self, steps: Any, has_dropped: Any, xp: Any = np) -> Any:
        """1, then ``period``."""
        return xp.where(has_dropped if self.first_steps is None else steps >= self.first_steps, self.period, 1)


@dataclasses.dataclass(frozen=True)
class GrowingPeriod(Schedule):
    """Average often at first and seldom later: the period doubles every ``every`` steps, from ``first`` to ``last``.

    Raises ArgumentError unless ``first``, ``last`` and ``every`` are at least 1, and ``last`` is not below ``first``.

    >>> schedule = GrowingPeriod(first=1, last=16, every=100)
    >>> [int(schedule.next_period(steps, has_dropped=False)) for steps in (0, 100, 299, 400, 10_000)]
    [1, 2, 4, 16, 16]
    """

    id = "growing"

    first: int = 1
    last: int = 16
    every: int = 100

    def __post_init__(self) -> None:
        for name in ("first", "last", "every"):
            object.__setattr__(self, name, check_integer(name, getattr(self, name), 1, _LARGEST))
        if self.last < self.first:
            raise ArgumentError(f"last is {self.last}; it must be at least first, {self.first}")

    @property
    def shortest_period(self) -> int:
        """``first``."""
        return self.first

    def next_period(self, steps: Any, has_dropped: Any, xp: Any = np) -> Any:
        """Double as often as it is time to."""
        return xp.minimum(self.first * 2 ** xp.minimum(steps // self.every, 31), self.last)


@dataclasses.dataclass(frozen=True)
class AdaptivePeriod(Schedule):
    r"""Average as often as the replicas drift apart: often while the learning rate is large, seldom when it is small.

    With the variance of the replicas :math:`S = \frac1n \sum_i \|x_i - \bar x\|^2` at an average and the learning
    rate :math:`\gamma`, the mean of :math:`S/\gamma` over the averages of the first ``calibration_steps`` steps is C.
    Later the period grows by 1 where :math:`S/\gamma < low \cdot C`, and shrinks by 1 where it is above
    :math:`high \cdot C`. One number of each rank travels with the next average, so that the period follows one average
    late.

    Args:
        first: the period at first, at least 1.
        last: the longest period, at least ``first``.
        calibration_steps: how long C is measured, at least 1. As the drift at a short period is small, a short
            calibration with a small ``first`` keeps periods short.
        low: 0 to 1.
        high: at least 1.

    Raises ArgumentError for other values.

    Source: Jiang and Agrawal, "Adaptive periodic averaging: a practical approach to reducing communication in
    distributed learning", 2020.

    >>> schedule = AdaptivePeriod(first=4, calibration_steps=10)
    >>> seen = Observed(steps=20, has_dropped=False, learning_rate=0.1, drift=0.01, period=4, memory=(2.0, 10.0))
    >>> int(schedule.advance(seen)[0])  # S/gamma is 0.1, half of C
    5
    """

    id = "adaptive"
    uses_drift = True

    first: int = 4
    last: int = 64
    calibration_steps: int = 100
    low: float = 0.7
    high: float = 1.3

    def __post_init__(self) -> None:
        for name in ("first", "last", "calibration_steps"):
            object.__setattr__(self, name, check_integer(name, getattr(self, name), 1, _LARGEST))
        if self.last < self.first:
            raise ArgumentError(f"last is {self.last}; it must be at least first, {self.first}")
        if not is_number(self.low) or not is_number(self.high) or not 0 <= self.low <= 1 <= self.high < float("inf"):
            raise ArgumentError(
                f"low is {self.low!r} and high is {self.high!r}; low must be a number from 0 to 1, high at least 1"
            )
        for name in ("low", "high"):
            object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def uses_learning_rate(self) -> bool:
        """True."""
        return True

    @property
    def shortest_period(self) -> int:
        """1: it shrinks as far as the drift says."""
        return 1

    def next_period(self, steps: Any, has_dropped: Any, xp: Any = np) -> Any:
        """The first one."""
        return self.first

    def advance(self, seen: Observed, xp: Any = np) -> tuple[Any, tuple[Any, Any]]:
        """Calibrate, or compare."""
        total, count = seen.memory
        known = (seen.drift >= 0) & (seen.drift < np.inf) & (seen.learning_rate > 0)
        ratio = seen.drift / xp.where(seen.learning_rate > 0, seen.learning_rate, 1.0)
        calibrating = known & ((seen.steps <= self.calibration_steps) | (count < 1))
        compares = known & (seen.steps > self.calibration_steps) & (count >= 1)
        total = xp.where(calibrating, total + ratio, total)
        count = xp.where(calibrating, count + 1, count)
        usual = total / xp.where(count > 0, count, 1.0)
        longer = compares & (ratio < self.low * usual) & (seen.period < self.last)
        shorter = compares & (ratio > self.high * usual) & (seen.period > 1)
        period = xp.where(longer, seen.period + 1, xp.where(shorter, seen.period - 1, seen.period))
        return period, (total, count)


SCHEDULES: Mapping[str, type[Schedule]] = {
    cls.id: cls for cls in (FixedPeriod, PostLocal, GrowingPeriod, AdaptivePeriod)
}
"""Schedules by id."""


def schedule_from_config(config: Mapping[str, Any]) -> Schedule:
    """Return the schedule that a ``config()`` describes.

    >>> schedule_from_config(PostLocal(period=4).config())
    PostLocal(period=4, first_steps=None)
    """
    arguments = dict(config)
    cls = SCHEDULES.get(arguments.pop("id", None))
    if cls is None:
        raise ArgumentError(f"period is {config!r}; its id must be one of {', '.join(SCHEDULES)}")
    return cls(**arguments)
