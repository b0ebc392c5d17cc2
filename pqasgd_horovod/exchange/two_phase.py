"""Two-phase: every rank owns a shard of each bucket, makes its mean, and gives it to all.

Phase one is an alltoall of codes; the owner adds them up, and its own part **uncoded**. Phase two is an allgather of
the means, coded again. A rank sends ``(n - 1)/n (b1 + b2) d/8`` bytes, whatever n is.

Signs without a scale, coded as such again, are a majority vote: the owner adds up whole numbers, its own signs too, and
sends the sign of the sum.

What the second coding does to the noise (derived). Let ``E|Q(v) - v|^2 <= q |v|^2`` in phase one and q2 likewise in
phase two, ``m`` the mean of the ranks' numbers and ``o`` the owner. Both codings unbiased and independent,

    E|mean - m|^2 <= (1 + q2) (q/n^2) sum_{r != o} |v_r|^2 + q2 |m|^2.

The first term is averaged over the ranks and falls as 1/n; the second is not: however many ranks there are, a
relative noise of q2 stays. For equal v_r the factor on the second moment is ``(1 + q (n-1)/n^2) (1 + q2)``, at worst
(one rank's v large, the others' 0) about ``(1 + q)(1 + q2)``. So for many ranks give phase two more bits than phase
one (``second_codec``); each bit costs 1/8 byte per element. Or the owner keeps what it did not send and adds it to the
next mean (``feedback``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .. import native
from ..codecs.base import Codec
from ..errors import DesynchronizedError, WireFormatError
from . import wire
from .base import MEANS_PHASE, Flight, Float32, MessageExchange
from .carriers import Carrier, Handle, Messages
from .layout import Span, cut_shards, shard_alignment, shard_limits
from .verdict import read_headers


@dataclass
class _Bucket:
    """The layout and the buffers of one bucket."""

    names: tuple[str, str]
    shards: list[Span]
    splits: list[int]  # message bytes to each rank in phase one
    values_messages: Messages  # all messages of phase one, in rank order
    mean: Float32  # of the own shard
    mean_message: Messages
    residuals: tuple[Float32, Float32] | None  # of the own shard's mean: that of the last round, that of this one


class TwoPhaseExchange(MessageExchange):
    """``mean = Q2(sum over r, in rank order, of (1/n) v'_r)``; ``v'_r = Q(v_r)``, but ``v'_o = v_o`` for the owner o.

    More exactly ``v'_o = codec.own_part(v_o)``; and 1 takes the place of 1/n where the second codec keeps no scale.
    Shard o of bucket b is tensor number ``t = b n + o``: rank r's values have the key ``derive_key(seed, r, step, t,
    0)``, the owner's mean ``derive_key(seed, o, step, t, 1)``; both have the shared key ``derive_shared_key(seed, step,
    t)``.
    """

    method = "two_phase"

    def __init__(
        self,
        codec: Codec,
        carrier: Carrier,
        buckets: Sequence[int],
        *,
        name: str,
        seed: int,
        digest: int,
        second_codec: Codec | None = None,
        feedback: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(codec, carrier, buckets, name=name, seed=seed, digest=digest, **options)
        self.second_codec = second_codec or codec.for_means
        self._feedback = feedback
        self._others = [rank for rank in range(self.size) if rank != self._rank]
        self._buckets = [self._lay_out(f"{name}.b{bucket}", self._cut(bucket)) for bucket in range(len(self.buckets))]
        self._native = self._native_buckets(
            self.second_codec, [shard_limits(bucket.shards) for bucket in self._buckets]
        )
        self._last_payload_nbytes = [
            [self.second_codec.payload_nbytes(shard.num_elements) for shard in bucket.shards]
            for bucket in self._buckets
        ]

    def _cut(self, bucket: int) -> list[Span]:
        """Return which part of a bucket each rank owns."""
        return cut_shards(self.buckets[bucket], self.size, shard_alignment(self.codec, self.second_codec))

    def _lay_out(self, name: str, shards: list[Span]) -> _Bucket:
        splits = [wire.HEADER_NBYTES + self.codec.payload_nbytes(shard.num_elements) for shard in shards]
        splits[self._rank] = 0
        own = shards[self._rank].num_elements
        return _Bucket(
            names=(f"{name}.p1", f"{name}.p2"),
            shards=shards,
            splits=splits,
            values_messages=self._message_memory(sum(splits)),
            mean=native.zeros(own, device=self._device),
            mean_message=self._message_memory(wire.HEADER_NBYTES + self.second_codec.payload_nbytes(own)),
            residuals=(native.zeros(own, device=self._device), native.zeros(own, device=self._device))
            if self._feedback
            else None,
        )

    def commit(self) -> None:
        """Let what the last round did not send of its means be sent by the next."""
        for index in self.averaged:
            bucket = self._buckets[index]
            if bucket.residuals is not None:
                bucket.residuals = bucket.residuals[::-1]

    def mean_residual(self, bucket: int) -> tuple[Span, Float32] | None:
        """Return what this rank has not sent of the mean of its shard: the shard, and the numbers."""
        residuals = self._buckets[bucket].residuals
        return None if residuals is None else (self._buckets[bucket].shards[self._rank], residuals[0])

    def predicted_bytes_per_round(self) -> int:
        """Return what this rank sends in a round of all buckets, headers included."""
        return sum(sum(bucket.splits) + (self.size - 1) * bucket.mean_message.size for bucket in self._buckets)

    def _launch(self, flight: Flight) -> Handle:
        bucket = self._buckets[flight.bucket]
        flight.flags = self._native[flight.bucket].pack(
            flight.source, flight.start, flight.step, flight.round, bucket.values_messages, flight.flags
        )
        handle = self._messenger.alltoall(bucket.names[0], bucket.values_messages, bucket.splits)
        self.bytes_sent += bucket.values_messages.size
        return handle

    def _arrived(self, flight: Flight, received: Messages) -> Handle | None:
        if flight.phase == MEANS_PHASE:
            return super()._arrived(flight, received)
        self._make_mean(flight, received)
        # Whatever has happened, phase two takes place: the others wait for it, and learn from its header.
        flight.phase = MEANS_PHASE
        bucket = self._buckets[flight.bucket]
        return self._send_to_all(bucket.names[1], bucket.mean_message)

    def _make_mean(self, flight: Flight, received: Messages) -> None:
        """Make the mean of the own shard, and its message, of what phase one brought."""
        self.bytes_received += received.size
        bucket = self._buckets[flight.bucket]
        flags = self._native[flight.bucket].make_mean(
            flight.flags, received, flight.source, flight.start, flight.step, flight.round,
            bucket.mean, bucket.mean_message, bucket.residuals,
        )  # fmt: skip
        if flags & (wire.FLAG_DESYNCHRONIZED | wire.FLAG_MALFORMED):
            nbytes = self.codec.payload_nbytes(bucket.mean.size)
            try:
                read_headers(
                    flags, received, self._own_header(flight), self._others, [nbytes] * len(self._others), self.names
                )
            except (DesynchronizedError, WireFormatError) as error:
                flight.error = error
        flight.flags = flags & wire.ALL_FLAGS
