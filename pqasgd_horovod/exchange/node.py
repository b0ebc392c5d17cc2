"""Between nodes coded numbers, inside a node plain ones.

Inside a node bytes are cheap. So its ranks first make their mean exactly; then that is coded and exchanged with other
nodes, once for each node and not once for each rank; then it goes to all ranks of the node as it is. Bucket b is the
work of rank number ``b mod L`` of the ``L`` ranks of each node, so that all of them code and send.

With N nodes the noise is that of N ranks, and ``L`` times fewer bytes leave a node than with all its ranks exchanging.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import native
from ..codecs.cast import NoCompression
from . import wire
from .base import MEANS_PHASE, Exchange, Flight, Float32, Landed
from .carriers import Handle, Messages
from .carriers.nodes import NodesCarrier
from .layout import Span
from .two_phase import TwoPhaseExchange
from .verdict import Kind, Names, Problem

_ACROSS_PHASE = 2  # of a flight only; nothing on the wire says so
_FLAGS = {
    Kind.DESYNCHRONIZED: wire.FLAG_DESYNCHRONIZED,
    Kind.MALFORMED: wire.FLAG_MALFORMED,
    Kind.NON_FINITE: wire.FLAG_NON_FINITE,
}


class NodeExchange(TwoPhaseExchange):
    """``mean = X(m_1 .. m_N)`` with the exact means ``m_i = (1/L) sum of v_r`` of N nodes, and their exchange X.

    It is a two-phase exchange inside the node, uncoded, in which one rank owns a whole bucket; between the phases the
    owner takes its node's mean to ``across``, the exchange of the owners.
    """

    def __init__(self, carrier: NodesCarrier, buckets: Sequence[int], across: Exchange | None, **options: Any) -> None:
        super().__init__(NoCompression(), carrier.local, buckets, **options)
        self.names = Names(carrier.local_ranks, range(len(buckets)))
        self._across = across
        self.num_parts = carrier.across.size
        if across is not None:
            across.names = Names(
                carrier.across_ranks, range(carrier.local.rank, len(buckets), self.size), of_nodes=True
            )

    def _cut(self, bucket: int) -> list[Span]:
        owner, num_elements = bucket % self.size, self.buckets[bucket]
        return [
            Span(0 if rank <= owner else num_elements, num_elements if rank == owner else 0)
            for rank in range(self.size)
        ]

    def _owned(self, bucket: int) -> int | None:
        """Return the number of a bucket among those that are exchanged by this rank, if it is one."""
        return bucket // self.size if bucket % self.size == self._rank else None

    @property
    def network_bytes(self) -> tuple[int, int]:
        """The bytes sent to, and received from, other nodes."""
        return (0, 0) if self._across is None else self._across.network_bytes

    @property
    def node_bytes(self) -> tuple[int, int]:
        """The bytes sent and received inside the node."""
        return self.bytes_sent, self.bytes_received

    def commit(self) -> None:
        """Let what the last round did not send of its means be sent by the next."""
        if self._across is not None:
            self._across.commit()

    def mean_residual(self, bucket: int) -> tuple[Span, Float32] | None:
        """Return what this rank has not sent of the mean of its shard of its buckets."""
        owned = self._owned(bucket)
        return None if self._across is None or owned is None else self._across.mean_residual(owned)

    def begin(self, bucket: int, source: native.Source, start: int, **options: Any) -> None:
        """Encode the bucket and launch its first phase; see :meth:`Exchange.begin`."""
        if self._across is not None and not self._flights:
            self._across.finished, self._across.averaged = [], []
        super().begin(bucket, source, start, **options)

    def _launch(self, flight: Flight) -> Handle:
        # What was not sent before joins the node's mean, not this rank's numbers.
        plain = flight.source.without_residual()
        flight.residual = flight.source.residual(flight.start)
        flight.source = plain
        return super()._launch(flight)

    def _arrived(self, flight: Flight, received: Messages) -> Handle | None:
        owned = self._owned(flight.bucket)
        if flight.phase == MEANS_PHASE or owned is None or self._across is None:
            return super()._arrived(flight, received)
        bucket = self._buckets[flight.bucket]
        if flight.phase == _ACROSS_PHASE:
            self._across._take(owned, bucket.mean)
            known = [problem for problem in self._across._problems if problem.bucket == flight.bucket]
            averaged = owned in self._across.averaged
            flight.flags = 0 if averaged else _FLAGS[known[0].kind if known else Kind.NON_FINITE]
            flight.phase = MEANS_PHASE
            self._native[flight.bucket].relay(flight.flags, flight.step, flight.round, bucket.mean, bucket.mean_message)
            return self._send_to_all(bucket.names[1], bucket.mean_message)
        self._make_mean(flight, received)
        # Other nodes hear from the owner what the others flag, too.
        flight.phase = _ACROSS_PHASE
        node_mean = native.Source(
            [(bucket.mean.ctypes.data, native.DTYPE_F32, bucket.mean.size)],
            owner=(bucket.mean, flight.source),
            residual=flight.residual,
            device=self._device,
        )
        self._across.begin(owned, node_mean, 0, step=flight.step, round=flight.round, flags=flight.flags)
        self._across._flights[owned].error = flight.error
        return Landed(self._across, owned)

    def _told(self, problems: list[Problem]) -> list[Problem]:
        """Tell each other inside the node what its ranks have found, each in its own buckets."""
        across: list[Problem] = []
        if self._across is not None:
            across, self._across._problems = self._across._problems, []
        own = [[problem.kind, problem.bucket, problem.text] for problem in across]
        document = np.frombuffer(json.dumps(own).encode(), np.uint8)
        lengths = self._carrier.allgather(f"{self.name}.problems.lengths", np.array([document.size]).view(np.uint8))
        documents = self._carrier.allgather(f"{self.name}.problems", document).wait().tobytes()
        found: list[Problem] = []
        for length in lengths.wait().view(np.int64).tolist():
            found += [Problem(Kind(kind), bucket, text) for kind, bucket, text in json.loads(documents[:length])]
            documents = documents[length:]
        # What was told between nodes is told alike on all of them; a flag in the node only repeats it.
        told = {problem.bucket for problem in found}
        cause = next((problem.cause for problem in across if problem.cause is not None), None)
        return [problem._replace(cause=cause) for problem in [*found, *(p for p in problems if p.bucket not in told)]]
