"""Running statistics of the rank that has seen the most batches, for data that is spread unevenly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from ..errors import NonFiniteError, WireFormatError
from ..exchange.carriers import Bytes, Carrier
from .statistics import CommunicationStatistics


class CountedStatistics(Protocol):
    """The running statistics of one layer, and how many batches they have seen."""

    name: str
    description: str
    """Types and shapes, to be compared between ranks."""
    nbytes: int

    def count(self) -> int:
        """Return the number of batches."""
        ...

    def pack(self) -> bytes:
        """Return the statistics, ``nbytes`` long."""
        ...

    def is_finite(self, packed: Bytes) -> bool:
        """Return whether there is no NaN or Inf in what :meth:`pack` gave on some rank."""
        ...

    def adopt(self, count: int, packed: Bytes) -> None:
        """Take over the count and what :meth:`pack` gave on some rank."""
        ...


def gather_most_counted(
    carrier: Carrier,
    layers: Sequence[CountedStatistics],
    name: str,
    statistics: CommunicationStatistics,
    *,
    refuse_nonfinite: bool,
) -> Callable[[], None]:
    """Return what gives each layer the statistics of the rank with the largest count, the lowest of them; collective.

    The counts of all ranks travel, and of each layer the statistics once. All ranks had the same count after the last
    average, so the largest one has seen the most batches since. Raises NonFiniteError on every rank if such a rank's
    statistics are not finite and that is refused.
    """

    def gather(what: str, payload: bytes) -> Bytes:
        received = carrier.allgather(f"{name}.{what}", np.frombuffer(payload, np.uint8)).wait()
        statistics.count_allgather(len(payload), received.size)
        return received

    own = np.array([layer.count() for layer in layers], np.int64)
    received = gather("counts", own.tobytes())
    if received.size != carrier.size * own.nbytes:
        raise WireFormatError(f"{name}: {carrier.size * own.nbytes} bytes of counts expected, got {received.size}")
    counts = received.view(np.int64).reshape(carrier.size, len(layers))
    ranks = counts.argmax(axis=0)  # of equal ones the first
    won = [(rank, i) for rank in range(carrier.size) for i in np.flatnonzero(ranks == rank).tolist()]
    received = gather("counted", b"".join(layers[i].pack() for rank, i in won if rank == carrier.rank))
    if received.size != sum(layer.nbytes for layer in layers):
        raise WireFormatError(f"{name}: the statistics of {len(layers)} layers have {received.size} bytes")
    ends = np.cumsum([layers[i].nbytes for _, i in won])
    parts = np.split(received, ends[:-1])
    for (rank, i), part in zip(won, parts, strict=True):
        if refuse_nonfinite and not layers[i].is_finite(part):
            raise NonFiniteError(
                f"{name}: the running statistics of {layers[i].name} are NaN or Inf on rank {rank}, which has seen the "
                "most batches; nothing was changed"
            )

    def adopt() -> None:
        for (rank, i), part in zip(won, parts, strict=True):
            layers[i].adopt(int(counts[rank, i]), part)

    return adopt
