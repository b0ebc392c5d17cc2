"""A carrier whose messages come late, each after a time of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from pqasgd_horovod.errors import CollectiveTimeoutError
from pqasgd_horovod.exchange.carriers import Bytes, Handle, wait_until
from pqasgd_horovod.exchange.carriers.threads import ThreadCarrier


class _LateHandle:
    def __init__(self, handle: Handle, arrived: Callable[[], bool]) -> None:
        self._handle = handle
        self._arrived = arrived

    def done(self) -> bool:
        return self._arrived() and self._handle.done()

    def wait(self, timeout: float | None = None) -> Bytes:
        if not wait_until(self.done, timeout):
            raise CollectiveTimeoutError(f"nothing came within {timeout} s")
        return self._handle.wait()


class LateCarrier:
    """``carrier``, but a message has not arrived before ``arrived(name, time since it was launched)`` says so."""

    def __init__(self, carrier: ThreadCarrier, arrived: Callable[[str, float], bool]) -> None:
        self.rank, self.size = carrier.rank, carrier.size
        self._carrier = carrier
        self._arrived = arrived

    def _late(self, name: str, handle: Handle) -> Any:
        launched = time.monotonic()
        return _LateHandle(handle, lambda: self._arrived(name, time.monotonic() - launched))

    def allgather(self, name: str, payload: Bytes) -> Any:
        return self._late(name, self._carrier.allgather(name, payload))

    def alltoall(self, name: str, payload: Bytes, splits: Sequence[int]) -> Any:
        return self._late(name, self._carrier.alltoall(name, payload, splits))
