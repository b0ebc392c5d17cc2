"""Allgather: everybody gets everybody's codes and adds them up.

One quantization, whose noise is averaged over the ranks: with ``E|Q(v) - v|^2 <= q |v|^2`` the mean's variance is
``(q/n^2) sum_r |v_r|^2``, which falls as 1/n. A rank sends ``(n - 1) b d/8`` bytes, which grows with n: the cheaper
way for few ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..codecs.base import Codec
from . import wire
from .base import Flight, MessageExchange
from .carriers import Carrier, Handle


class AllgatherExchange(MessageExchange):
    """``mean = sum over r, in rank order, of (1/n) Q(v_r)``, made by every rank of the same bytes, its own included.

    The key of rank r's payload of bucket b is ``derive_key(seed, r, step, b, 0)``, the shared one
    ``derive_shared_key(seed, step, b)``.
    """

    method = "allgather"

    def __init__(
        self,
        codec: Codec,
        carrier: Carrier,
        buckets: Sequence[int],
        *,
        name: str,
        seed: int,
        digest: int,
        **options: Any,
    ) -> None:
        super().__init__(codec, carrier, buckets, name=name, seed=seed, digest=digest, **options)
        self._native = self._native_buckets(codec)
        self._last_payload_nbytes = [[codec.payload_nbytes(num_elements)] * self.size for num_elements in self.buckets]
        self._messages = [
            self._message_memory(wire.HEADER_NBYTES + nbytes[self._rank]) for nbytes in self._last_payload_nbytes
        ]
        self._names = [f"{name}.b{bucket}.p1" for bucket in range(len(self.buckets))]

    def predicted_bytes_per_round(self) -> int:
        """Return what this rank sends in a round of all buckets, headers included."""
        return (self.size - 1) * sum(message.size for message in self._messages)

    def _launch(self, flight: Flight) -> Handle:
        message = self._messages[flight.bucket]
        flight.flags = self._native[flight.bucket].pack(
            flight.source, flight.start, flight.step, flight.round, message, flight.flags
        )
        return self._send_to_all(self._names[flight.bucket], message)
