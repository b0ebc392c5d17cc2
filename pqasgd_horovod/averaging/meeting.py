"""Where the ranks tell each other what they are about to do, so that a rank on another path is an error and not a hang.

Collectives are matched by name: a rank that flushes while the others average, or that has laid out its tensors anew,
would wait for names that nobody else will ever send. So whatever an optimizer does together begins with one small
message, always under the same name.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import CollectiveTimeoutError, DesynchronizedError
from ..exchange.carriers import Carrier, Handle
from ..exchange.wire import format_by_rank

_FORMAT = struct.Struct("<QQQQ")


class Purpose(enum.IntEnum):
    """What a rank is about to do."""

    LAYOUT = 0
    AVERAGE = 1
    FLUSH = 2
    LAST = 3
    """Its data has ended; what it has done since the last average is in the next."""
    JOINED = 4
    """Its data has ended, and nothing of it is left: it takes part in the others' averages."""

    def describe(self, steps: int, rounds: int) -> str:
        """Say it, with the counters."""
        return f"{_VERBS[self]} after {steps} steps and {rounds} averages"


_VERBS = {
    Purpose.LAYOUT: "laying out its tensors",
    Purpose.AVERAGE: "averaging",
    Purpose.FLUSH: "flushing",
    Purpose.LAST: "joining",
    Purpose.JOINED: "joined",
}


class Intent(NamedTuple):
    """What one rank says."""

    purpose: Purpose
    steps: int
    """Of a rank whose data has ended those that it has made itself."""
    rounds: int
    detail: int

    @property
    def has_ended(self) -> bool:
        """Whether it has no more data."""
        return self.purpose in (Purpose.LAST, Purpose.JOINED)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What the ranks have said, in their order; none for a rank that is alone."""

    intents: Sequence[Intent] = ()

    @property
    def lays_out(self) -> bool:
        """Whether tensors are laid out anew, by all ranks."""
        return any(intent.purpose is Purpose.LAYOUT for intent in self.intents)

    @property
    def has_ended(self) -> bool:
        """Whether no rank has more data."""
        return all(intent.has_ended for intent in self.intents)

    @property
    def steps(self) -> int:
        """The most steps that a rank has made: those of all that have more data."""
        return max(intent.steps for intent in self.intents)

    @property
    def last(self) -> int:
        """The rank with the most steps, of several the lowest."""
        return [intent.steps for intent in self.intents].index(self.steps)

    @property
    def num_counted(self) -> int:
        """Of how many ranks the mean is."""
        return sum(intent.purpose is not Purpose.JOINED for intent in self.intents)

    @property
    def scale(self) -> float:
        """What a mean over all ranks, in which those without data are zeros, is multiplied by to be that of the rest.

        >>> Agreement([Intent(Purpose.AVERAGE, 8, 0, 0), Intent(Purpose.JOINED, 5, 0, 0)]).scale
        2.0
        """
        return len(self.intents) / self.num_counted if self.num_counted else 1.0

    def is_absent(self, rank: int) -> bool:
        """Return whether a rank has nothing to give."""
        return self.intents[rank].purpose is Purpose.JOINED

    @property
    def details(self) -> list[int]:
        """The details of all ranks."""
        return [intent.detail for intent in self.intents]

    @property
    def details_of_training(self) -> list[int]:
        """Those of the ranks that have more data; if none has, that of the last one."""
        of_training = [intent.detail for intent in self.intents if not intent.has_ended]
        return of_training if of_training or not self.intents else [self.details[self.last]]


def out_of_step_error(name: str, intents: Sequence[tuple[Purpose, int, int]]) -> DesynchronizedError:
    """Return the error of ranks that are about to do different things: purpose, steps and rounds of each."""
    listing = format_by_rank((rank, purpose.describe(*counters)) for rank, (purpose, *counters) in enumerate(intents))
    return DesynchronizedError(
        f"{name}: the ranks are out of step: {listing}. Every rank has to take the same number of steps, with the same "
        "variables, and to call flush(), state_dict() in the middle of a period, load_state_dict() and "
        "add_param_group() alike, and not to call them while others are in join(), which ends the epochs of ranks with "
        "different numbers of batches; restart from a checkpoint"
    )


class Meeting:
    """The meeting point of one optimizer. ``carrier`` has more than one rank."""

    def __init__(self, carrier: Carrier, name: str) -> None:
        self._carrier = carrier
        self._name = f"{name}.meeting"
        self._intent = Intent(Purpose.LAYOUT, 0, 0, 0)
        self._handle: Handle | None = None

    def announce(self, purpose: Purpose, steps: int, rounds: int, detail: int = 0) -> None:
        """Say what this rank is about to do, and 64 bits of detail that :meth:`agree` hands on; never waits."""
        self._intent = Intent(purpose, steps, rounds, detail)
        if self._handle is None:
            self._launch()
        # Else an earlier announcement, of a flush that has timed out, is still under way: agree() corrects it.

    def _launch(self) -> None:
        self._handle = self._carrier.allgather(self._name, np.frombuffer(_FORMAT.pack(*self._intent), np.uint8))

    def agree(self, timeout: float | None = None) -> Agreement:
        """Wait for the other ranks' announcements; return them if they go together.

        All do the same, or some train and lay out or average, and the others have no more data. Raises
        DesynchronizedError on every rank otherwise, unless all are averaging: their messages then tell the difference
        themselves, and no bucket stays in flight. Raises CollectiveTimeoutError after ``timeout`` seconds; the
        announcement stays under way.
        """
        for attempt in ("first", "second"):
            if self._handle is None:
                self._launch()
            assert self._handle is not None
            try:
                received = self._handle.wait(timeout).tobytes()
            except Exception as error:
                if not isinstance(error, CollectiveTimeoutError):
                    self._handle = None  # it has ended; a later meeting is another one
                raise
            self._handle = None
            intents = [Intent(Purpose(purpose), *rest) for purpose, *rest in _FORMAT.iter_unpack(received)]
            if _go_together(intents):
                return Agreement(intents)
            # In the first round somebody may have spoken of a flush that it has given up since; not in the second.
            if attempt == "second":
                raise out_of_step_error(self._name, [intent[:3] for intent in intents])
        raise AssertionError("the second attempt returns or raises")


def _go_together(intents: Sequence[Intent]) -> bool:
    purposes = {intent.purpose for intent in intents if not intent.has_ended}
    if purposes in (set(), {Purpose.LAYOUT}, {Purpose.AVERAGE}):
        return True  # what else may differ is compared next
    counters = {(intent.steps, intent.rounds) for intent in intents}
    return Purpose.LAYOUT not in purposes and len(counters) == 1 and not any(i.has_ended for i in intents)
