"""One rank by itself: what it sends is what it receives."""

from __future__ import annotations

from collections.abc import Sequence

from . import Bytes


class AloneHandle:
    """What has arrived already."""

    def __init__(self, payload: Bytes) -> None:
        self._payload = payload

    def done(self) -> bool:
        """True."""
        return True

    def wait(self, timeout: float | None = None) -> Bytes:
        """Return what was sent."""
        return self._payload


class AloneCarrier:
    """The carrier of a world of size 1, for what asks nobody else and goes the same way all the same.

    >>> import numpy as np
    >>> AloneCarrier().allgather("name", np.ones(2, np.uint8)).wait()
    array([1, 1], dtype=uint8)
    """

    rank = 0
    size = 1

    def allgather(self, name: str, payload: Bytes) -> AloneHandle:
        """Return a copy of ``payload``, in time."""
        return AloneHandle(payload.copy())

    def alltoall(self, name: str, payload: Bytes, splits: Sequence[int]) -> AloneHandle:
        """Likewise."""
        return AloneHandle(payload.copy())
