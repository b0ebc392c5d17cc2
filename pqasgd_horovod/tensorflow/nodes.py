"""Between nodes coded numbers, inside a node plain ones: :mod:`pqasgd_horovod.exchange.node` as a graph."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from ..codecs.cast import NoCompression
from ..exchange.carriers.nodes import NodesCarrier
from ..exchange.layout import Span, cut_shards, shard_alignment
from ..exchange.plan import bytes_inside_node, bytes_of_rank
from ..exchange.verdict import FLAGGED, Names, Problem
from ..native import cuda
from .carrier import HorovodCarrier
from .graph import GraphChannel, Messages, Round
from .library import ops

logger = logging.getLogger("pqasgd_horovod")


class NodeChannel(GraphChannel):
    """The exchange of a channel whose carrier knows nodes, ``carrier.nodes``.

    Where something is wrong, all ranks raise that it is; the owner of the bucket, which knows on which node, logs that.
    """

    @property
    def _nodes(self) -> NodesCarrier:
        assert self._carrier.nodes is not None
        return self._carrier.nodes

    def _owned(self, bucket: int) -> int | None:
        """Return the number of a bucket among those that are exchanged by this rank, if it is one."""
        local = self._nodes.local
        return bucket // local.size if bucket % local.size == local.rank else None

    def _cut(self, bucket: int) -> list[Span]:
        """Return which part of a bucket each rank of the node owns: one of them all of it."""
        size, num_elements = self._nodes.local.size, self.plan.sizes[bucket]
        owner = bucket % size
        return [
            Span(0 if rank <= owner else num_elements, num_elements if rank == owner else 0) for rank in range(size)
        ]

    def _shards(self, bucket: int) -> list[Span]:
        # Of the mean of a node, among the owners.
        alignment = shard_alignment(self.plan.codec, self._second_codec)
        return cut_shards(self.plan.sizes[bucket], self._nodes.across.size, alignment)

    def _own_limits(self, fragment: int | None) -> list[int]:
        limits = []
        for bucket in self._buckets(fragment):
            start, own = self.plan.starts[bucket], self._shards(bucket)[self._nodes.across.rank]
            is_owned = self._owned(bucket) is not None
            limits += [start + own.start, start + (own.stop if is_owned else own.start)]
        return limits

    def _reserve(self, device: cuda.Device, bucket: int) -> None:
        plain, nodes = NoCompression(), self._nodes
        self._reserve_part(device, plain, plain, nodes.local, bucket, self._cut(bucket))
        if self._owned(bucket) is not None:
            shards = self._shards(bucket) if self.plan.method == "two_phase" else None
            self._reserve_part(device, self.plan.codec, self._second_codec, nodes.across, bucket, shards)

    def bytes_per_round(self, fragment: int | None = None) -> tuple[int, int]:
        """Return the bytes sent to and received from other nodes."""
        plan, across = self.plan, self._nodes.across
        sizes = [plan.sizes[bucket] for bucket in self._buckets(fragment) if self._owned(bucket) is not None]
        return bytes_of_rank(plan.method, plan.codec, plan.second_codec, sizes, across.size, across.rank)

    def node_bytes_per_round(self, fragment: int | None = None) -> tuple[int, int]:
        """Return the bytes sent and received inside the node."""
        local, sizes = self._nodes.local, self.plan.sizes
        total = sum(bytes_inside_node(b, sizes[b], local.size, local.rank) for b in self._buckets(fragment))
        return total, total

    @property
    def _num_own(self) -> int:
        return 0  # they are the node's, and go on

    def exchange_bucket(
        self,
        bucket: int,
        source: dict[str, Any],
        residuals: Sequence[tuple[tf.Variable, tf.Variable]],
        round: Round,
    ) -> tf.Tensor:
        """Exchange one bucket, whose numbers are in ``source``; return its flags."""
        plan, nodes, start = self.plan, self._nodes, self.plan.starts[bucket]
        common: dict[str, Any] = {
            "num_elements": plan.sizes[bucket],
            "digest": self._digest,
            "place": self.place,
        }
        plain, local, across = NoCompression(), _carrier_of(nodes.local), _carrier_of(nodes.across)
        cut = self._cut(bucket)
        inside = Messages(
            f"{plan.name}.node.b{bucket}",
            plain,
            plain,
            local,
            bucket,
            seed=plan.seed,
            shards=cut,
            round=round,
            **common,
        )
        message, flags, mean = inside.mean(source, [], start)
        owned = self._owned(bucket)
        if owned is not None and across.size > 1:
            between = Messages(
                f"{plan.name}.across.b{owned}", plan.codec, self._second_codec, across, owned,
                # Their buckets begin at 0 on every rank of a node: another seed keeps the rounding noise apart.
                seed=(plan.seed + (local.rank << 32)) % 2**64,
                shards=self._shards(bucket) if plan.method == "two_phase" else None,
                round=round._replace(scale=1.0),
                names=Names(nodes.across_ranks, range(local.rank, len(plan.sizes), local.size), of_nodes=True),
                **common,
            )  # fmt: skip
            # What was not sent before joins the node's mean, not this rank's numbers.
            of_node = {"tensors": [mean], "anchors": [], "start": 0, "anchor_offset": start}
            received = between.exchange(of_node, residuals, start, [flags])
            verdict = between.land(received, self.arriving, start, [], _log)
            with self.place.here():
                message = ops.pqasgd_relay(
                    flags=verdict, arriving=self.arriving.handle, offset=start, **inside.attributes
                )
        received = inside.send_to_all(message, "p2")
        return inside.land(received, self.arriving, start, self._base(), self._note)

    def _note(self, problem: Problem) -> None:
        """Take note of what all nodes know; inside a node ranks know more, but not the same."""
        text = next((text for _, kind, text in FLAGGED if kind is problem.kind), problem.text)
        self._problems.note(problem._replace(text=f"a node {text} in bucket {problem.bucket}", cause=None))


def _carrier_of(carrier: Any) -> HorovodCarrier:
    assert isinstance(carrier, HorovodCarrier)
    return carrier


def _log(problem: Problem) -> None:
    logger.error("%s", problem.text)
