"""Where the ranks tell each other what they are about to do, so that a rank on another path is an error and not a hang.

Collectives are matched by name: a rank that flushes while the others average, or that has laid out its tensors anew,
would wait for names that nobody else will ever send. So whatever an optimizer does together begins with one small
message, always under the same name.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence

import numpy as np

from ..errors import DesynchronizedError
from ..exchange.carriers import Carrier, Handle
from ..exchange.wire import format_by_rank

_FORMAT = struct.Struct("<QQQQ")


class Purpose(enum.IntEnum):
    """What a rank is about to do."""

    LAYOUT = 0
    AVERAGE = 1
    FLUSH = 2

    def describe(self, steps: int, rounds: int) -> str:
        """Say it, with the counters."""
        verb = {Purpose.LAYOUT: "laying out its tensors", Purpose.AVERAGE: "averaging", Purpose.FLUSH: "flushing"}[self]
        return f"{verb} after {steps} steps and {rounds} averages"


def out_of_step_error(name: str, intents: Sequence[tuple[Purpose, int, int]]) -> DesynchronizedError:
    """Return the error of ranks that are about to do different things: purpose, steps and rounds of each."""
    listing = format_by_rank((rank, purpose.describe(*counters)) for rank, (purpose, *counters) in enumerate(intents))
    return DesynchronizedError(
        f"{name}: the ranks are out of step: {listing}. Every rank has to take the same number of steps, with the same "
        "variables, and to call flush(), state_dict() in the middle of a period, load_state_dict() and "
        "add_param_group() alike; restart from a checkpoint"
    )


class Meeting:
    """The meeting point of one optimizer. ``carrier`` has more than one rank."""

    def __init__(self, carrier: Carrier, name: str) -> None:
        self._carrier = carrier
        self._name = f"{name}.meeting"
        self._intent = (Purpose.LAYOUT, 0, 0, 0)
        self._handle: Handle | None = None

    def announce(self, purpose: Purpose, steps: int, rounds: int, detail: int = 0) -> None:
        """Say what this rank is about to do, and 64 bits of detail that :meth:`agree` hands on; never waits."""
        self._intent = (purpose, steps, rounds, detail)
        if self._handle is None:
            self._launch()
        # Else an earlier announcement, of a flush that has timed out, is still under way: agree() corrects it.

    def _launch(self) -> None:
        self._handle = self._carrier.allgather(self._name, np.frombuffer(_FORMAT.pack(*self._intent), np.uint8))

    def agree(self, timeout: float | None = None) -> list[int]:
        """Wait for the other ranks' announcements; return the detail of each if everybody is about to do the same.

        Raises DesynchronizedError on every rank otherwise, unless all are averaging: their messages then tell the
        difference themselves, and no bucket stays in flight. Raises CollectiveTimeoutError after ``timeout`` seconds;
        the announcement stays under way.
        """
        for attempt in ("first", "second"):
            if self._handle is None:
                self._launch()
            assert self._handle is not None
            received = self._handle.wait(timeout).tobytes()
            self._handle = None
            announced = list(_FORMAT.iter_unpack(received))
            details = [detail for *_, detail in announced]
            intents = [(Purpose(purpose), steps, rounds) for purpose, steps, rounds, _ in announced]
            purposes = {purpose for purpose, _, _ in intents}
            counters = {(steps, rounds) for _, steps, rounds in intents}
            if purposes in ({Purpose.LAYOUT}, {Purpose.AVERAGE}):
                return details  # what else may differ is compared next
            if Purpose.LAYOUT not in purposes and len(counters) == 1:
                return details
            # In the first round somebody may have spoken of a flush that it has given up since; not in the second.
            if attempt == "second":
                raise out_of_step_error(self._name, intents)
        raise AssertionError("the second attempt returns or raises")
