r"""Rows of a table, of which each rank has others: the gradient of an embedding.

Every rank sends the numbers of its rows, each once, and their values, coded; a row's mean is

.. math:: \mathrm{mean}_i = \tfrac1n \sum_{r \text{ has } i} Q(v_r)_i

added up in rank order by every rank, of the same bytes. It goes by allgather, with a message of another size in each
step. The payload is the numbers of the rows, rising, in :func:`row_bits` bits each (``codecs/packing.py``), then the
codec's payload of all values, one row after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import native
from ..codecs.base import Codec
from . import wire
from .base import Float32
from .carriers import Bytes, Carrier, Handle
from .verdict import Problem, explain


class Table(NamedTuple):
    """A matrix of which few rows have a gradient."""

    num_rows: int
    row_size: int


class Rows(NamedTuple):
    """Some of its rows: their numbers, int64 and rising, and float32 values (rows, row_size)."""

    numbers: NDArray[np.int64]
    values: Float32


def row_bits(num_rows: int) -> int:
    """Return the bits of the number of a row.

    >>> [row_bits(rows) for rows in (1, 2, 50_000, 65_536, 65_537)]
    [1, 1, 16, 16, 17]
    """
    return max(1, (num_rows - 1).bit_length())


def payload_nbytes(codec: Codec, table: Table) -> Callable[[int], int]:
    """Return the function of the number of elements that gives the bytes of a payload; -1 if there is none.

    >>> from pqasgd_horovod import codecs
    >>> payload_nbytes(codecs.none(), Table(50_000, 64))(3 * 64)
    774
    """

    def nbytes(num_elements: int) -> int:
        count, rest = divmod(num_elements, table.row_size)
        if rest or count > table.num_rows:
            return -1
        return -(-count * row_bits(table.num_rows) // 8) + codec.payload_nbytes(num_elements)

    return nbytes


class RowsExchange:
    """Averages rows of one table among the ranks of ``carrier``.

    ``table`` is its number among those of a program, which the keys of its payloads have in the place of a bucket's.
    Use: in each round :meth:`begin`, then :meth:`finish`.
    """

    def __init__(
        self, codec: Codec, carrier: Carrier, shape: Table, *, name: str, table: int, seed: int, digest: int
    ) -> None:
        self.codec = codec
        self.name = name
        self.shape = shape
        self.bytes_sent = 0
        self.bytes_received = 0
        self._carrier = carrier
        self.table = table
        self._digest = digest
        self._native = native.Rows(
            codec.native_spec, *shape, table=table, rank=carrier.rank, size=carrier.size, digest=digest, seed=seed
        )
        self._handle: Handle | None = None
        self._step = self._round = self._own_nbytes = 0

    @property
    def in_flight(self) -> bool:
        """Whether a round has begun."""
        return self._handle is not None

    def begin(self, rows: Rows, *, step: int, round: int, residual: tuple[Float32, Float32] | None = None) -> None:
        """Encode this rank's rows and launch them; ``residual`` is what is added to their values, and what is left."""
        values = np.ascontiguousarray(rows.values, np.float32).reshape(-1)
        source = native.Source.from_arrays([values], residual=residual)
        message = np.zeros(wire.HEADER_NBYTES + self._native.nbytes(rows.numbers.size), np.uint8)
        self._native.pack(rows.numbers, source, step, round, message)
        self._step, self._round, self._own_nbytes = step, round, message.size
        self._message = message  # the carrier reads it until it is done
        self._handle = self._carrier.allgather(self.name, message)
        self.bytes_sent += (self._carrier.size - 1) * message.size

    def finish(self) -> tuple[Rows, Problem | None]:
        """Wait; return the means of all rows that any rank has sent, and what is wrong, the same on every rank."""
        assert self._handle is not None
        handle, self._handle = self._handle, None
        received = handle.wait()
        self.bytes_received += received.size - self._own_nbytes
        flags, numbers, values = self._native.land(received, self._step, self._round)
        return Rows(numbers, values), self._explain(flags, received) if flags else None

    def _explain(self, flags: int, received: Bytes) -> Problem:
        own = wire.Header(
            flags=0,
            digest=self._digest,
            round=self._round,
            step=self._step,
            bucket=self.table,
            rank=self._carrier.rank,
            payload_nbytes=0,
            num_elements=0,
            phase=0,
        )
        ranks = range(self._carrier.size)
        return explain(flags, received, own, ranks, payload_nbytes(self.codec, self.shape))
