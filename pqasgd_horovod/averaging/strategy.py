"""The strategy that ``averaging=`` takes: one choice of schedule, outer optimizer and state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from ..codecs.base import check_integer
from ..errors import ArgumentError
from .moments import MOMENT_POLICIES
from .outer import Outer, OuterOptimizer, Replace, outer_from_config
from .schedule import FixedPeriod, Schedule, schedule_from_config
from .selection import All, Rotation, Selection, selection_from_config

BUFFER_POLICIES = ("statistics", "all", "max_count", "local")


@dataclasses.dataclass(frozen=True)
class PeriodicAveraging:
    r"""Average the replicas from time to time.

    Each step :math:`x_i \leftarrow x_i - g\,\nabla_i` is local; at the end of a period
    :math:`a \leftarrow a + \frac1n \sum_i Q(x_i - a)` and :math:`x_i \leftarrow a`, with the anchor :math:`a` of the
    last average. With ``period=1`` and nothing else the gradients are exchanged instead, as Horovod does.

    With ``delay=d`` the exchange takes place beside the next d steps. What each rank sends is about a snapshot
    :math:`s_i` of :math:`x_i` at the end of the period; after d more local steps, on every rank after the same one,

    .. math:: a \leftarrow a + \frac1n \sum_i Q(s_i - a), \qquad x_i \leftarrow a + (x_i - s_i),

    so that what a rank has done meanwhile is kept. Results do not depend on how long the exchange took.

    Source: P. Jiang and G. Agrawal, "A Linear Speedup Analysis of Distributed Deep Learning with Sparse and Quantized
    Communication", NeurIPS 2018 (PQASGD). Delay: Shen et al., "Faster distributed deep net training: computation and
    communication decoupled stochastic gradient descent", IJCAI 2019 (CoCoD-SGD, which has d = p); Douillard et al.,
    "Streaming DiLoCo with overlapping communication", 2025, whose mixing of x and a is left out.

    Args:
        period: steps between averages, at least 1, or a schedule: :class:`~.schedule.PostLocal`,
            :class:`~.schedule.GrowingPeriod`. Larger: fewer bytes, and replicas that drift further apart.
        buffers: what becomes of floating-point buffers at an average. ``"statistics"``: the running statistics of
            normalization layers are averaged; ``"all"``: every floating-point buffer is; ``"local"``: none is. They
            travel as float32, uncompressed. ``"max_count"``: each such layer takes the statistics, and the count, of
            the rank on which it has seen the most batches, the lowest of them, as they are: for data that is spread
            unevenly, so that a rank with few batches does not count as much as one with many (PyTorch only: Keras'
            layers do not count).
        outer: what is done with the mean of the changes: :class:`~.outer.Replace`, the paper's, :class:`~.outer.SlowMo`
            or :class:`~.outer.Nesterov`. Or any optimizer, which steps the anchor with the negative mean for a
            gradient: in PyTorch a callable that is given parameters, ``lambda params: torch.optim.Adam(params, 0.01)``,
            in Keras an optimizer, ``keras.optimizers.Adam(0.01)``; its state is saved with the anchor, and all
            coordinates have to be averaged at once. Every rank then steps by itself on the same bytes, so the ranks'
            machines have to be alike; ``check_consistency`` finds out if they are not. A rank that trains alone steps
            without an outer optimizer.
        selection: which coordinates an average is about: :class:`~.selection.All`, or a part in turn,
            :class:`~.selection.Rotation`; see :func:`SparseAveraging`.
        moments: what becomes of the inner optimizer's momentum and second moments at an average. ``"local"``: they stay
            each rank's own, and no bytes are sent. ``"average"``: each one that all ranks have becomes its mean (one
            that some rank has not made yet stays local); like buffers they travel as float32, uncompressed: 4 bytes for
            each number, beside b/8 for that of a parameter at b bits. So the mean is exact, and what is not negative
            stays so. ``"reset"``: they become what they are in a new optimizer, and no bytes are sent. Only where
            replicas are averaged, and all coordinates at once.
        delay: steps between the end of a period and the application of its average, which hide the exchange: at least
            0, below the shortest period. Larger: a slower network is hidden, and averages are older. The replicas are
            then the same after ``flush()`` only; anchors, and what ``check_consistency`` compares, are after each
            average. A buffer becomes the mean of the snapshots; its changes since are dropped. One more array as large
            as the model. PyTorch only.

    Raises ArgumentError for other values.

    >>> PeriodicAveraging(period=8).schedule
    FixedPeriod(period=8)
    """

    id: ClassVar[str] = "periodic"

    period: int | Schedule = 8
    buffers: str = "statistics"
    outer: Any = dataclasses.field(default_factory=Replace)
    selection: Selection = dataclasses.field(default_factory=All)
    moments: str = "local"
    delay: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.period, Schedule):
            object.__setattr__(self, "period", FixedPeriod(self.period).period)
        if self.buffers not in BUFFER_POLICIES:
            raise ArgumentError(
                f"buffers is {self.buffers!r}; it must be one of {', '.join(map(repr, BUFFER_POLICIES))}"
            )
        if callable(self.outer) or hasattr(self.outer, "get_config"):
            object.__setattr__(self, "outer", OuterOptimizer(self.outer))
        if not isinstance(self.outer, Outer):
            raise ArgumentError(
                f"outer is {self.outer!r}; it must be an outer optimizer, such as hvd.SlowMo(beta=0.5), or "
                "one of the framework: in PyTorch a callable that is given parameters, in Keras an optimizer"
            )
        if not isinstance(self.selection, Selection):
            raise ArgumentError(f"selection is {self.selection!r}; it must be a selection, such as hvd.Rotation(8)")
        object.__setattr__(self, "delay", check_integer("delay", self.delay, 0, 2**31))
        if isinstance(self.outer, OuterOptimizer) and self.is_sparse:
            raise ArgumentError(
                f"outer is {self.outer.optimizer!r} with selection={self.selection}; an optimizer steps whole tensors, "
                "and a round is about parts of them: use hvd.SlowMo or hvd.Nesterov, or average all coordinates"
            )
        self._check_moments()
        self._check_delay()

    def _check_delay(self) -> None:
        if not self.delay:
            return
        if self.delay >= self.schedule.shortest_period:
            raise ArgumentError(
                f"delay is {self.delay}; it must be below the fewest steps between two averages, which with "
                f"period={self.period} are {self.schedule.shortest_period}: one average is applied before the next "
                "begins"
            )
        if self.moments != "local":
            raise ArgumentError(
                f"delay is {self.delay} with moments={self.moments!r}; moments go on while the exchange does, and what "
                "they have gathered meanwhile would be lost: use moments='local', or delay=0"
            )
        if self.buffers == "max_count":
            raise ArgumentError(
                f"delay is {self.delay} with buffers='max_count'; the statistics of one rank go on while the exchange "
                "does: use another policy for buffers, or delay=0"
            )

    def _check_moments(self) -> None:
        if self.moments not in MOMENT_POLICIES:
            raise ArgumentError(
                f"moments is {self.moments!r}; it must be one of {', '.join(map(repr, MOMENT_POLICIES))}"
            )
        if self.moments == "local":
            return
        if self.exchanges_gradients:
            raise ArgumentError(
                f"moments is {self.moments!r} with period=1, where gradients are averaged, and moments are alike on "
                "every rank: use moments='local', or a longer period"
            )
        if self.is_sparse:
            raise ArgumentError(
                f"moments is {self.moments!r} with selection={self.selection}, which averages a part of the "
                "coordinates in each round: use moments='local', or average all of them"
            )

    @property
    def schedule(self) -> Schedule:
        """When to average."""
        return self.period if isinstance(self.period, Schedule) else FixedPeriod(self.period)

    @property
    def exchanges_gradients(self) -> bool:
        """True if gradients are averaged in every step, and not replicas from time to time."""
        return self.schedule == FixedPeriod(1) and self.outer == Replace() and not self.is_sparse

    @property
    def is_sparse(self) -> bool:
        """True if an average is about a part of the coordinates."""
        return self.selection.num_fragments > 1

    @property
    def uses_learning_rate(self) -> bool:
        """True if the inner learning rate enters, which the ranks then agree on."""
        return bool(self.schedule.uses_learning_rate or self.outer.uses_learning_rate)

    def config(self) -> dict[str, Any]:
        """Return the configuration as a dict that JSON can hold."""
        return {
            "id": self.id,
            "period": self.period.config() if isinstance(self.period, Schedule) else self.period,
            "buffers": self.buffers,
            "outer": self.outer.config(),
            "selection": self.selection.config(),
            "moments": self.moments,
            "delay": self.delay,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PeriodicAveraging:
        """Return the strategy that a ``config()`` describes.

        >>> strategy = PeriodicAveraging(period=4, buffers="all")
        >>> PeriodicAveraging.from_config(strategy.config()).config() == strategy.config()
        True
        """
        period = config["period"]
        if isinstance(period, Mapping):
            period = schedule_from_config(period)
        return cls(
            period,
            config["buffers"],
            outer_from_config(config["outer"]),
            selection_from_config(config["selection"]),
            config["moments"],
            config["delay"],
        )


def SparseAveraging(
    period: int = 8, block: int | None = None, buffers: str = "statistics", outer: Any = None
) -> PeriodicAveraging:
    r"""Average a part of the coordinates after every step, all of them within ``period`` steps.

    Each step :math:`x_i \leftarrow x_i - g\,\nabla_i` is local, then for the coordinates k of one of ``period``
    parts, in turn, :math:`a_k \leftarrow a_k + \frac1n \sum_i Q(x_i - a)_k` and :math:`x_{i,k} \leftarrow a_k`. So
    every step sends the same few bytes, and no indices.
    It is ``PeriodicAveraging(period=1, selection=Rotation(period, block))``; with
    another period there a part is averaged every so many steps.

    Args:
        period: steps in which every coordinate is averaged once, at least 1.
        block: None: contiguous parts. Or elements of the blocks that the parts are made of in turn; see
            :class:`~.selection.Rotation`.
        buffers: as for :class:`PeriodicAveraging`, as is ``outer``.
        outer: None: the paper's, :class:`~.outer.Replace`.

    Raises ArgumentError for other values.

    Source: Jiang and Agrawal, NeurIPS 2018 (sparse parameter averaging, SPA).

    >>> SparseAveraging(period=8).selection
    Rotation(fragments=8, block=None)
    """
    selection = Rotation(check_integer("period", period, 1, 2**31), block)
    return PeriodicAveraging(1, buffers, Replace() if outer is None else outer, selection)


def resolve_averaging(period: int | Schedule | None, averaging: PeriodicAveraging | None) -> PeriodicAveraging:
    """Return the strategy that the arguments ``period`` and ``averaging`` of an optimizer stand for."""
    if averaging is None:
        return PeriodicAveraging(period=1 if period is None else period)
    if not isinstance(averaging, PeriodicAveraging):
        raise ArgumentError(
            f"averaging is {averaging!r}; it must be a strategy such as hvd.PeriodicAveraging(period=8)"
        )
    if period is not None and period != averaging.period:
        raise ArgumentError(
            f"period is {period} and averaging is {averaging}; give one of them, or the same period in both"
        )
    return averaging
