"""Two-phase: every rank owns a shard of each bucket, makes its mean, and gives it to all.

Phase one is an alltoall of codes; the owner adds them up, and its own part **uncoded**. Phase two is an allgather of
the means, coded again. A rank sends ``(n - 1)/n (b1 + b2) d/8`` bytes, whatever n is.

What the second coding does to the noise (derived). Let ``E|Q(v) - v|^2 <= q |v|^2`` in phase one and q2 likewise in
phase two, ``m`` the mean of the ranks' numbers and ``o`` the owner. Both codings unbiased and independent,

    E|mean - m|^2 <= (1 + q2) (q/n^2) sum_{r != o} |v_r|^2 + q2 |m|^2.

The first term is averaged over the ranks and falls as 1/n; the second is not: however many ranks there are, a
relative noise of q2 stays. For equal v_r the factor on the second moment is ``(1 + q (n-1)/n^2) (1 + q2)``, at worst
(one rank's v large, the others' 0) about ``(1 + q)(1 + q2)``. So for many ranks give phase two more bits than phase
one (``second_codec``); each bit costs 1/8 byte per element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .. import native
from ..codecs.base import Codec
from ..errors import DesynchronizedError, WireFormatError
from . import wire
from .base import MEANS_PHASE, VALUES_PHASE, Flight, Float32, MessageExchange, NonFinitePolicy, derive_keys
from .carriers import Bytes, Carrier, Handle
from .layout import Span, cut_shards, shard_alignment


@dataclass
class _Bucket:
    """The layout and the buffers of one bucket."""

    names: tuple[str, str]
    shards: list[Span]
    splits: list[int]  # message bytes to each rank in phase one
    values_message: Bytes  # all messages of phase one, in rank order
    values_messages: list[Bytes]  # the same, cut apart
    mean: Float32  # of the own shard
    mean_source: native.Source
    mean_message: Bytes


@dataclass
class _Keys:
    """The keys of one step, each [bucket][rank]."""

    sent: list[list[int]]  # own values, by owner
    received: list[list[int]]  # values of the own shard, by sender
    means: list[list[int]]  # means, by owner


class TwoPhaseExchange(MessageExchange):
    """``mean = Q2(sum over r, in rank order, of (1/n) v'_r)``; ``v'_r = Q(v_r)``, but ``v'_o = v_o`` for the owner o.

    Shard o of bucket b is tensor number ``t = b n + o``: rank r's values have the key ``derive_key(seed, r, step, t,
    0)``, the owner's mean ``derive_key(seed, o, step, t, 1)``.
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
        nonfinite: NonFinitePolicy = "raise",
    ) -> None:
        super().__init__(codec, carrier, buckets, name=name, seed=seed, digest=digest, nonfinite=nonfinite)
        self.second_codec = second_codec if second_codec is not None else codec
        self._spec = self.codec.native_spec
        self._second_spec = self.second_codec.native_spec
        self._others = [rank for rank in range(self._size) if rank != self._rank]
        self._buckets = [
            self._lay_out(f"{name}.b{bucket}", num_elements) for bucket, num_elements in enumerate(self.buckets)
        ]
        self._last_payload_nbytes = [
            [self.second_codec.payload_nbytes(shard.num_elements) for shard in bucket.shards]
            for bucket in self._buckets
        ]
        self._keys = _Keys([], [], [])

    def _lay_out(self, name: str, num_elements: int) -> _Bucket:
        shards = cut_shards(num_elements, self._size, shard_alignment(self.codec, self.second_codec))
        splits = [wire.HEADER_NBYTES + self.codec.payload_nbytes(shard.num_elements) for shard in shards]
        splits[self._rank] = 0
        values_message = np.zeros(sum(splits), np.uint8)
        mean = np.zeros(shards[self._rank].num_elements, np.float32)
        return _Bucket(
            names=(f"{name}.p1", f"{name}.p2"),
            shards=shards,
            splits=splits,
            values_message=values_message,
            values_messages=np.split(values_message, np.cumsum(splits)[:-1]),
            mean=mean,
            mean_source=native.Source.from_arrays([mean]),
            mean_message=np.zeros(wire.HEADER_NBYTES + self.second_codec.payload_nbytes(mean.size), np.uint8),
        )

    def predicted_bytes_per_round(self) -> int:
        """Return what this rank sends in a round of all buckets, headers included."""
        return sum(sum(bucket.splits) + (self._size - 1) * bucket.mean_message.size for bucket in self._buckets)

    def _prepare_keys(self, step: int) -> None:
        size, count = self._size, len(self._buckets)
        tensors = np.arange(count * size).reshape(count, size)
        own = np.full((count, size), self._rank)
        every = np.broadcast_to(np.arange(size), (count, size))

        def derive(tensor: np.ndarray, rank: np.ndarray, phase: int) -> list[list[int]]:
            keys = derive_keys(self._seed, step, tensor.ravel().tolist(), rank.ravel().tolist(), phase)
            return [keys[first : first + size] for first in range(0, len(keys), size)]

        own_tensors = np.broadcast_to(tensors[:, self._rank : self._rank + 1], (count, size))
        self._keys = _Keys(
            derive(tensors, own, VALUES_PHASE),
            derive(own_tensors, every, VALUES_PHASE),
            derive(tensors, every, MEANS_PHASE),
        )

    def _launch(self, flight: Flight) -> Handle:
        bucket = self._buckets[flight.bucket]
        keys = self._keys.sent[flight.bucket]
        for owner in self._others:
            shard = bucket.shards[owner]
            payload = bucket.values_messages[owner][wire.HEADER_NBYTES :]
            if shard.num_elements and not native.encode(
                self._spec, flight.source, flight.start + shard.start, shard.num_elements, keys[owner], payload
            ):
                flight.flags |= wire.FLAG_NON_FINITE
        for owner in self._others:  # only now is it known what the headers have to say
            message = bucket.values_messages[owner]
            wire.pack_into(message, self._header(flight, message.size - wire.HEADER_NBYTES))
        handle = self._carrier.alltoall(bucket.names[0], bucket.values_message, bucket.splits)
        self.bytes_sent += bucket.values_message.size
        return handle

    def _arrived(self, flight: Flight, received: Bytes) -> Handle | None:
        if flight.phase == MEANS_PHASE:
            return super()._arrived(flight, received)
        self.bytes_received += received.size
        bucket = self._buckets[flight.bucket]
        try:
            self._make_mean(flight, bucket, received)
        except DesynchronizedError as error:
            flight.flags |= wire.FLAG_DESYNCHRONIZED
            flight.error = error
        except WireFormatError as error:
            flight.flags |= wire.FLAG_MALFORMED
            flight.error = error
        # Whatever has happened, phase two takes place: the others wait for it, and learn from its header.
        flight.phase = MEANS_PHASE
        return self._send_to_all(flight, bucket.names[1], bucket.mean_message)

    def _make_mean(self, flight: Flight, bucket: _Bucket, received: Bytes) -> None:
        """Add up the own shard and encode its mean."""
        shard = bucket.shards[self._rank]
        nbytes = self.codec.payload_nbytes(shard.num_elements)
        messages = self._open(flight, received, self._others, [nbytes] * len(self._others))
        if not shard.num_elements:
            return
        start = flight.start + shard.start
        if flight.flags or any(message.header.flags for message in messages):
            # Some sender's codes mean nothing, so there is no mean; only the verdict has to be complete.
            if not self._own_part_is_finite(flight, bucket, start):
                flight.flags |= wire.FLAG_NON_FINITE
            return
        payloads: list[Bytes | None] = [message.payload for message in messages]
        payloads.insert(self._rank, None)
        native.reduce(
            self._spec, payloads, self._keys.received[flight.bucket], self._weight, flight.source, start, bucket.mean
        )
        key = self._keys.means[flight.bucket][self._rank]
        payload = bucket.mean_message[wire.HEADER_NBYTES :]
        if not native.encode(self._second_spec, bucket.mean_source, 0, shard.num_elements, key, payload):
            finite = self._own_part_is_finite(flight, bucket, start)
            flight.flags |= wire.FLAG_MEAN_OVERFLOW if finite else wire.FLAG_NON_FINITE

    def _own_part_is_finite(self, flight: Flight, bucket: _Bucket, start: int) -> bool:
        """Look at what nobody has encoded; it takes the place of the mean, which there is none of."""
        native.gather(flight.source, start, bucket.mean)
        return bool(np.isfinite(bucket.mean).all())

    def _decode(self, flight: Flight, payloads: list[Bytes], mean: Float32) -> None:
        keys = self._keys.means[flight.bucket]
        for shard, payload, key in zip(self._buckets[flight.bucket].shards, payloads, keys, strict=True):
            if shard.num_elements:
                part = slice(shard.start, shard.stop)
                base = None if flight.base is None else flight.base[part]
                native.reduce(self._second_spec, [payload], [key], 1.0, None, 0, mean[part], base)
