"""One channel's exchange as a graph: the same plan, bytes and words as :mod:`pqasgd_horovod.exchange`, without Python.

For each bucket: *pack*, Horovod's allgather (or its alltoall, *mean*, and the allgather of the means), *land*. These
depend on nothing but their data, so TensorFlow runs buckets side by side, and coded gradients leave while others are
still being computed. What is wrong is data too, until the last bucket has landed: an op that failed in the middle would
leave other ranks waiting. Then one *verdict* raises the same error on every rank, or *commit* changes what the user
sees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from .. import native
from ..averaging.channel import ChannelPlan
from ..codecs.base import Codec
from ..errors import WireFormatError
from ..exchange import wire
from ..exchange.base import MEANS_PHASE, VALUES_PHASE, NonFinitePolicy
from ..exchange.carriers import Bytes, Carrier
from ..exchange.layout import Span, cut_shards, shard_alignment, shard_limits
from ..exchange.plan import bytes_of_rank
from ..exchange.verdict import Kind, Names, Problem, explain, raise_verdict
from ..native import cuda
from .carrier import HorovodCarrier, allgather, alltoall
from .library import ops, register_explainer
from .places import ON_HOST, Place, on_host
from .traced import outside_of_graphs


class Round(NamedTuple):
    """Which round buckets are exchanged in."""

    step: tf.Tensor
    number: tf.Tensor
    scale: Any = 1.0
    """A tf.Tensor or float: what a mean is multiplied by when it has landed; not 1 where ranks are absent."""


class Problems:
    """What went wrong in the buckets of a round, told together."""

    def __init__(self, name: str, nonfinite: NonFinitePolicy) -> None:
        self._name = name
        self._nonfinite = nonfinite
        self._noted: list[Problem] = []
        self._verdict = register_explainer(self._raise)

    def note(self, problem: Problem) -> None:
        """Take note of a bucket that has no mean."""
        if problem.kind is not Kind.NON_FINITE or self._nonfinite == "raise":
            self._noted.append(problem)

    def _raise(self, flags: int, data: Bytes) -> None:
        noted, self._noted = self._noted, []
        if noted:
            raise_verdict(self._name, noted)

    def verdict(self, flags: Sequence[tf.Tensor]) -> tf.Operation:
        """Return the op that raises the common error, if there is one, when all buckets have landed."""
        with on_host():
            return ops.pqasgd_verdict(flags=list(flags), explainer=self._verdict)


@dataclasses.dataclass
class Messages:
    """The messages of one bucket among the ranks of a carrier, as ops; ``shards``: of a two-phase exchange."""

    name: str
    codec: Codec
    second_codec: Codec
    carrier: HorovodCarrier
    bucket: int
    num_elements: int
    digest: int
    seed: int
    round: Round
    shards: Sequence[Span] | None = None
    names: Names | None = None
    """What the user calls ranks and bucket."""
    place: Place = ON_HOST
    """Where the numbers are."""

    @property
    def attributes(self) -> dict[str, Any]:
        """What the ops know of the bucket."""
        return {
            "codec": list(self.codec.native_spec),
            "second_codec": list(self.second_codec.native_spec),
            "bucket": self.bucket,
            "num_elements": self.num_elements,
            "rank": self.carrier.rank,
            "size": self.carrier.size,
            "digest": signed(self.digest),
            "seed": signed(self.seed),
            "shards": [] if self.shards is None else shard_limits(self.shards),
            "step": self.round.step,
            "round": self.round.number,
        }

    def exchange(
        self,
        source: dict[str, Any],
        residuals: Sequence[tuple[tf.Variable, tf.Variable]],
        offset: int,
        known: Sequence[tf.Tensor] = (),
    ) -> tf.Tensor:
        """Return what the last phase brings of a bucket at ``offset``; ``known`` are flags of what is wrong with it."""
        if self.shards is not None:
            message, _, _ = self.mean(source, residuals, offset, known)
            return self.send_to_all(message, "p2")
        messages, _ = self._pack(source, residuals, known)
        return self.send_to_all(messages, "p1")

    def mean(
        self,
        source: dict[str, Any],
        residuals: Sequence[tuple[tf.Variable, tf.Variable]],
        offset: int,
        known: Sequence[tf.Tensor] = (),
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Return the message of the mean of this rank's shard, its flags, and that mean."""
        assert self.shards is not None
        messages, flags = self._pack(source, residuals, known)
        splits = [wire.HEADER_NBYTES + self.codec.payload_nbytes(shard.num_elements) for shard in self.shards]
        splits[self.carrier.rank] = 0
        values = alltoall(messages, splits, f"{self.name}.p1", self.carrier.process_set)
        with self.place.here():
            made: tuple[tf.Tensor, tf.Tensor, tf.Tensor] = ops.pqasgd_mean(
                flags=flags,
                received=values,
                residuals=_handles(residuals[:1]),
                mean_residuals=_handles(residuals[1:]),
                offset=offset,
                **source,
                **self.attributes,
            )
        return made

    def _pack(
        self,
        source: dict[str, Any],
        residuals: Sequence[tuple[tf.Variable, tf.Variable]],
        known: Sequence[tf.Tensor],
    ) -> tuple[tf.Tensor, tf.Tensor]:
        with self.place.here():
            packed: tuple[tf.Tensor, tf.Tensor] = ops.pqasgd_pack(
                known=list(known), residuals=_handles(residuals[:1]), **source, **self.attributes
            )
        return packed

    def send_to_all(self, message: tf.Tensor, phase: str) -> tf.Tensor:
        """Return the messages of all ranks."""
        return allgather(message, f"{self.name}.{phase}", self.carrier.process_set)

    def land(
        self,
        received: tf.Tensor,
        arriving: tf.Variable,
        offset: int,
        bases: Sequence[tf.Tensor],
        note: Callable[[Problem], None],
    ) -> tf.Tensor:
        """Write what the last phase has brought; return flags. ``note`` is told what is wrong, if anything is."""
        with on_host():
            scale = tf.convert_to_tensor(self.round.scale, tf.float32)
        with self.place.here():
            return ops.pqasgd_land(
                received=received,
                scale=scale,
                bases=list(bases),
                arriving=arriving.handle,
                offset=offset,
                explainer=register_explainer(lambda flags, data: note(self._explain(flags, data))),
                **self.attributes,
            )

    def _explain(self, flags: int, received: Bytes) -> Problem:
        size, rank = self.carrier.size, self.carrier.rank
        if self.shards is None:
            payload_nbytes = [self.codec.payload_nbytes(self.num_elements)] * size
        else:
            payload_nbytes = [self.second_codec.payload_nbytes(shard.num_elements) for shard in self.shards]
        phase = VALUES_PHASE if self.shards is None else MEANS_PHASE
        expected = own_header(received, size, rank, self.digest, self.bucket, self.num_elements, phase)
        return explain(flags, received, expected, range(size), payload_nbytes, names=self.names)


def _handles(pairs: Sequence[tuple[tf.Variable, tf.Variable]]) -> list[tf.Tensor]:
    return [variable.handle for pair in pairs[:1] for variable in pair]


class GraphChannel:
    """The exchange of one channel.

    Args:
        plan: what is exchanged.
        carrier: the ranks.
        digest: from the handshake.
        problems: where to take note of what is wrong.
        anchor: the float32 or float64 variable of ``plan.layout.num_elements`` that changes are taken from, if any.
        momentum: the float32 variable of an outer optimizer, if any: it moves as many elements from the first one.
        residuals: float32 variables as long as the vector: where ``plan.feedback`` says so what this rank has not sent
            of its own numbers, and where ``plan.feeds_back_means`` does of the means that it made.
        mean_arrives: also without ``momentum`` what arrives is the mean, and not the next anchor.
        other: a channel of the same vector, of which one or the other is exchanged in a step: it has the memory.
        place: where the numbers are; anchor, momentum and residuals are there, too.
    """

    def __init__(
        self,
        plan: ChannelPlan,
        carrier: HorovodCarrier,
        digest: int,
        problems: Problems,
        anchor: tf.Variable | None,
        momentum: tf.Variable | None = None,
        residuals: Sequence[tf.Variable] = (),
        *,
        mean_arrives: bool = False,
        other: GraphChannel | None = None,
        place: Place = ON_HOST,
    ) -> None:
        self.plan = plan
        self.place = place
        self.anchor = anchor
        self._momentum = momentum
        # With a float32 anchor what arrives is the next anchor, unless an outer optimizer is to see the mean.
        self._arrives_added = (
            anchor is not None and anchor.dtype == tf.float32 and momentum is None and not mean_arrives
        )
        self._carrier = carrier
        self._digest = digest
        self._problems = problems
        self._second_codec: Codec = plan.second_codec or plan.codec.for_means
        # Only our own ops touch it, in place, so that no round needs memory of its own.
        self.arriving: tf.Variable
        self._residuals: list[tuple[tf.Variable, tf.Variable]]
        self._of_absent: list[tuple[tf.Variable, tf.Variable]]  # made when this rank is absent for the first time
        if other is not None:
            self.arriving, self._residuals, self._of_absent = other.arriving, other._residuals, other._of_absent
            return
        self._of_absent = []
        with place.here():
            self.arriving = tf.Variable(
                tf.zeros([plan.layout.num_elements]), trainable=False, name=f"{plan.name}.arriving"
            )
            self._residuals = [
                (kept, tf.Variable(tf.zeros_like(kept), trainable=False, name=f"{plan.name}.next_residual"))
                for kept in residuals
            ]
        if place.gpu is not None:
            device = cuda.Device(place.gpu)
            device.reserve_tables(len(plan.layout.names))
            for bucket in range(len(plan.sizes)):
                self._reserve(device, bucket)

    def _reserve(self, device: cuda.Device, bucket: int) -> None:
        """Keep what memory of the device coding a bucket takes, so that no round lacks it."""
        shards = self._shards(bucket) if self.plan.method == "two_phase" else None
        self._reserve_part(device, self.plan.codec, self._second_codec, self._carrier, bucket, shards)

    def _reserve_part(
        self,
        device: cuda.Device,
        codec: Codec,
        second_codec: Codec,
        carrier: Carrier,
        bucket: int,
        shards: Sequence[Span] | None,
    ) -> None:
        # To make one reserves what it takes; ops have the same bucket in their attributes.
        native.Bucket(
            codec.native_spec,
            second_codec.native_spec,
            bucket=bucket,
            num_elements=self.plan.sizes[bucket],
            rank=carrier.rank,
            size=carrier.size,
            digest=0,
            seed=0,
            shards=None if shards is None else shard_limits(shards),
            device=device,
        )

    @property
    def residual(self) -> tuple[tf.Variable, tf.Variable] | None:
        """What was not sent of this rank's own numbers in the last round, and in the one that has landed."""
        return self._residuals[0] if self.plan.feedback else None

    def bytes_per_round(self, fragment: int | None = None) -> tuple[int, int]:
        """Return the bytes sent and received in a round of all buckets, or of one fragment."""
        plan = self.plan
        sizes = [plan.sizes[bucket] for bucket in self._buckets(fragment)]
        return bytes_of_rank(plan.method, plan.codec, plan.second_codec, sizes, self._carrier.size, self._carrier.rank)

    def node_bytes_per_round(self, fragment: int | None = None) -> tuple[int, int]:
        """Return the bytes sent and received inside the node, where they are told apart."""
        return 0, 0

    def _buckets(self, fragment: int | None) -> Sequence[int]:
        return range(len(self.plan.sizes)) if fragment is None else self.plan.fragments[fragment]

    def limits(self, fragment: int | None) -> list[int]:
        """Return where each bucket begins and ends."""
        return [self.plan.starts[bucket + end] for bucket in self._buckets(fragment) for end in (0, 1)]

    def _shards(self, bucket: int) -> list[Span]:
        alignment = shard_alignment(self.plan.codec, self._second_codec)
        return cut_shards(self.plan.sizes[bucket], self._carrier.size, alignment)

    def _own_limits(self, fragment: int | None) -> list[int]:
        """Return where this rank's shard of each bucket begins and ends."""
        limits = []
        for bucket in self._buckets(fragment):
            start, own = self.plan.starts[bucket], self._shards(bucket)[self._carrier.rank]
            limits += [start + own.start, start + own.stop]
        return limits

    def exchange(self, tensors: Sequence[tf.Tensor], round: Round, fragment: int | None = None) -> list[tf.Tensor]:
        """Exchange ``tensors``, those of the plan, or a fragment; return the flags of each bucket, landed then."""
        parts = {bucket: [tensors[i] for i in self.plan.tensors_in(bucket)] for bucket in self._buckets(fragment)}
        return [self.exchange_part(bucket, part, round) for bucket, part in parts.items()]

    def exchange_vector(self, vector: tf.Tensor, round: Round, fragment: int | None = None) -> list[tf.Tensor]:
        """Do the same with all tensors end to end."""
        return [self.exchange_part(bucket, [vector], round, first=0) for bucket in self._buckets(fragment)]

    def exchange_nothing(self, round: Round, fragment: int | None = None) -> list[tf.Tensor]:
        """Do the same with zeros, for a rank that is absent, which keeps what was not sent before."""
        if not self._of_absent:
            with outside_of_graphs(), self.place.here():  # for what expects a residual; of zeros nothing is left
                self._of_absent += [
                    tuple(tf.Variable(tf.zeros_like(kept), trainable=False) for _ in range(2))
                    for kept, _ in self._residuals[: self._num_own]
                ]
        residuals = [*self._of_absent, *self._residuals[self._num_own :]]
        flags = []
        for bucket in self._buckets(fragment):
            with self.place.here():
                zeros = tf.zeros([self.plan.sizes[bucket]])
            source = {"tensors": [zeros], "anchors": [], "start": 0, "anchor_offset": self.plan.starts[bucket]}
            flags.append(self.exchange_bucket(bucket, source, residuals, round))
        return flags

    @property
    def _num_own(self) -> int:
        """How many of the residuals are about this rank's own numbers, and stay as they are where it is absent."""
        return 1

    def exchange_part(
        self, bucket: int, tensors: Sequence[tf.Tensor], round: Round, first: int | None = None
    ) -> tf.Tensor:
        """Exchange one bucket, to which ``tensors`` belong, wholly or in part; return its flags.

        ``first`` is where they begin in the vector: None, where the bucket's first tensor does.
        """
        return self.exchange_bucket(bucket, self._source(bucket, tensors, first), self._residuals, round)

    def exchange_bucket(
        self,
        bucket: int,
        source: dict[str, Any],
        residuals: Sequence[tuple[tf.Variable, tf.Variable]],
        round: Round,
    ) -> tf.Tensor:
        """Exchange one bucket, whose numbers are in ``source``; return its flags."""
        plan = self.plan
        messages = Messages(
            f"{plan.name}.b{bucket}", plan.codec, self._second_codec, self._carrier, bucket, plan.sizes[bucket],
            self._digest, plan.seed, round, self._shards(bucket) if plan.method == "two_phase" else None,
            place=self.place,
        )  # fmt: skip
        start = plan.starts[bucket]
        received = messages.exchange(source, residuals, start)
        return messages.land(received, self.arriving, start, self._base(), self._problems.note)

    def _source(self, bucket: int, tensors: Sequence[tf.Tensor], first: int | None) -> dict[str, Any]:
        """Return the inputs and attributes that say where the numbers of a bucket are."""
        if first is None:
            first = self.plan.layout.offsets[self.plan.tensors_in(bucket).start]
        return {
            "tensors": list(tensors),
            "anchors": [] if self.anchor is None else [self.anchor.value()],
            "start": self.plan.starts[bucket] - first,
            "anchor_offset": first,
        }

    def _base(self) -> list[tf.Tensor]:
        return [self.anchor.value()] if self.anchor is not None and self._arrives_added else []

    def distance(self, tensors: Sequence[tf.Tensor], num_elements: int, fragment: int | None = None) -> tf.Tensor:
        """Return the squared distance of the first ``num_elements`` from the mean; after the verdict, before commit."""
        spans = self.limits(fragment)
        with self.place.here():
            return ops.pqasgd_distance(
                arriving=self.arriving.handle,
                tensors=list(tensors),
                anchors=[] if self.anchor is None or self._arrives_added else [self.anchor.value()],
                spans=[min(limit, num_elements) for limit in spans],
            )

    def keep_residuals(self, flags: Sequence[tf.Tensor], fragment: int | None = None, *, absent: bool = False) -> None:
        """Keep what was not sent of the buckets that have a mean; ``flags`` are those of :meth:`exchange`.

        Of an ``absent`` rank, those of :meth:`exchange_nothing`.
        """
        if not flags:
            return
        pairs = list(zip(self._residuals, self._kept_limits(fragment), strict=False))
        for (kept, following), limits in pairs[self._num_own if absent else 0 :]:
            with self.place.here():
                ops.pqasgd_keep(kept=kept.handle, next=following.handle, flags=flags, limits=limits)

    def _kept_limits(self, fragment: int | None) -> tuple[list[int], ...]:
        # Of means a rank codes those of its own shards only; what is elsewhere in these variables means nothing.
        return self.limits(fragment), self._own_limits(fragment)

    def commit(
        self,
        variables: Sequence[tf.Variable],
        coefficients: tf.Tensor | None = None,
        fragment: int | None = None,
    ) -> None:
        """Let what has arrived be the anchor, or move it, and let the variables be the anchor; after the verdict."""
        spans = self.limits(fragment)
        if not spans:
            return
        with self.place.here():
            if self._momentum is not None:
                ops.pqasgd_outer(
                    arriving=self.arriving.handle,
                    momentum=self._momentum.handle,
                    coefficients=coefficients,
                    spans=spans,
                )
            results = ops.pqasgd_commit(
                spans=[] if fragment is None else spans,
                arriving=self.arriving.handle,
                anchors=[] if self.anchor is None else [self.anchor.handle],
                add=self.anchor is not None and not self._arrives_added,
                **self._targets(variables),
            )
        self._assign(variables, results)

    def _targets(self, variables: Sequence[tf.Variable]) -> dict[str, Any]:
        """Return the inputs of an op that writes variables; what it returns is for :meth:`_assign`."""
        if self.place.reaches_model:
            return {"variables": [variable.handle for variable in variables], "tensors": []}
        return {"variables": [], "tensors": [variable.value() for variable in variables]}

    def _assign(self, variables: Sequence[tf.Variable], results: Any) -> None:
        if variables and not self.place.reaches_model:
            for variable, result in zip(variables, results, strict=True):
                variable.assign(result)

    def take_snapshot(
        self, snapshot: tf.Variable, tensors: Sequence[tf.Tensor], fragment: int | None = None
    ) -> tf.Operation | None:
        """Copy tensors, or a fragment of them, end to end; return the op, if anything is copied."""
        spans = self.limits(fragment)
        if not spans:
            return None
        with self.place.here():
            return ops.pqasgd_snapshot(snapshot=snapshot.handle, tensors=list(tensors), spans=spans)

    def commit_since(
        self,
        snapshot: tf.Variable,
        variables: Sequence[tf.Variable],
        num_parameters: int,
        coefficients: tf.Tensor | None = None,
        fragment: int | None = None,
    ) -> None:
        """Let what has arrived be the anchor, or move it, and move the variables from the snapshot to it.

        Those after the first ``num_parameters`` elements, buffers, become the anchor.
        """
        self.commit([], coefficients, fragment)
        assert self.anchor is not None
        if self.limits(fragment):
            with self.place.here():
                results = ops.pqasgd_rebase(
                    anchor=self.anchor.handle,
                    snapshot=snapshot.handle,
                    num_parameters=num_parameters,
                    spans=self.limits(fragment),
                    **self._targets(variables),
                )
            self._assign(variables, results)

    def means(self, tensors: Sequence[tf.Tensor], factor: float) -> list[tf.Tensor]:
        """Return the means times ``factor``, as tensors like ``tensors``; after the verdict."""
        with self.place.here():
            return list(ops.pqasgd_scatter(arriving=self.arriving.handle, tensors=list(tensors), factor=factor))


def own_header(
    received: Bytes, size: int, rank: int, digest: int, bucket: int, num_elements: int, phase: int
) -> wire.Header:
    """Return what this rank's header says; step and round are those of its message, which has come back."""
    own = next((header for header in _headers_of(received, size) if header.rank == rank), None)
    step, round_ = (own.step, own.round) if own else (0, 0)
    return wire.Header(0, digest, round_, step, bucket, rank, 0, num_elements, phase)


def _headers_of(received: Bytes, size: int) -> list[wire.Header]:
    """Return the headers of the messages of all ranks, or none if these cannot be read."""
    try:
        return [message.header for message in wire.split_messages(received, range(size))]
    except WireFormatError:
        return []


def signed(number: int) -> int:
    """Return the 64 bits of ``number`` as attributes hold them."""
    return number - 2**64 if number >= 2**63 else number
