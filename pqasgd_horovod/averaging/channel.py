"""One flat vector and the exchange that averages it."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from .. import native
from ..codecs.base import FLOAT32, Codec
from ..codecs.low_rank import PowerSgd
from ..errors import MismatchError, NonFiniteError, WireFormatError
from ..exchange import Exchange, LowRankExchange, make_exchange
from ..exchange.carriers import Carrier
from ..exchange.carriers.nodes import NodesCarrier
from ..exchange.handshake import verify_same
from ..exchange.layout import join_tensors, shard_alignment
from ..exchange.plan import bytes_per_round, choose_exchange, num_parts
from .config import AS_IT_IS, ExchangeConfig, Way
from .feedback import MomentumCorrection, Residuals, Velocities
from .outer import Coefficients
from .selection import All, Selection
from .state import Arrays, no_arrays
from .statistics import ring_allreduce_nbytes
from .strategy import PeriodicAveraging
from .vector import AnchorArray, ArrayView, FlatLayout, FlatVector, TensorSpec, anchor_dtype

if TYPE_CHECKING:
    from ..native.cuda import Device

logger = logging.getLogger("pqasgd_horovod")

_ZEROS = 1 << 20  # so many are kept, and stand for as many as there are

Spec = TypeVar("Spec", bound=TensorSpec)


@dataclasses.dataclass(frozen=True)
class ChannelPlan:
    """What a channel is, on every rank and in every framework alike: a flat vector, cut into buckets, and its codec."""

    layout: FlatLayout
    codec: Codec
    second_codec: Codec | None
    method: str  # "allgather" or "two_phase"
    seed: int
    name: str
    starts: tuple[int, ...]  # where buckets begin, and where the last one ends
    feedback: bool = False  # whether what is not sent is kept for the next round
    correction: MomentumCorrection | None = None  # whether the velocity of gradients is sent in their place
    masks: bool = False  # whether the velocity of what was sent is cleared
    fragments: tuple[tuple[int, ...], ...] = ()  # the buckets of each; none: all buckets are one
    low_rank: PowerSgd | None = None  # then tensors are matrices, and their factors are what the codec codes

    @property
    def feeds_back_means(self) -> bool:
        """Whether the owner of a shard, too, keeps what it did not send of its mean."""
        return self.feedback and self.method == "two_phase" and not (self.second_codec or self.codec.for_means).lossless

    @property
    def sizes(self) -> list[int]:
        """Elements of each bucket."""
        return [stop - start for start, stop in itertools.pairwise(self.starts)]

    def tensors_in(self, bucket: int) -> range:
        """Return the indices of the tensors that lie in a bucket, wholly or in part."""
        return self.layout.tensors_in(self.starts[bucket], self.starts[bucket + 1])

    def matrices_in(self, bucket: int) -> list[tuple[int, int]]:
        """Return these tensors as matrices."""
        return [self.layout.matrices[i] for i in self.tensors_in(bucket)]

    @property
    def messages(self) -> list[int]:
        """Elements of each vector that is averaged."""
        if self.low_rank is None:
            return self.sizes
        factors = [self.low_rank.factor_sizes(matrix) for matrix in self.layout.matrices]
        buckets = [self.tensors_in(bucket) for bucket in range(len(self.sizes))]
        return [sum(factors[i][side] for i in bucket) for bucket in buckets for side in (0, 1)]

    def make_exchange(
        self,
        carrier: Carrier,
        config: ExchangeConfig,
        digest: int,
        device: Device | None = None,
        device_messages: bool = False,
    ) -> Exchange:
        """Return what brings the means, of numbers of ``device`` if there is one."""
        options: dict[str, Any] = {
            "name": self.name,
            "seed": self.seed,
            "digest": digest,
            "method": self.method,
            "nonfinite": config.nonfinite,
        }
        if self.low_rank is not None:  # whose factors are made on CPUs
            matrices = [self.matrices_in(bucket) for bucket in range(len(self.sizes))]
            return LowRankExchange(self.low_rank.approximation_rank, carrier, matrices, **options)
        return make_exchange(
            self.codec,
            carrier,
            self.sizes,
            second_codec=self.second_codec,
            feedback=self.feeds_back_means,
            device=device,
            device_messages=device_messages,
            **options,
        )


def plan_channel(
    layout: FlatLayout,
    config: ExchangeConfig,
    way: Way,
    *,
    name: str,
    index: int,
    size: int,
    selection: Selection | None = None,
) -> ChannelPlan:
    """Return the plan of channel ``index`` of the optimizer ``name`` on ``size`` ranks; no selection: all of it."""
    selection = selection or All()
    codec, second_codec = way.codec.message_codec, way.second_codec
    low_rank = way.codec if isinstance(way.codec, PowerSgd) else None
    if low_rank is None:
        alignment = shard_alignment(codec, second_codec or codec.for_means)
        buckets = selection.cut(layout.num_elements, alignment, config.bucket_cap_bytes)
    else:
        buckets = [(elements, 0) for elements in join_tensors(layout.sizes(), config.bucket_cap_bytes)]
    correction = config.correction
    masks = correction is not None and correction.masks(way.codec)
    plan = ChannelPlan(
        layout=layout,
        codec=codec,
        second_codec=second_codec,
        method="allgather" if way.method == "auto" and masks else way.method,
        # Bucket numbers begin at 0 in every channel: another seed keeps the rounding noise of channels apart.
        seed=(config.seed + index) % 2**64,
        name=f"{name}.{index}",
        starts=tuple(itertools.accumulate((elements for elements, _ in buckets), initial=0)),
        fragments=tuple(
            tuple(bucket for bucket, (_, of) in enumerate(buckets) if of == fragment)
            for fragment in range(selection.num_fragments)
        ),
        feedback=config.feedback is not None and not way.codec.lossless,
        correction=correction,
        masks=masks and size > 1,  # one rank alone sends everything
        low_rank=low_rank,
    )
    if plan.method == "auto":
        plan = dataclasses.replace(plan, method=choose_exchange(codec, second_codec, plan.messages, size))
    return plan


def warn_of_size(plans: Sequence[ChannelPlan], carrier: Carrier, averaging: PeriodicAveraging) -> None:
    """Say so, on one rank, if the first rounds send more than Horovod's allreduce in fp16 would in as many steps."""
    size = num_parts(carrier)
    nbytes = sum(bytes_per_round(plan.method, plan.codec, plan.second_codec, plan.messages, size) for plan in plans)
    steps = int(averaging.schedule.next_period(0, False)) * averaging.selection.num_fragments
    of_fp16 = steps * ring_allreduce_nbytes(sum(plan.layout.num_elements for plan in plans), size, itemsize=2)
    if carrier.rank == 0 and nbytes > 1.05 * of_fp16:
        logger.warning(
            "%d step(s) send %.3g MB from each of %d ranks: more than the %.3g MB of Horovod with Compression.fp16. "
            "Use fewer bits, a longer period, or exchange='two_phase', whose bytes do not grow with the ranks",
            steps,
            nbytes / 1e6,
            size,
            of_fp16 / 1e6,
        )


class Channel:
    """A flat vector, its buckets, its anchor if it has one, and the exchange that brings the mean."""

    def __init__(
        self,
        vector: FlatVector,
        plan: ChannelPlan,
        anchor: AnchorArray | None,
        *,
        carrier: Carrier,
        config: ExchangeConfig,
        digest: int,
        device_messages: bool = False,
    ) -> None:
        self.vector = vector
        device = vector.device
        self.starts = plan.starts
        self.fragments = plan.fragments
        self.tensors_in = plan.tensors_in
        self.anchor = anchor
        self.outer_elements = 0
        """How many elements, from the first one, an outer optimizer moves."""
        self.momentum: NDArray[np.float32] = native.zeros(0)
        """The outer optimizer's, of ``outer_elements``, if it is held here."""
        # With a float32 anchor what arrives is the next anchor, anchor + mean, and the two arrays change places: one
        # walk over memory less, and an error leaves the anchor as it was.
        self._arriving: NDArray[np.float32] = native.zeros(vector.num_elements, device=device)
        self._coder = None if plan.low_rank is not None else device
        """What codes the numbers, None for CPUs; if it is not what they are on, it codes copies of them."""
        self._copy: NDArray[np.float32] | None = None
        if device is not None and self._coder is None:
            logger.info("%s: the factors of tensors on %s are made on the CPU", plan.name, device)
            if plan.correction is None:  # else it is the velocity that is coded
                self._copy = device.host_messages_memory(4 * vector.num_elements).view(np.float32)
        self._residuals = Residuals(vector.num_elements, self._coder) if plan.feedback else None
        self._needs_residuals = plan.low_rank is not None
        self._zeros: NDArray[np.float32] = native.zeros(min(vector.num_elements, _ZEROS), device=self._coder)
        self._is_of_node = isinstance(carrier, NodesCarrier)  # then the residual is too
        self._snapshot: AnchorArray | None = None
        self._feeds_back_means = plan.feeds_back_means
        self.velocities = (
            None if plan.correction is None else Velocities(vector.num_elements, plan.correction, plan.masks, device)
        )
        """With momentum correction; their ``clipping`` is set by whoever knows all channels."""
        self.exchange = plan.make_exchange(carrier, config, digest, device, device_messages)

    @property
    def num_buckets(self) -> int:
        """Number of buckets."""
        return len(self.starts) - 1

    @property
    def means(self) -> list[NDArray[np.float32]]:
        """What :meth:`Exchange.finish` writes, bucket by bucket."""
        return [self._arriving[start:stop] for start, stop in itertools.pairwise(self.starts)]

    @property
    def _float_anchor(self) -> NDArray[np.float32] | None:
        if self.anchor is None or self.anchor.dtype != np.float32:
            return None
        return cast("NDArray[np.float32]", self.anchor)

    def source(self) -> native.Source:
        """Return the vector as it is in memory now, minus the anchor, plus what was not sent before."""
        return self.vector.source(self.anchor, self._residuals)

    def coded(self, source: native.Source) -> native.Source:
        """Return what is coded of :meth:`source`: itself, or a copy of it as it is now where its coder is."""
        if self._copy is None:
            return source
        native.gather(source.without_residual(), 0, self._copy)
        return FlatVector([ArrayView("copy", self._copy)]).source(residuals=self._residuals)

    def nothing(self) -> native.Source:
        """Return zeros in place of :meth:`coded`, for a rank that is absent, which keeps what was not sent before."""
        count = self.vector.num_elements
        residuals = self._residuals if self._is_of_node else None
        if residuals is None and self._needs_residuals:
            residuals = Residuals(count)  # of zeros nothing is left
        segments = [
            (self._zeros.ctypes.data, native.DTYPE_F32, min(_ZEROS, count - start)) for start in range(0, count, _ZEROS)
        ]
        pointers = None if residuals is None else residuals.pointers()
        return native.Source(segments, None, (self._zeros, residuals), pointers, self._coder)

    def reserve(self, snapshots: bool = False, distances: bool = False) -> None:
        """Keep memory for what will be asked for, so that no round lacks it."""
        device = self.vector.device
        if device is not None:
            # Of tensors, and of zeros in their place.
            device.reserve_tables(max(len(self.vector.tensors), self.vector.num_elements // _ZEROS + 1))
        if snapshots:
            assert self.anchor is not None
            self._snapshot = native.zeros(self.anchor.size, self.anchor.dtype, device)
        if distances and device is not None:
            device.scratch(self.vector.num_elements)

    def take_snapshot(self, fragment: int | None = None) -> native.Source:
        """Copy the vector, or a fragment of it, and return the copy as :meth:`coded` would the vector."""
        assert self._snapshot is not None
        tensors = self.vector.source()
        for span in self._spans(self._buckets_of(fragment)):
            native.gather(tensors, span.start, self._snapshot[span])
        copy = ArrayView("snapshot", self._snapshot, self._coder)
        return FlatVector([copy]).source(self.anchor, self._residuals)

    def since_snapshot(self) -> native.Source:
        """Return the vector as it is in memory now, minus the snapshot."""
        return self.vector.source(self._snapshot)

    def _buckets_of(self, fragment: int | None) -> Sequence[int]:
        return range(self.num_buckets) if fragment is None else self.fragments[fragment]

    def begin(self, source: native.Source, step: int, round: int, fragment: int | None = None) -> None:
        """Encode every bucket of :meth:`coded`, or of one fragment of it, and launch its exchange."""
        anchor = None if self.outer_elements else self._float_anchor
        for bucket in self._buckets_of(fragment):
            start, stop = self.starts[bucket], self.starts[bucket + 1]
            base = None if anchor is None else anchor[start:stop]
            self.exchange.begin(bucket, source, start, step=step, round=round, base=base)
            self.exchange.advance()

    def begin_bucket(self, bucket: int, step: int, round: int) -> None:
        """Encode one bucket and launch its exchange; there is no anchor, and only its own tensors need to be there."""
        tensors = self.tensors_in(bucket)
        start = self.starts[bucket] - self.vector.offsets[tensors.start]
        span = slice(self.starts[bucket], self.starts[bucket + 1])
        if self.velocities is not None:
            self.velocities.advance(self.vector.source(part=tensors), start, span)
            source, start = self.velocities.source(self._residuals, self._coder), span.start
        elif self._copy is not None:
            native.gather(self.vector.source(part=tensors), start, self._copy[span])
            source, start = FlatVector([ArrayView("copy", self._copy)]).source(residuals=self._residuals), span.start
        else:
            source = self.vector.source(residuals=self._residuals, part=tensors)
        self.exchange.begin(bucket, source, start, step=step, round=round)
        self.exchange.advance()

    def move_by_outer(self, num_elements: int, holds_momentum: bool) -> None:
        """Let an outer optimizer move the first ``num_elements``; what arrives is then the mean, not the anchor."""
        self.outer_elements = num_elements
        self.momentum = native.zeros(num_elements if holds_momentum else 0, device=self.vector.device)

    def anchors_and_means(self) -> dict[str, tuple[AnchorArray, NDArray[np.float32]]]:
        """Return anchor and mean, as they lie in memory, of each tensor that an outer optimizer moves; before apply."""
        assert self.anchor is not None
        moved = self.vector.tensors_in(0, self.outer_elements)
        spans = {self.vector.names[i]: self.vector.span(i) for i in moved}
        return {name: (self.anchor[span], self._arriving[span]) for name, span in spans.items()}

    def distance(self, num_elements: int) -> float:
        """Return the squared distance of the first ``num_elements`` from the mean that has arrived; before apply."""
        source = self.vector.source(self.anchor)
        if self._float_anchor is not None and not self.outer_elements:
            source = source.without_anchor()
        total = 0.0
        for span in self._spans(self.exchange.finished):
            center = self._arriving[span.start : min(span.stop, num_elements)]
            total += native.distance(source, span.start, center)
        return total

    def squared_norm(self) -> float:
        """Return the sum of squares of the vector as it is in memory now."""
        source = self.vector.source()
        origin = np.zeros(max(self.exchange.buckets), np.float32)
        return sum(
            native.distance(source, start, origin[:size])
            for start, size in zip(self.starts, self.exchange.buckets, strict=False)
        )

    def apply(self, target: native.Source, outer: Coefficients | None = None, absent: bool = False) -> None:
        """Add the mean to the anchor and copy that to the tensors; without an anchor copy the mean.

        Of the buckets of the last round, in which an ``absent`` rank has sent :meth:`nothing`.
        """
        self._keep_state(absent)
        anchor = self._float_anchor
        arrives_added = anchor is not None and not self.outer_elements
        if arrives_added and len(self.exchange.finished) == self.num_buckets:
            assert anchor is not None
            native.apply(self._arriving, 0, target.without_anchor())
            self.anchor, self._arriving = self._arriving, anchor
            return
        for span in self._spans(self.exchange.finished):
            self._step_outer(span, outer)
            if arrives_added:
                assert anchor is not None
                anchor[span] = self._arriving[span]
                native.apply(self._arriving[span], span.start, target.without_anchor())
            else:
                native.apply(self._arriving[span], span.start, target)

    def apply_since(self, target: native.Source, outer: Coefficients | None, num_parameters: int) -> None:
        """Add the mean to the anchor, and the anchor to what :meth:`since_snapshot` gives.

        That is for parameters, the first elements; buffers, which follow them, become the anchor.
        """
        self._keep_state()
        anchor, spans = self.anchor, self._spans(self.exchange.finished)
        assert anchor is not None
        assert self._snapshot is not None
        if self._float_anchor is None or self.outer_elements:
            for span in spans:
                self._step_outer(span, outer)
                anchor[span] += self._arriving[span]
        elif len(self.exchange.finished) == self.num_buckets:
            self.anchor, self._arriving = self._arriving, self._float_anchor
        else:
            for span in spans:
                anchor[span] = self._arriving[span]
        assert self.anchor is not None
        tensors = self.vector.source()
        for span in spans:
            buffers = slice(max(span.start, num_parameters), span.stop)
            if buffers.start < buffers.stop:
                native.gather(tensors, buffers.start, self._snapshot[buffers])
            native.rebase(self.anchor[span], span.start, target)

    def _step_outer(self, span: slice, outer: Coefficients | None) -> None:
        if outer is not None and self.outer_elements:
            moved = slice(span.start, min(span.stop, self.outer_elements))
            native.outer(*outer, self.momentum[moved], self._arriving[moved], self.vector.device)

    def _spans(self, buckets: Iterable[int]) -> list[slice]:
        """Return where buckets lie, neighbours together."""
        spans: list[slice] = []
        for bucket in sorted(buckets):
            start, stop = self.starts[bucket], self.starts[bucket + 1]
            if spans and spans[-1].stop == start:
                spans[-1] = slice(spans[-1].start, stop)
            else:
                spans.append(slice(start, stop))
        return spans

    def _keep_state(self, absent: bool = False) -> None:
        keeps = not absent or self._is_of_node
        if self.velocities is not None and keeps:
            self.velocities.keep(self.starts, self.exchange.averaged, self._residuals)
        if self._residuals is not None and keeps:
            self._residuals.keep(self.starts, self.exchange.averaged)
        self.exchange.commit()

    def _mean_residual(self) -> FLOAT32:
        """Return what this rank has not sent yet of the means that it made; 0 outside of the shards that it owns."""
        means = np.zeros(self.vector.num_elements, np.float32)
        for bucket, start in enumerate(self.starts[:-1]):
            residual = self.exchange.mean_residual(bucket)
            if residual is not None:
                span, numbers = residual
                means[start + span.start : start + span.stop] = numbers
        return means

    def arrays(self) -> Arrays:
        """Return what is saved, by tensor name."""
        vectors: dict[str, AnchorArray] = {}  # each as long as the vector, or the beginning of it
        if self.anchor is not None:
            vectors["anchor"] = self.anchor
        if self.momentum.size:
            vectors["momentum"] = self.momentum
        if self._residuals is not None:
            vectors["residual"] = self._residuals.kept
        if self._feeds_back_means:
            vectors["mean_residual"] = self._mean_residual()
        if self.velocities is not None:
            vectors["velocity"] = self.velocities.kept
        names = list(enumerate(self.vector.names))
        found = no_arrays()
        found |= {kind: {name: flat[self.vector.span(i)] for i, name in names} for kind, flat in vectors.items()}
        if isinstance(self.exchange, LowRankExchange):
            found["factor"] = {name: self.exchange.start(i) for i, name in names}
        return found

    def restore(self, arrays: Arrays) -> None:
        """Take over what :meth:`arrays` gave, but for anchors and momentum; what is not there is left as it is new.

        Raises ArgumentError for a factor of another size.
        """
        self._restore_residuals(arrays)
        if isinstance(self.exchange, LowRankExchange):
            self.exchange.restore([arrays["factor"].get(name) for name in self.vector.names])

    def _restore_residuals(self, arrays: Arrays) -> None:
        """Take over residuals, also where shards were cut in another way.

        What belongs to the mean of a shard that is another rank's now goes into the mean by way of this rank's own
        residual, of which the mean takes one part in as many as there are ranks.
        """
        if self.velocities is not None:
            for i, name in enumerate(self.vector.names):
                self.velocities.kept[self.vector.span(i)] = arrays["velocity"].get(name, 0.0)
        if self._residuals is None:
            return
        own, means = (np.zeros(self.vector.num_elements, np.float32) for _ in range(2))
        for i, name in enumerate(self.vector.names):
            for kind, flat in (("residual", own), ("mean_residual", means)):
                if name in arrays[kind]:
                    flat[self.vector.span(i)] = arrays[kind][name]
        for bucket, start in enumerate(self.starts[:-1]):
            residual = self.exchange.mean_residual(bucket)
            if residual is not None:
                span, numbers = residual
                place = slice(start + span.start, start + span.stop)
                numbers[:] = means[place]
                means[place] = 0
        self._residuals.kept[:] = own + np.float32(self.exchange.num_parts) * means


def group_tensors(
    parameters: Sequence[Spec], buffers: Sequence[Spec], config: ExchangeConfig
) -> list[tuple[list[Spec], np.dtype, Way]]:
    """Return the channels of what is averaged with an anchor, in the order of their numbers; none is empty.

    Of each: its tensors, the type of their anchor, and how they travel. Buffers follow the parameters that travel as
    they are.
    """
    groups: list[tuple[list[Spec], np.dtype, Way]] = []
    for dtype in (np.dtype(np.float32), np.dtype(np.float64)):
        members = dict(config.by_way([p for p in parameters if anchor_dtype(p) == dtype]))
        of_buffers = [buffer for buffer in buffers if anchor_dtype(buffer) == dtype]
        if of_buffers:
            members[AS_IT_IS] = members.get(AS_IT_IS, []) + of_buffers
        groups += [(tensors, dtype, way) for way, tensors in members.items()]
    return groups


def digest_arrays(arrays: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """Return a digest of each array."""
    return {name: hashlib.sha256(values.tobytes()).hexdigest()[:16] for name, values in arrays.items()}


def digest_tensors(vector: FlatVector, values: AnchorArray) -> dict[str, str]:
    """Return a digest of each tensor's part of ``values``, by name."""
    return digest_arrays({tensor.name: values[vector.span(i)] for i, tensor in enumerate(vector.tensors)})


class ChannelSet:
    """The channels of one optimizer, and what all channels that it ever had have sent."""

    def __init__(self) -> None:
        self._channels: Sequence[Channel] = ()
        self._earlier_bytes: tuple[int, ...] = (0, 0, 0, 0)

    def __iter__(self) -> Iterator[Channel]:
        return iter(self._channels)

    def replace(self, channels: Sequence[Channel]) -> None:
        """Use other channels from now on."""
        self._earlier_bytes = self.byte_counts()
        self._channels = channels

    def byte_counts(self) -> tuple[int, ...]:
        """Return the bytes sent and received so far, and those inside the node, where they are told apart."""
        counts = [(*channel.exchange.network_bytes, *channel.exchange.node_bytes) for channel in self._channels]
        return tuple(map(sum, zip(self._earlier_bytes, *counts, strict=True)))

    def arrays(self, skipped: frozenset[str] = frozenset()) -> Arrays:
        """Return what is saved of all channels, by tensor name, without the tensors ``skipped``."""
        found = no_arrays()
        for channel in self._channels:
            for kind, named in channel.arrays().items():
                found[kind].update({name: values for name, values in named.items() if name not in skipped})
        return found

    def finish(self, scale: float = 1.0) -> None:
        """Wait for all means, each times ``scale``.

        If one channel fails the others are still waited for, so that the next round can work; the first error is raised
        then.
        """
        errors: list[Exception] = []
        for channel in self._channels:
            try:
                channel.exchange.finish(channel.means, scale=scale)
            except (NonFiniteError, MismatchError, WireFormatError) as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def verify_replicas(self, carrier: Carrier, name: str, what: str, anchors: bool = False) -> None:
        """Raise MismatchError on every rank unless every tensor has the same bits on all ranks; collective.

        Or only its anchor, where the tensors themselves are local.
        """
        digests: dict[str, str] = {}
        for channel in self._channels:
            values = channel.vector.gather(np.dtype(np.float64)) if not anchors else channel.anchor
            assert values is not None
            digests.update(digest_tensors(channel.vector, values))
        try:
            verify_same(carrier, {what: digests}, f"{name}.consistency")
        except MismatchError as error:
            raise MismatchError(f"replicas differ after an average, which must not happen: {error}") from None
