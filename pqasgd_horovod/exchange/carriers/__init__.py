"""What an exchange needs of the world: two collectives of bytes, by name, that do not block.

A carrier moves bytes and knows nothing of codecs. Three are at hand: Horovod's own (in each front end), raw MPI
(:mod:`.mpi`) and threads of one process (:mod:`.threads`, for tests and examples of many ranks). What all of them
promise:

- A collective is matched **by name**, so ranks may launch theirs in different orders; a name is in flight at most once.
- Launching never blocks, and the payload is not copied: it stays untouched until the collective is done.
- The result is a flat uint8 array, what the ranks sent in rank order; sizes may differ from rank to rank, 0 included.
- Waiting ends, with the bytes or with an error.

A :class:`DeviceCarrier` carries memory of GPUs, too, from one to the other; :mod:`..placement` says when.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar, Union

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ...native.cuda import DeviceBytes

Bytes = NDArray[np.uint8]
Messages = Union[Bytes, "DeviceBytes"]
Memory = TypeVar("Memory", bound=Messages)
Received = TypeVar("Received", covariant=True)

_EAGER_POLLS = 20
_LONGEST_PAUSE_SECONDS = 1e-4
_LONGEST_PATIENT_PAUSE_SECONDS = 1e-3
_thread = threading.local()


class Handle(Protocol[Received]):
    """A collective in flight."""

    def done(self) -> bool:
        """Return whether :meth:`wait` would return, or raise, at once; makes progress, never blocks."""
        ...

    def wait(self, timeout: float | None = None) -> Received:
        """Return what was received; raise CollectiveTimeoutError after ``timeout`` seconds.

        A collective that timed out is still in flight: it can be waited for again.
        """
        ...


class Carrier(Protocol):
    """Byte collectives among ``size`` ranks, of which this is number ``rank``."""

    @property
    def rank(self) -> int:
        """Number of this rank, from 0."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    def allgather(self, name: str, payload: Bytes) -> Handle[Bytes]:
        """Send ``payload`` to every rank; everybody receives all payloads, their own included, in rank order."""
        ...

    def alltoall(self, name: str, payload: Bytes, splits: Sequence[int]) -> Handle[Bytes]:
        """Send the r-th of ``size`` consecutive pieces of ``payload``, ``splits[r]`` bytes long, to rank r."""
        ...


class DeviceCarrier(Carrier, Protocol):
    """A carrier of memory of GPUs, too, of all ranks in a collective or of none; what is received is there as well."""

    def allgather(self, name: str, payload: Memory) -> Handle[Memory]:
        """Send ``payload`` to every rank."""
        ...

    def alltoall(self, name: str, payload: Memory, splits: Sequence[int]) -> Handle[Memory]:
        """Send the r-th of ``size`` consecutive pieces of ``payload`` to rank r."""
        ...


@contextlib.contextmanager
def patiently() -> Iterator[None]:
    """Let this thread wait with longer pauses: one that works beside the training thread, from which each poll takes.

    >>> with patiently():
    ...     wait_until(lambda: True, timeout=0)
    True
    """
    _thread.longest_pause = _LONGEST_PATIENT_PAUSE_SECONDS
    try:
        yield
    finally:
        del _thread.longest_pause


def wait_until(condition: Callable[[], bool], timeout: float | None) -> bool:
    """Poll ``condition`` until it holds (True) or ``timeout`` seconds have passed (False); None waits without end.

    The pauses grow to 0.1 ms: short beside a transfer, long enough to leave the processor to whoever does the transfer;
    within :func:`patiently` to 1 ms.

    >>> wait_until(lambda: True, timeout=0), wait_until(lambda: False, timeout=0)
    (True, False)
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    longest = getattr(_thread, "longest_pause", _LONGEST_PAUSE_SECONDS)
    polls = 0
    while not condition():
        if deadline is not None and time.monotonic() >= deadline:
            return False
        polls += 1
        if polls <= _EAGER_POLLS and hasattr(os, "sched_yield"):
            os.sched_yield()
        else:
            time.sleep(longest * min(polls / 100, 1.0))
    return True
