"""Raw MPI through mpi4py: NumPy in, NumPy out, nothing between.

MPI's own collectives have to be launched in one order on all ranks, which a pipelined exchange does not promise; so
each collective is non-blocking point-to-point messages under a tag made of its name. Sizes are not agreed on
beforehand: the receiver learns them from the envelope (matched probes), so that a rank with another size is seen and
not truncated.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...errors import ArgumentError, CollectiveTimeoutError
from . import Bytes, wait_until

# At run time mpi4py.MPI is imported where it is used, after the caller has done so: to import it is to initialise MPI,
# and Open MPI may end a process that no launcher has started.
if TYPE_CHECKING:
    from mpi4py import MPI


# MPI moves data only inside its calls, a few fragments in each: with one call per pause a transfer would crawl.
_POLLS = 32


class _MpiHandle:
    """Receives from every other rank; done when all has arrived and all has been sent."""

    def __init__(self, comm: MPI.Intracomm, name: str, tag: int, own: Bytes, sends: list[MPI.Request]) -> None:
        self._comm = comm
        self._name = name
        self._tag = tag
        self._own = own
        self._requests = sends
        self._messages: dict[int, tuple[MPI.Message, int]] = {}
        self._result: Bytes | None = None
        self._done = False

    def _missing(self) -> list[int]:
        return [rank for rank in range(self._comm.size) if rank != self._comm.rank and rank not in self._messages]

    def _receive_all(self) -> None:
        """All envelopes are here: receive every message where it belongs in the result."""
        from mpi4py import MPI

        sizes = [
            self._messages[rank][1] if rank != self._comm.rank else self._own.size for rank in range(self._comm.size)
        ]
        stops = np.cumsum(sizes).tolist()
        self._result = np.empty(stops[-1], np.uint8)
        for rank, (size, stop) in enumerate(zip(sizes, stops, strict=True)):
            piece = self._result[stop - size : stop]
            if rank == self._comm.rank:
                piece[:] = self._own
            else:
                self._requests.append(self._messages[rank][0].Irecv([piece, MPI.BYTE]))

    def done(self) -> bool:
        """Return whether everything has arrived and has been sent; makes progress, never blocks."""
        from mpi4py import MPI

        if self._done:
            return True
        status = MPI.Status()
        for rank in self._missing():
            message = self._comm.Improbe(rank, self._tag, status)
            if message is not None:
                self._messages[rank] = (message, status.Get_count(MPI.BYTE))
        if self._result is None and not self._missing():
            self._receive_all()
        if self._result is not None:
            self._done = any(MPI.Request.Testall(self._requests) for _ in range(_POLLS))
        return self._done

    def wait(self, timeout: float | None = None) -> Bytes:
        """Return what was received from all ranks; raise CollectiveTimeoutError after ``timeout`` seconds."""
        if not wait_until(self.done, timeout):
            raise CollectiveTimeoutError(
                f"collective {self._name!r}: after {timeout} s nothing has come from ranks {self._missing()}"
            )
        assert self._result is not None
        return self._result


class MpiCarrier:
    """Byte collectives over an mpi4py communicator, which is duplicated so that no message is mistaken for another's.

    To construct it is collective: every rank of ``comm`` does so at the same time.

    >>> import os
    >>> if "OMPI_COMM_WORLD_SIZE" in os.environ:  # under mpirun
    ...     from mpi4py import MPI
    ...
    ...     carrier = MpiCarrier(MPI.COMM_WORLD)
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        from mpi4py import MPI

        self._comm = comm.Dup()
        self._num_tags = int(self._comm.Get_attr(MPI.TAG_UB) or 32767) + 1
        self._names: dict[int, str] = {}
        self._in_flight: dict[str, _MpiHandle] = {}

    @property
    def rank(self) -> int:
        """Number of this process in the communicator."""
        return self._comm.rank

    @property
    def size(self) -> int:
        """Number of processes in the communicator."""
        return self._comm.size

    def allgather(self, name: str, payload: Bytes) -> _MpiHandle:
        """Start to send ``payload`` to every rank."""
        return self._launch(name, "allgather", payload, [(0, payload.size)] * self.size)

    def alltoall(self, name: str, payload: Bytes, splits: Sequence[int]) -> _MpiHandle:
        """Start to send consecutive pieces of ``payload``, ``splits[r]`` bytes to rank r."""
        if len(splits) != self.size or min(splits) < 0 or sum(splits) != payload.size:
            raise ArgumentError(
                f"alltoall {name!r}: splits has to be {self.size} sizes >= 0 that sum to {payload.size}, the bytes of "
                f"payload, got {list(splits)}"
            )
        stops = np.cumsum(splits).tolist()
        return self._launch(
            name, "alltoall", payload, [(stop - size, stop) for stop, size in zip(stops, splits, strict=True)]
        )

    def _launch(self, name: str, kind: str, payload: Bytes, pieces: list[tuple[int, int]]) -> _MpiHandle:
        from mpi4py import MPI

        if payload.dtype != np.uint8 or payload.ndim != 1 or not payload.flags.c_contiguous:
            raise ArgumentError(
                f"collective {name!r}: payload has to be a flat contiguous uint8 array, "
                f"got {payload.ndim}-D {payload.dtype}"
            )
        earlier = self._in_flight.get(name)
        if earlier is not None and not earlier.done():
            raise ArgumentError(
                f"collective {name!r} is in flight on rank {self.rank}: wait for it before it is launched again"
            )
        tag = self._tag(f"{kind} {name}")
        sends = [
            self._comm.Isend([payload[start:stop], MPI.BYTE], rank, tag)
            for rank, (start, stop) in enumerate(pieces)
            if rank != self.rank
        ]
        own_start, own_stop = pieces[self.rank]
        handle = self._in_flight[name] = _MpiHandle(self._comm, name, tag, payload[own_start:own_stop], sends)
        return handle

    def _tag(self, name: str) -> int:
        """Return the same tag on every rank without a word between them; two names of one tag are refused."""
        tag = zlib.crc32(name.encode()) % self._num_tags
        if self._names.setdefault(tag, name) != name:
            raise ArgumentError(
                f"collective names {self._names[tag]!r} and {name!r} have the same MPI tag {tag}: rename one"
            )
        return tag
