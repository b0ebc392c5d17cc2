"""Many ranks in one process: collectives among threads, for tests and examples that need no launcher.

It behaves as Horovod does where that matters: matched by name in any order, a name in flight twice is refused,
different operations under one name are an error on every rank. Where Horovod would stall it raises, and says which
ranks are missing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...errors import ArgumentError, CollectiveTimeoutError, MismatchError
from . import Bytes


class _Part(NamedTuple):
    kind: str
    payload: Bytes
    splits: tuple[int, ...]


class _Collective:
    """One named operation: what each rank gave, then what each rank gets."""

    def __init__(self) -> None:
        self.parts: dict[int, _Part] = {}
        self.results: list[Bytes] = []
        self.error: str | None = None
        self.complete = False

    def run(self, name: str, size: int) -> None:
        """Copy the parts into results, so that the senders' buffers are free from here on."""
        parts = [self.parts[rank] for rank in range(size)]
        kinds = [part.kind for part in parts]
        if len(set(kinds)) > 1:
            listing = ", ".join(f"{kind} on rank {rank}" for rank, kind in enumerate(kinds))
            self.error = f"collective {name!r} is not the same operation on every rank: {listing}"
        elif kinds[0] == "allgather":
            gathered = np.concatenate([part.payload for part in parts])
            gathered.flags.writeable = False  # shared by all ranks
            self.results = [gathered] * size
        else:
            starts = [np.concatenate([[0], np.cumsum(part.splits)]).tolist() for part in parts]
            self.results = [
                np.concatenate(
                    [part.payload[start[rank] : start[rank + 1]] for part, start in zip(parts, starts, strict=True)]
                )
                for rank in range(size)
            ]
        self.parts = {}
        self.complete = True


class _World:
    """The shared state of all ranks."""

    def __init__(self, size: int, timeout: float) -> None:
        self.size = size
        self.deadline = time.monotonic() + timeout
        self.condition = threading.Condition()
        self.pending: dict[tuple[str, int], _Collective] = {}
        self.departed: set[int] = set()
        self.failures: list[BaseException] = []
        self.parts: dict[tuple[int, ...], _World] = {}

    def part(self, ranks: tuple[int, ...]) -> _World:
        """Return the world of some ranks of this one."""
        with self.condition:
            if ranks not in self.parts:
                self.parts[ranks] = _World(len(ranks), self.deadline - time.monotonic())
            return self.parts[ranks]

    def enter(self, name: str, sequence: int, rank: int, part: _Part) -> _Collective:
        with self.condition:
            collective = self.pending.setdefault((name, sequence), _Collective())
            collective.parts[rank] = part
            if len(collective.parts) == self.size:
                collective.run(name, self.size)
                del self.pending[name, sequence]
                self.condition.notify_all()
        return collective

    def depart(self, rank: int, failure: BaseException | None) -> None:
        with self.condition:
            self.departed.add(rank)
            if failure is not None:
                self.failures.append(failure)
            self.condition.notify_all()
            parts = list(self.parts.items())
        for ranks, world in parts:
            if rank in ranks:
                world.depart(ranks.index(rank), None)

    def missing(self, collective: _Collective) -> list[int]:
        return [rank for rank in range(self.size) if rank not in collective.parts]


class _ThreadHandle:
    def __init__(self, world: _World, rank: int, name: str, collective: _Collective) -> None:
        self._world = world
        self._rank = rank
        self._name = name
        self._collective = collective

    def _settled(self) -> bool:
        if self._collective.complete or time.monotonic() >= self._world.deadline:
            return True
        return not self._world.departed.isdisjoint(self._world.missing(self._collective))

    def done(self) -> bool:
        """Return whether :meth:`wait` would return or raise at once."""
        with self._world.condition:
            return self._settled()

    def wait(self, timeout: float | None = None) -> Bytes:
        """Return what was received from all ranks; raise if some have ended or do not come in time."""
        world = self._world
        remaining = max(0.0, world.deadline - time.monotonic())
        limit = remaining if timeout is None else min(timeout, remaining)
        with world.condition:
            world.condition.wait_for(self._settled, limit)
            if not self._collective.complete:
                missing = world.missing(self._collective)
                ended = sorted(world.departed.intersection(missing))
                reason = f"ranks {ended} have ended" if ended else f"ranks {missing} did not take part in time"
                raise CollectiveTimeoutError(f"collective {self._name!r}: {reason}")
            if self._collective.error is not None:
                raise MismatchError(self._collective.error)
            return self._collective.results[self._rank]


class ThreadCarrier:
    """One rank of a world made by :func:`run_ranks`."""

    def __init__(self, world: _World, rank: int) -> None:
        self._world = world
        self._rank = rank
        self._launched: dict[str, int] = {}
        self._in_flight: dict[str, _ThreadHandle] = {}

    @property
    def rank(self) -> int:
        """Number of this rank."""
        return self._rank

    @property
    def size(self) -> int:
        """Number of ranks in this world."""
        return self._world.size

    def among(self, ranks: Sequence[int]) -> ThreadCarrier:
        """Return the carrier of some ranks, this one among them."""
        return ThreadCarrier(self._world.part(tuple(ranks)), list(ranks).index(self._rank))

    def allgather(self, name: str, payload: Bytes) -> _ThreadHandle:
        """Start to send ``payload`` to every rank."""
        return self._launch(name, _Part("allgather", _checked(name, payload), ()))

    def alltoall(self, name: str, payload: Bytes, splits: Sequence[int]) -> _ThreadHandle:
        """Start to send consecutive pieces of ``payload``, ``splits[r]`` bytes to rank r."""
        if len(splits) != self.size or min(splits) < 0 or sum(splits) != payload.size:
            raise ArgumentError(
                f"alltoall {name!r}: splits has to be {self.size} sizes >= 0 that sum to {payload.size}, the bytes of "
                f"payload, got {list(splits)}"
            )
        return self._launch(name, _Part("alltoall", _checked(name, payload), tuple(splits)))

    def _launch(self, name: str, part: _Part) -> _ThreadHandle:
        earlier = self._in_flight.get(name)
        if earlier is not None and not earlier.done():
            raise ArgumentError(
                f"collective {name!r} is in flight on rank {self._rank}: wait for it before it is launched again"
            )
        sequence = self._launched[name] = self._launched.get(name, 0) + 1
        collective = self._world.enter(name, sequence, self._rank, part)
        handle = self._in_flight[name] = _ThreadHandle(self._world, self._rank, name, collective)
        return handle


def _checked(name: str, payload: Bytes) -> Bytes:
    if payload.dtype != np.uint8 or payload.ndim != 1:
        raise ArgumentError(
            f"collective {name!r}: payload has to be a flat uint8 array, got {payload.ndim}-D {payload.dtype}"
        )
    return payload


def run_ranks(
    size: int, function: Callable[[ThreadCarrier], Any], *, timeout: float = 60.0, return_exceptions: bool = False
) -> list[Any]:
    """Run ``function(carrier)`` as ``size`` ranks, each in a thread; return what they returned, in rank order.

    Nothing outlives ``timeout`` seconds: whoever still waits then gets
    :class:`~pqasgd_horovod.errors.CollectiveTimeoutError`, and so does, at once, whoever waits for a rank that has
    ended. The error that came first is raised; ``return_exceptions=True`` returns the errors in place of results
    instead.

    >>> import numpy as np
    >>> def program(carrier):
    ...     payload = np.array([carrier.rank, 7], np.uint8)
    ...     return carrier.allgather("example", payload).wait().tolist()
    >>> run_ranks(2, program)
    [[0, 7, 1, 7], [0, 7, 1, 7]]
    """
    if size < 1:
        raise ArgumentError(f"size has to be at least 1, got {size}")
    world = _World(size, timeout)
    outcomes: list[Any] = [None] * size

    def body(rank: int) -> None:
        failure: BaseException | None = None
        try:
            outcomes[rank] = function(ThreadCarrier(world, rank))
        except BaseException as error:  # whatever it is, it is handed to the caller
            failure = outcomes[rank] = error
        finally:
            world.depart(rank, failure)

    threads = [threading.Thread(target=body, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, world.deadline - time.monotonic()) + 1.0)
    stuck = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    if stuck:
        raise CollectiveTimeoutError(f"ranks {stuck} were still running after {timeout} s")
    if world.failures and not return_exceptions:
        raise world.failures[0]
    return outcomes
