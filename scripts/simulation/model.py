r"""A cost model of averages: what they ask of a rank, and how long that takes.

An average is work (:class:`Work`): collectives, hops of messages that follow each other, bytes, and elements that are
coded, decoded and walked over. What each of these costs (:class:`Costs`) is fitted to measured averages
(:func:`fit`). Bytes are not fitted: they are what the package's own plan says.

    seconds = collectives x collective + hops x hop x k + sent + coded - overlap (1 - 1 / buckets) min(sent, coded)
    sent    = max(8 bytes / (efficiency x rate), copied x copy x k)
    coded   = (halves x half + walked x walk + encoded x encode + decoded x decode) x k

with the contention k = max(1, ranks / cores): ranks that share the cores of one machine, as in the calibration, wait
for them; on a cluster where each has its own k is 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from hosts import BURST_BYTES

from pqasgd_horovod import codecs, native
from pqasgd_horovod.averaging import ExchangeConfig
from pqasgd_horovod.averaging.channel import ChannelPlan, plan_channel
from pqasgd_horovod.averaging.statistics import ring_allreduce_nbytes
from pqasgd_horovod.averaging.vector import FlatLayout
from pqasgd_horovod.codecs.base import Codec
from pqasgd_horovod.exchange.plan import bytes_inside_node, bytes_of_rank

FUSED_BYTES = 128 * 2**20  # HOROVOD_FUSION_THRESHOLD


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to average: stock Horovod's ring allreduce of numbers of ``itemsize`` bytes, or ours.

    Ours is a ``config``, and averages every ``period`` steps; stock averages in each.
    """

    name: str
    itemsize: int = 4
    config: ExchangeConfig | None = None
    period: int = 1

    @property
    def codec(self) -> Codec | None:
        """What codes, if anything does."""
        codec = None if self.config is None else self.config.codec
        return codec if isinstance(codec, Codec) else None

    @property
    def codec_name(self) -> str:
        """Under which name its speed is known."""
        return name_of(self.codec) if self.codec is not None else ""


def name_of(codec: Codec) -> str:
    """Return the name of a codec among speeds.

    >>> name_of(codecs.eden(bits=4))
    'eden 4'
    """
    return f"{codec.id} {codec.bits}"


CODECS: dict[str, Codec] = {
    name_of(codec): codec for codec in (codecs.eden(bits=4), codecs.eden(bits=2), codecs.maxscale(bits=4))
}
STOCK = (Way("stock fp32", 4), Way("stock fp16", 2))
MEASURED = (
    *STOCK,
    *(
        Way(f"{name} bits, {method.replace('_', '-')}", config=ExchangeConfig(codec, method=method))
        for name, codec in CODECS.items()
        for method in ("allgather", "two_phase")
    ),
)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A model as one tensor, of which only the size is known."""

    numel: int
    name: str = "model"
    dtype: int = native.DTYPE_F32

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.numel,)

    @property
    def matrix(self) -> tuple[int, int]:
        return (1, self.numel)

    @property
    def description(self) -> str:
        return f"float32 {self.shape}"


def plan_of(config: ExchangeConfig, num_elements: int, size: int) -> ChannelPlan:
    """Return the package's plan for a model of one tensor, exchanged among ``size`` ranks or nodes."""
    tensor = _Tensor(num_elements)
    return plan_channel(FlatLayout([tensor]), config, config.way_for(tensor), name="model", index=0, size=size)


def bytes_sent(way: Way, num_elements: int, ranks: int, rank: int = 0, per_node: int = 1) -> tuple[int, int]:
    """Return what a rank sends for one average, as ``communication_stats()`` counts it: to others, and inside its node.

    Ranks of a node follow each other. The second number is 0 unless ``way`` has ``hierarchy="node"``.
    """
    if way.config is None:
        return ring_allreduce_nbytes(num_elements, ranks, way.itemsize) // per_node, 0
    if way.config.hierarchy is None:
        plan = plan_of(way.config, num_elements, ranks)
        return bytes_of_rank(plan.method, plan.codec, plan.second_codec, plan.sizes, ranks, rank)[0], 0
    node, local = divmod(rank, per_node)
    plan = plan_of(way.config, num_elements, ranks // per_node)
    own = plan.sizes[local::per_node]
    inside = sum(bytes_inside_node(bucket, size, per_node, local) for bucket, size in enumerate(plan.sizes))
    return bytes_of_rank(plan.method, plan.codec, plan.second_codec, own, ranks // per_node, node)[0], inside


class Work(NamedTuple):
    """What one average asks of the busiest rank."""

    collectives: int
    """How often all ranks ask each other what is ready, one time after the other."""
    hops: int
    """Messages that follow each other."""
    interface_bytes: int
    """What leaves the node by its interface, which its ranks share."""
    inside_bytes: int
    """What this rank sends inside its node."""
    copied: int
    """Bytes that this rank's processor moves into messages and out of them."""
    halves: float = 0.0
    """Numbers cast to fp16 and back."""
    walked: float = 0.0
    """Numbers moved between tensors, anchor and buffers, or added up inside a node."""
    encoded: float = 0.0
    decoded: float = 0.0
    buckets: int = 1
    """Of which one can be coded while another is sent."""


def work_of(way: Way, num_elements: int, ranks: int, per_node: int = 1) -> Work:
    """Return what one average of ``num_elements`` numbers asks of rank 0, which owns the largest shards.

    Where nodes have several ranks, stock's ring enters and leaves each node once, and ours has to be hierarchical.
    """
    _check(way, num_elements, ranks, per_node)
    if ranks == 1:
        return Work(0, 0, 0, 0, 0)
    asking = 2 * math.ceil(math.log2(ranks))  # Horovod's two small allreduces of which tensors are ready
    if way.config is None:
        sent = ring_allreduce_nbytes(num_elements, ranks, way.itemsize)
        rings = math.ceil(num_elements * way.itemsize / FUSED_BYTES)
        halves = way.itemsize == 2
        return Work(
            collectives=1,
            hops=asking + 2 * (ranks - 1) * rings,
            interface_bytes=sent if per_node < ranks else 0,
            inside_bytes=sent if per_node > 1 else 0,
            copied=2 * sent,
            halves=num_elements if halves else 0,
            walked=0 if halves else num_elements,
        )
    nodes = ranks // per_node
    plan = plan_of(way.config, num_elements, nodes)
    own = plan.sizes[::per_node]  # of the first rank of a node
    owned, buckets = sum(own), len(own)
    meeting = ranks - 1
    collectives, hops, inside, walked = 1, meeting, 0, num_elements
    interface = sum(bytes_sent(way, num_elements, ranks, local, per_node)[0] for local in range(per_node))
    own_sent = bytes_sent(way, num_elements, ranks, 0, per_node)[0]
    if per_node > 1:
        inside = bytes_sent(way, num_elements, ranks, 0, per_node)[1]
        collectives, hops = collectives + 2, hops + 3 * (per_node - 1) * len(plan.sizes)
        walked += (per_node - 1) * owned
    encoded = decoded = 0.0
    if nodes > 1 and plan.method == "allgather":
        collectives, hops = collectives + 1, hops + (nodes - 1) * buckets
        encoded, decoded = owned, nodes * owned
    elif nodes > 1:
        # An alltoall tells how long its messages are, then sends them; the means follow.
        collectives, hops = collectives + 2, hops + 3 * (nodes - 1) * buckets
        encoded, decoded = owned, owned * (2 * nodes - 1) / nodes
    return Work(
        collectives=collectives,
        hops=hops + asking * collectives,
        interface_bytes=interface,
        inside_bytes=inside,
        copied=2 * (own_sent + inside),
        walked=walked,
        encoded=encoded,
        decoded=decoded,
        buckets=max(1, buckets),
    )


def _check(way: Way, num_elements: int, ranks: int, per_node: int) -> None:
    if num_elements < 1:
        raise ValueError(f"parameters is {num_elements}; it must be at least 1")
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}; it must be at least 1")
    if per_node < 1 or ranks % per_node:
        raise ValueError(f"per_node is {per_node} with {ranks} ranks; it must divide them")
    if way.config is not None and (way.config.hierarchy == "node") != (per_node > 1):
        raise ValueError(
            f"per_node is {per_node} with {way.name!r}, whose hierarchy is {way.config.hierarchy!r}: several ranks "
            "on a node are for hierarchy='node', and that is for several"
        )


@dataclasses.dataclass(frozen=True)
class Costs:
    """What the parts of :class:`Work` cost where a rank has a core for itself; seconds, but for ``efficiency``."""

    collective: float
    """Of a collective: Horovod's cycle, and waiting for it."""
    hop: float
    """Of a message, whatever its size."""
    efficiency: float
    """What part of the nominal rate carries payloads."""
    copy: float
    """Of a byte, from memory into a message or back, TCP included."""
    """And of adding it up, in an allreduce."""
    half: float
    """Of a number that is cast to fp16 and back."""
    walk: float
    """Of a number that is moved, elsewhere than in coding."""
    overlap: float
    """What part of coding and sending could hide each other and does."""
    encode: Mapping[str, float]
    """By name of the codec; measured, not fitted."""
    decode: Mapping[str, float]

    def seconds(
        self, way: Way, work: Work, rate: float, contention: float = 1.0, inside_rate: float = math.inf
    ) -> float:
        """Return what an average takes at ``rate`` bits/s between nodes and ``inside_rate`` inside one."""
        encode, decode = (self.encode[way.codec_name], self.decode[way.codec_name]) if way.codec else (0.0, 0.0)
        wire = 8 * work.interface_bytes / (self.efficiency * rate) + 8 * work.inside_bytes / inside_rate
        coded = work.halves * self.half + work.walked * self.walk + work.encoded * encode + work.decoded * decode
        coded *= contention
        sent = max(wire, work.copied * self.copy * contention)
        hidden = self.overlap * (1 - 1 / work.buckets) * min(sent, coded)
        return work.collectives * self.collective + work.hops * self.hop * contention + sent + coded - hidden


FITTED = ("collective", "hop", "efficiency", "copy", "half", "walk", "overlap")
_START = {"collective": 1e-3, "hop": 1e-4, "efficiency": 0.9, "copy": 5e-10, "half": 2e-9, "walk": 1e-9, "overlap": 0.5}


def contention_of(ranks: int, cores: int) -> float:
    """Return how many ranks a core has, at least 1."""
    return max(1.0, ranks / cores)


def way_of(row: Mapping[str, Any]) -> Way:
    """Return what was measured."""
    return next(way for way in MEASURED if way.name == row["way"])


def _asked_by(row: Mapping[str, Any], cores: int) -> tuple[Way, Work, float, float]:
    work = work_of(way_of(row), row["elements"], row["ranks"])
    # Each average follows a rest, after which the shaped link lets some bytes through at once.
    work = work._replace(interface_bytes=max(0, work.interface_bytes - BURST_BYTES))
    return way_of(row), work, row["rate"], contention_of(row["ranks"], cores)


def predict_measured(costs: Costs, row: Mapping[str, Any], cores: int) -> float:
    """Return what a measured average should have taken: ``way``, ``elements``, ``ranks`` and ``rate`` of a row."""
    return costs.seconds(*_asked_by(row, cores))


def fit(
    rows: Sequence[Mapping[str, Any]], cores: int, encode: Mapping[str, float], decode: Mapping[str, float]
) -> Costs:
    """Return the costs that fit measured averages best: least squares of log(predicted / measured), outliers damped."""
    from scipy.optimize import least_squares  # which takes a second, and ranks do not fit

    if len(rows) < len(FITTED):
        raise ValueError(f"{len(rows)} measurements are too few for {len(FITTED)} costs")

    def costs_of(logarithms: np.ndarray) -> Costs:
        values = dict(zip(FITTED, np.exp(logarithms).tolist(), strict=True))
        return Costs(**values, encode=encode, decode=decode)

    asked = [_asked_by(row, cores) for row in rows]
    measured = np.log([row["seconds"] for row in rows])

    def residuals(logarithms: np.ndarray) -> np.ndarray:
        costs = costs_of(logarithms)
        return np.log([costs.seconds(*each) for each in asked]) - measured

    start = np.log([_START[name] for name in FITTED])
    upper = np.full(start.size, 0.0)  # nothing takes a second, and no wire carries more than its rate
    found = least_squares(residuals, start, bounds=(np.full(start.size, -30.0), upper), loss="soft_l1", f_scale=0.1)
    return costs_of(found.x)


def errors(costs: Costs, rows: Sequence[Mapping[str, Any]], cores: int) -> list[float]:
    """Return how wrong each prediction is: |predicted - measured| / measured."""
    return [abs(predict_measured(costs, row, cores) / row["seconds"] - 1) for row in rows]
