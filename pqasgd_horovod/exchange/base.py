"""What every exchange has in common: rounds of buckets in flight, and one verdict on all ranks.

A round goes ``begin`` (every bucket, in any order) - ``advance`` (as often as one likes) - ``finish``. Nothing is
decided about a bucket before the last of its messages is there, and nothing is raised before the last bucket of the
round is: after an error nothing is in flight, and the next round works. What is decided depends on bytes that all
ranks have received alike, so all ranks decide the same.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import numpy as np
from numpy.typing import NDArray

from .. import native
from ..codecs.base import Codec
from ..errors import ArgumentError, CollectiveTimeoutError, PqasgdError
from . import wire
from .carriers import Bytes, Carrier, DeviceCarrier, Handle, Messages, wait_until
from .layout import Span
from .verdict import Kind, Names, Problem, explain, raise_verdict

if TYPE_CHECKING:
    from ..native.cuda import Device

Float32 = NDArray[np.float32]
NonFinitePolicy = Literal["raise", "propagate"]

VALUES_PHASE = 0
MEANS_PHASE = 1

_MAX_UINT64 = 2**64 - 1


@dataclass
class Flight:
    """One bucket on its way; it has landed when ``handle`` is None again."""

    bucket: int
    source: native.Source
    start: int
    step: int
    round: int
    base: Float32 | None = None  # what the mean is added to
    phase: int = VALUES_PHASE
    flags: int = 0
    handle: Handle | None = None
    received: Messages | None = None
    error: PqasgdError | None = None  # what this rank found in phase one
    residual: tuple[int, int] | None = None  # pointers, where it is not in the source


class Exchange(abc.ABC):
    """Turns each rank's numbers into their mean on every rank, ``mean = (1/n) sum_r Q_r(values_r)``, bucket by bucket.

    Made by :func:`~pqasgd_horovod.exchange.make_exchange`. Names and sizes of all messages are constant over the run,
    send buffers are allocated once. The mean is bit-identical on every rank: every rank decodes the same bytes in the
    same order. With a ``device`` sources, bases and means are memory that it reaches; with ``device_messages`` too
    messages are its own memory, on every rank of a :class:`~.carriers.DeviceCarrier`. Their bytes are the same.

    ``bytes_sent`` and ``bytes_received`` count payloads and headers between this rank and others since construction.
    """

    method: ClassVar[str]

    def __init__(
        self,
        codec: Codec,
        carrier: Carrier,
        buckets: Sequence[int],
        *,
        name: str,
        seed: int,
        digest: int,
        nonfinite: NonFinitePolicy = "raise",
        device: Device | None = None,
        device_messages: bool = False,
    ) -> None:
        if any(num_elements < 1 for num_elements in buckets):
            raise ArgumentError(f"buckets has to hold sizes of at least 1 element, got {list(buckets)}")
        if nonfinite not in ("raise", "propagate"):
            raise ArgumentError(f"nonfinite has to be 'raise' or 'propagate', got {nonfinite!r}")
        self.codec = codec
        self.buckets = tuple(buckets)
        self.name = name
        self._device = device
        self._device_messages = device_messages
        self.bytes_sent = 0
        self.bytes_received = 0
        self._carrier = carrier
        self.size = carrier.size
        self.num_parts = carrier.size
        """Of how many equal parts the mean is made."""
        self._rank = carrier.rank
        self.names: Names | None = None
        """What the user calls ranks and buckets, if not by their numbers here."""
        self._weight = 1.0 / carrier.size
        self._seed = _check_uint64("seed", seed)
        self._digest = _check_uint64("digest", digest)
        self._nonfinite = nonfinite
        self._flights: dict[int, Flight] = {}
        self._problems: list[Problem] = []
        self.finished: list[int] = []
        """Buckets of the last round, in the order in which they landed."""
        self.averaged: list[int] = []
        """Those of them that have a mean, and not NaN in its place."""
        self._waiting = False  # finish() has begun, and has not ended
        self._carrier_error: Exception | None = None

    @abc.abstractmethod
    def predicted_bytes_per_round(self) -> int:
        """Return what this rank sends in a round of all buckets, headers included."""

    @abc.abstractmethod
    def _launch(self, flight: Flight) -> Handle | None:
        """Encode the bucket and launch its first phase."""

    @abc.abstractmethod
    def _arrived(self, flight: Flight, received: Messages) -> Handle | None:
        """Take what a phase brought; return the handle of the next phase, or None after the last one."""

    @abc.abstractmethod
    def _land(self, flight: Flight, mean: Float32) -> Problem | None:
        """Turn what the last phase brought into ``mean``; or return what is wrong with it."""

    @property
    def network_bytes(self) -> tuple[int, int]:
        """The bytes sent and received, without those inside a node where the exchange tells them apart."""
        return self.bytes_sent, self.bytes_received

    @property
    def node_bytes(self) -> tuple[int, int]:
        """The bytes sent and received inside the node, where the exchange tells them apart."""
        return 0, 0

    def commit(self) -> None:  # noqa: B027 - most exchanges keep nothing
        """Keep what the last round left for the next: it has succeeded, and its means are used."""

    def mean_residual(self, bucket: int) -> tuple[Span, Float32] | None:
        """Return what this rank has not sent of a bucket's mean: where it lies in the bucket, and the numbers.

        None where there is no feedback on means.
        """
        return None

    def begin(
        self,
        bucket: int,
        source: native.Source,
        start: int,
        *,
        step: int,
        round: int,
        base: Float32 | None = None,
        flags: int = 0,
    ) -> None:
        """Encode ``source[start : start + buckets[bucket]]`` and launch its first phase; never waits.

        ``step`` keys the rounding noise and, with ``round``, is compared with the other ranks'. ``source`` must not
        change before :meth:`finish` returns: what this rank owns of it is read then. With a ``base``, float32 of
        ``buckets[bucket]`` elements, what :meth:`finish` writes is ``base + mean``. NaN and Inf are not raised here but
        by :meth:`finish`, on every rank. ``flags`` say what is known to be wrong with the bucket already.
        """
        if self._carrier_error is not None:
            raise PqasgdError(
                f"exchange {self.name!r} has lost its carrier, make a new one: {self._carrier_error}"
            ) from self._carrier_error
        if not 0 <= bucket < len(self.buckets):
            raise ArgumentError(f"bucket has to be from 0 to {len(self.buckets) - 1}, got {bucket}")
        if bucket in self._flights:
            raise ArgumentError(
                f"bucket {bucket} of exchange {self.name!r} is in flight: call finish() before it is begun again"
            )
        if start < 0 or start + self.buckets[bucket] > source.numel:
            raise ArgumentError(
                f"start has to leave room for the {self.buckets[bucket]} elements of bucket {bucket} "
                f"in a source of {source.numel}, got {start}"
            )
        if base is not None and (base.dtype != np.float32 or base.shape != (self.buckets[bucket],)):
            raise ArgumentError(
                f"base has to be float32 of shape ({self.buckets[bucket]},) for bucket {bucket}, "
                f"got {base.dtype} of shape {base.shape}"
            )
        flight = Flight(bucket, source, start, _check_uint64("step", step), _check_uint64("round", round), base)
        flight.flags = flags
        for earlier in self._flights.values():
            if earlier.step != step:
                raise ArgumentError(
                    f"step has to be the same for all buckets of a round, {earlier.step}, "
                    f"got {step} for bucket {bucket}"
                )
        flight.handle = self._launch(flight)
        self._flights[bucket] = flight

    def advance(self) -> None:
        """Make progress without waiting: launch the next phase of every bucket of which one has arrived."""
        for flight in self._flights.values():
            try:
                while flight.handle is not None and flight.handle.done():
                    flight.handle = self._arrived(flight, flight.handle.wait())
            except Exception as error:
                self._carrier_error = error
                raise

    def _any_landed(self) -> bool:
        self.advance()
        return any(flight.handle is None for flight in self._flights.values())

    def finish(self, means: Sequence[Float32], timeout: float | None = None, scale: float = 1.0) -> None:
        """Wait for all buckets begun and write their means: ``means[b]`` is float32 of ``buckets[b]`` elements.

        Each mean is multiplied by ``scale``, the same on every rank, when it is there, and then added to its base.

        On an error ``means`` is undefined, and nothing is in flight any more. Every rank raises the same:

        - :class:`~pqasgd_horovod.errors.DesynchronizedError`: some rank is at another step or round, or has another
          configuration;
        - :class:`~pqasgd_horovod.errors.WireFormatError`: some rank received something malformed;
        - :class:`~pqasgd_horovod.errors.NonFiniteError`: some rank had NaN, Inf or a number beyond the codec's range.
          With ``nonfinite="propagate"`` the mean of that bucket is NaN on every rank instead.

        After ``timeout`` seconds :class:`~pqasgd_horovod.errors.CollectiveTimeoutError` is raised; then the round is
        still in flight, and ``finish`` can be called again to go on waiting.
        """
        self._check_means(means)
        if not self._waiting:
            self.finished, self.averaged, self._waiting = [], [], True
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._flights:
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not wait_until(self._any_landed, remaining):
                raise self._timeout_error(timeout)
            bucket = next(flight.bucket for flight in self._flights.values() if flight.handle is None)
            self._take(bucket, means[bucket], scale)
        self._waiting = False
        problems, self._problems = self._problems, []
        if problems:
            raise_verdict(self.name, self._told(problems))

    def _take(self, bucket: int, mean: Float32, scale: float = 1.0) -> Problem | None:
        """Turn a bucket that has landed into its mean, or NaN, and take note of it; return what is wrong with it."""
        flight = self._flights.pop(bucket)
        base = flight.base
        if scale != 1:
            flight.base = None
        problem = self._land(flight, mean)
        self.finished.append(bucket)
        if problem is None:
            self.averaged.append(bucket)
            if scale != 1:
                np.multiply(mean, np.float32(scale), out=mean)
                if base is not None:
                    np.add(base, mean, out=mean)
            return None
        mean.fill(np.nan)
        if problem.kind is not Kind.NON_FINITE or self._nonfinite == "raise":
            self._problems.append(problem)
        return problem

    def _forget(self) -> None:
        """Forget what the last round brought, and what was wrong with it."""
        self.finished, self.averaged, self._problems = [], [], []

    def _told(self, problems: list[Problem]) -> list[Problem]:
        """Return the problems of a round as every rank knows them."""
        return problems

    def _check_means(self, means: Sequence[Float32]) -> None:
        if len(means) != len(self.buckets):
            raise ArgumentError(f"means has to hold {len(self.buckets)} arrays, one for each bucket, got {len(means)}")
        for bucket in self._flights:
            mean = means[bucket]
            if (
                mean.dtype != np.float32
                or mean.shape != (self.buckets[bucket],)
                or not (mean.flags.c_contiguous and mean.flags.writeable)
            ):
                raise ArgumentError(
                    f"means[{bucket}] has to be a writable contiguous float32 array of shape "
                    f"({self.buckets[bucket]},), got {mean.dtype} of shape {mean.shape}"
                )

    def _timeout_error(self, timeout: float | None) -> CollectiveTimeoutError:
        flight = next(iter(self._flights.values()))
        assert flight.handle is not None
        detail = "it came at the last moment, call finish() again"
        try:
            flight.handle.wait(0.0)
        except CollectiveTimeoutError as error:  # the carrier may know which ranks are missing
            detail = str(error)
        return CollectiveTimeoutError(
            f"exchange {self.name!r}: bucket {flight.bucket} did not arrive in {timeout} s: {detail}"
        )


class Landed:
    """Waits until a bucket of another exchange has arrived; brings nothing itself."""

    def __init__(self, exchange: Exchange, bucket: int) -> None:
        self._exchange = exchange
        self._flight = exchange._flights[bucket]

    def done(self) -> bool:
        """Return whether the bucket is there; makes progress."""
        self._exchange.advance()
        return self._flight.handle is None

    def wait(self, timeout: float | None = None) -> Bytes:
        """Wait for it."""
        if not wait_until(self.done, timeout):
            raise CollectiveTimeoutError(f"exchange {self._exchange.name!r}: not all have taken part in {timeout} s")
        return np.zeros(0, np.uint8)


class MessageExchange(Exchange):
    """An exchange among several ranks, whose last phase gives every rank the same messages, one of each rank."""

    _native: list[native.Bucket]
    _last_payload_nbytes: list[list[int]]  # of each bucket, from each rank

    def _native_buckets(
        self, second_codec: Codec, shards: Sequence[Sequence[int]] | None = None
    ) -> list[native.Bucket]:
        """Return what turns numbers to messages and back, bucket by bucket."""
        return [
            native.Bucket(
                self.codec.native_spec,
                second_codec.native_spec,
                bucket=bucket,
                num_elements=num_elements,
                rank=self._rank,
                size=self.size,
                digest=self._digest,
                seed=self._seed,
                shards=None if shards is None else shards[bucket],
                device=self._device,
                device_messages=self._device_messages,
            )
            for bucket, num_elements in enumerate(self.buckets)
        ]

    def _arrived(self, flight: Flight, received: Messages) -> Handle | None:
        flight.received = received
        self.bytes_received += received.size - wire.HEADER_NBYTES - self._last_payload_nbytes[flight.bucket][self._rank]
        return None

    def _land(self, flight: Flight, mean: Float32) -> Problem | None:
        assert flight.received is not None
        bucket = flight.bucket
        flags = self._native[bucket].land(flight.received, flight.step, flight.round, flight.base, mean)
        if not flags:
            return None
        nbytes, own = self._last_payload_nbytes[bucket], self._own_header(flight)
        return explain(flags, flight.received, own, range(self.size), nbytes, flight.error, self.names)

    def _own_header(self, flight: Flight) -> wire.Header:
        return wire.Header(
            flags=flight.flags,
            digest=self._digest,
            round=flight.round,
            step=flight.step,
            bucket=flight.bucket,
            rank=self._rank,
            payload_nbytes=0,
            num_elements=self.buckets[flight.bucket],
            phase=flight.phase,
        )

    def _message_memory(self, nbytes: int) -> Messages:
        return native.message_memory(nbytes, self._device, self._device_messages)

    @property
    def _messenger(self) -> DeviceCarrier:
        return cast("DeviceCarrier", self._carrier)  # if there are messages on devices

    def _send_to_all(self, name: str, message: Messages) -> Handle:
        handle = self._messenger.allgather(name, message)
        self.bytes_sent += (self.size - 1) * message.size
        return handle


def _check_uint64(argument: str, number: int) -> int:
    if not 0 <= number <= _MAX_UINT64:
        raise ArgumentError(f"{argument} has to be from 0 to 2**64 - 1, got {number}")
    return number
