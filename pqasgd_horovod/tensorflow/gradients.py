"""``period=1`` in TensorFlow: gradients become their mean over the ranks, coded by us or added up by Horovod."""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import horovod.tensorflow as horovod
import numpy as np
import tensorflow as tf

from ..averaging import ExchangeConfig, PeriodicAveraging
from ..averaging.channel import ChannelPlan, plan_channel, warn_of_size
from ..averaging.feedback import MomentumCorrection
from ..averaging.meeting import Purpose
from ..averaging.statistics import CommunicationStatistics, ring_allreduce_nbytes
from ..averaging.tables import SparseSpec
from ..averaging.together import NO_ERROR, refused_together, succeed_together
from ..averaging.vector import FlatLayout
from ..codecs.base import check_integer
from ..errors import ArgumentError, MismatchError
from ..exchange.carriers import Bytes
from ..exchange.carriers.alone import AloneCarrier
from ..exchange.handshake import verify_same
from ..exchange.plan import num_parts
from ..exchange.wire import format_by_rank
from .carrier import HorovodCarrier, allgather, constant_names
from .graph import GraphChannel, Problems, Round
from .library import ops
from .low_rank import make_channel
from .meeting import Meeting, MeetingPoint, Records
from .places import ON_HOST, Place, choose_place, hosted, on_host, places_of
from .residuals import Residuals, Velocity
from .rows import GraphRows, Landed
from .state import fitted
from .traced import Traced, Turns, after, as_written, counter, outside_of_graphs, when
from .variables import VariableSpec, describe_variables, unwrap

Gradient = Any  # tf.Tensor, tf.IndexedSlices or None
Groups = int | tuple[tuple[Any, ...], ...]  # how many, or of which variables


def first_computed(gradients: Sequence[Gradient]) -> list[tf.Tensor]:
    """Return what backward most likely computes first: nothing of ours may run in a step that fails before it.

    A graph that fails (an iterator that has ended, a check of the user's) has run whatever did not depend on what
    failed; the other ranks, which may not even be in that step, would be left with half a step.
    """
    last = next((gradient for gradient in reversed(gradients) if gradient is not None), None)
    return [] if last is None else [last.values if isinstance(last, tf.IndexedSlices) else last]


class GradientState(tf.Module):
    """What is saved: the step counter, which keys the rounding noise. ``tf.train.Checkpoint`` finds it."""

    def __init__(self) -> None:
        super().__init__(name="pqasgd")
        self.steps = counter("steps")
        self.residuals: Residuals | None = None

    def common(self) -> dict[str, tf.Variable]:
        """Return the variables that all ranks have alike, by the names under which a model file holds them."""
        return {"steps": self.steps, **({} if self.residuals is None else self.residuals.common())}

    def named(self) -> dict[str, tf.Variable]:
        """Return these, and the residuals, which are each rank's own."""
        return {**self.common(), **({} if self.residuals is None else self.residuals.named())}


@dataclasses.dataclass(frozen=True)
class GradientSettings:
    """How gradients are combined; as Horovod's arguments of these names."""

    op: Any = horovod.Average
    gradient_predivide_factor: float = 1.0
    groups: Groups = 0
    sparse_as_dense: bool = False
    device_dense: str = ""
    device_sparse: str = ""


def check_groups(groups: Any, num_groups: int, *, positions: bool = False) -> Groups:
    """Return ``groups``, or ``num_groups`` if there are none; raise ArgumentError unless they are allowed.

    ``positions``: in the place of variables there may be their positions, as in what was saved.
    """
    if not groups:
        return check_integer("num_groups", num_groups, 0, 2**31)
    chosen = groups
    if isinstance(chosen, int | np.integer) and chosen >= 0:
        return int(chosen)
    allowed = (tf.Variable, int) if positions else tf.Variable
    if isinstance(chosen, list | tuple) and all(isinstance(group, list | tuple) for group in chosen):
        lists = tuple(map(tuple, chosen))
        if all(isinstance(unwrap(member), allowed) for group in lists for member in group):
            return lists
    raise ArgumentError(f"groups is {chosen!r}; it must be a number, 0 or more, or a list of lists of variables")


def place_groups(groups: Groups, variables: Sequence[Any]) -> Groups:
    """Return ``groups`` with variables where they have positions; raise ArgumentError if there is no such variable."""
    if isinstance(groups, int):
        return groups
    for position in itertools.chain(*groups):
        if isinstance(position, int) and not 0 <= position < len(variables):
            raise ArgumentError(
                f"groups has the variable at position {position}, and {len(variables)} are trained: an optimizer that "
                "was saved with groups needs the model that it was saved with; load the weights alone for another"
            )
    return tuple(tuple(variables[m] if isinstance(m, int) else m for m in group) for group in groups)


def layout_of(specs: Sequence[VariableSpec], gradients: Sequence[Gradient]) -> list[tuple[str, str]]:
    """Return what has to be the same on every rank: names, types, shapes, and which gradients are sparse or absent."""
    kinds = [
        "absent" if gradient is None else "sparse" if isinstance(gradient, tf.IndexedSlices) else "dense"
        for gradient in gradients
    ]
    return [(spec.name, f"{spec.description} {kind}") for spec, kind in zip(specs, kinds, strict=True)]


def check_dense(correction: MomentumCorrection, layout: Sequence[tuple[str, str]]) -> None:
    """Raise ArgumentError if a gradient is sparse and momentum is corrected."""
    sparse = [name for name, description in layout if description.endswith(" sparse")]
    if sparse:
        raise ArgumentError(
            f"gradients of {sparse} are sparse, with feedback={correction}: only rows that are used in a step are "
            "sent, and momentum moves all of them; use sparse_as_dense=True"
        )


def check_some(gradients: Sequence[Gradient]) -> None:
    """Raise ArgumentError if there is no gradient at all."""
    if all(gradient is None for gradient in gradients):
        raise ArgumentError("gradients are all None: there is nothing to average")


class GradientAverager(abc.ABC):
    """Replaces gradients by their mean, or sum, over the ranks.

    What has a gradient is looked at in the first call, and is the same on every rank and in every later call. Of sparse
    gradients (``tf.IndexedSlices``) only rows travel, unless ``sparse_as_dense``. ``carrier`` is None
    for a rank that trains alone; then gradients are what they were. ``meeting`` is where the ranks meet before each
    average, by default one under this averager's own name.
    """

    def __init__(
        self, carrier: HorovodCarrier | None, settings: GradientSettings, *, name: str, meeting: Meeting | None = None
    ) -> None:
        with outside_of_graphs():
            self.state = GradientState()
            self._turns = Turns()
            self._total_steps = counter("total_steps")
            self._counted_sent, self._counted_received = counter("counted_sent"), counter("counted_received")
        if carrier is not None:
            self._meeting = meeting or Meeting(carrier, name)
        self._carrier = carrier
        self._settings = settings
        self._name = name
        self._layout: list[tuple[str, str]] | None = None
        self._num_elements = 0
        self._place = ON_HOST
        self._traced = Traced()

    @as_written
    def average(self, gradients: Sequence[Gradient], variables: Sequence[Any]) -> list[Gradient]:
        """Return the means, in the order of ``gradients``; where there is no gradient there is none after.

        Raises DesynchronizedError on every rank if other variables have gradients than in the first call on some, and
        ArgumentError if on all.
        """
        result, present = self._prepare(gradients, variables)
        given = [result[i] for i in present]
        if self._carrier is None:
            self._count()
            means = self._average_alone(given)
        else:
            means = self._traced(self._average, given)
        for i, mean in zip(present, means, strict=True):
            result[i] = mean
        return result

    def _prepare(self, gradients: Sequence[Gradient], variables: Sequence[Any]) -> tuple[list[Gradient], Sequence[int]]:
        """Lay out the gradients, collectively, or see that they are laid out; return them, and which there are."""
        with refused_together(None if self._carrier is None else self._tell):
            all_specs, own = describe_variables(variables), list(gradients)
            if self._settings.sparse_as_dense:
                own = [tf.convert_to_tensor(g) if isinstance(g, tf.IndexedSlices) else g for g in own]
            present = [i for i, gradient in enumerate(own) if gradient is not None]
            specs, given = [all_specs[i] for i in present], [variables[i] for i in present]
            layout = layout_of(specs, [own[i] for i in present])
            self._check_layout(layout, own)
            if not self.is_laid_out:
                self._place = self._choose_place(specs, given)
        if not self.is_laid_out:
            with outside_of_graphs():
                self._lay_out(specs, given, layout)
        return own, present

    def _choose_place(self, specs: Sequence[VariableSpec], variables: Sequence[Any]) -> Place:
        """Return where gradients of these variables are averaged; raise as :func:`choose_place` if that cannot be."""
        return ON_HOST  # it is Horovod's business

    def _lay_out(self, specs: Sequence[VariableSpec], variables: Sequence[Any], layout: list[tuple[str, str]]) -> None:
        """Prepare to average gradients of these variables; collective."""
        self._num_elements = sum(spec.numel for spec in specs)
        is_sparse = [description.endswith(" sparse") for _, description in layout]
        dense = [i for i, it_is in enumerate(is_sparse) if not it_is]
        sparse = [
            SparseSpec(spec.name, spec.shape, spec.description)
            for spec, it_is in zip(specs, is_sparse, strict=True)
            if it_is
        ]
        self._build([specs[i] for i in dense], [variables[i] for i in dense], layout, sparse)
        self._layout = layout

    def _average_alone(self, gradients: list[Gradient]) -> list[Gradient]:
        """Return what the gradients of one rank alone become."""
        return gradients

    def regroup(self, groups: Groups) -> None:
        """Let Horovod fuse these gradients; before the first average."""
        self._settings = dataclasses.replace(self._settings, groups=groups)

    @property
    def is_laid_out(self) -> bool:
        """Whether the ranks have agreed on what is averaged."""
        return self._layout is not None

    def _check_layout(self, layout: list[tuple[str, str]], gradients: Sequence[Gradient]) -> None:
        if self._layout is None:
            check_some(gradients)
        elif layout != self._layout:
            changed = sorted(set(layout) ^ set(self._layout)) or "their order"
            raise ArgumentError(
                f"the gradients are not those of the first step; what differs: {changed}. Every step has to compute "
                "gradients of the same variables, on every rank: make another optimizer or tape for others"
            )

    def _tell(self, refusal: Mapping[str, Any]) -> None:
        """Let the others know where they are, or will be, that this rank cannot average with them; collective."""
        assert self._carrier is not None
        with outside_of_graphs():
            if self.is_laid_out:
                steps = self._total_steps.numpy()
                self._meeting.tell(Purpose.LAYOUT, steps, steps)
            else:
                verify_same(self._carrier, refusal, f"{self._name}.layout")

    def _average(self, gradients: list[Gradient]) -> list[Gradient]:
        sparse = [gradient for gradient in gradients if isinstance(gradient, tf.IndexedSlices)]
        dense = [gradient for gradient in gradients if not isinstance(gradient, tf.IndexedSlices)]
        met = self._meet(gradients)
        with after(met.words):
            means, of_rows = map(iter, self._average_both(dense, sparse, met))
            result = [next(of_rows if isinstance(gradient, tf.IndexedSlices) else means) for gradient in gradients]
            self._count()
        self._turns.end(*tf.nest.flatten(result, expand_composites=True))
        return result

    def _meet(self, gradients: Sequence[Gradient]) -> Records:
        """Return what all ranks say, when every rank that has gradients is about to average the same ones."""
        with after(*first_computed(gradients), self._turns.begin()), on_host():
            steps = self._total_steps.value()
            return self._meeting.agree(Purpose.AVERAGE, steps, steps)

    def _count(self) -> None:
        self.state.steps.assign_add(1)
        self._total_steps.assign_add(1)

    def _agree(self, layout: list[tuple[str, str]], **rest: Any) -> int:
        assert self._carrier is not None
        description = {**NO_ERROR, "gradients": dict(layout), "gradient_order": [name for name, _ in layout], **rest}
        return verify_same(self._carrier, description, f"{self._name}.layout")

    def communication_stats(self) -> dict[str, Any]:
        """Return running totals; see :class:`~pqasgd_horovod.averaging.statistics.CommunicationStatistics`."""
        statistics = CommunicationStatistics.of(None if self._carrier is None else self._carrier.nodes or self._carrier)
        statistics.count_steps(int(self._total_steps), self._num_elements)
        statistics.rounds = statistics.steps
        sent, received = self._dense_bytes_per_step()
        return statistics.as_dict(
            statistics.rounds * sent + int(self._counted_sent),
            statistics.rounds * received + int(self._counted_received),
            *(statistics.rounds * nbytes for nbytes in self._node_bytes_per_step()),
        )

    def _node_bytes_per_step(self) -> tuple[int, int]:
        """Return the bytes sent and received inside the node, where they are told apart."""
        return 0, 0

    @abc.abstractmethod
    def _build(
        self,
        dense: Sequence[VariableSpec],
        variables: Sequence[Any],
        layout: list[tuple[str, str]],
        sparse: Sequence[SparseSpec],
    ) -> None:
        """Prepare to average the dense gradients, of these variables, and sparse ones; collective."""

    @abc.abstractmethod
    def _average_both(
        self, dense: list[tf.Tensor], sparse: list[tf.IndexedSlices], met: Records
    ) -> tuple[list[tf.Tensor], list[tf.IndexedSlices]]:
        """Return the means of gradients like those of :meth:`_build`; ``met`` is what all ranks have said."""

    @abc.abstractmethod
    def _dense_bytes_per_step(self) -> tuple[int, int]:
        """Return the bytes sent and received for dense gradients in a step."""


def _coalesced(gradient: tf.IndexedSlices) -> tf.IndexedSlices:
    """Return the same gradient, with rows that are there several times added up."""
    rows, positions = tf.unique(gradient.indices)
    values = tf.math.unsorted_segment_sum(gradient.values, positions, tf.size(rows))
    return tf.IndexedSlices(values, rows, gradient.dense_shape)


def _nbytes(tensor: tf.Tensor) -> tf.Tensor:
    return tf.size(tensor, tf.int64) * tensor.dtype.size


class CodedGradients(GradientAverager):
    r"""Replace gradients :math:`g_i` by :math:`\frac1n \sum_i Q(g_i)`, a bucket as soon as its gradients are there."""

    def __init__(
        self, carrier: HorovodCarrier | None, settings: GradientSettings, config: ExchangeConfig, *, name: str,
        meeting: Meeting | None = None, anchor_device: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(carrier, settings, name=name, meeting=meeting)
        self._config = config
        self._anchor_device = anchor_device
        self._stages: list[list[GraphChannel]] = []  # of a warm-up; the channels of each
        self._positions: list[list[int]] = []  # of the gradients of each channel
        self._velocities: list[Velocity] = []
        self._rows: list[GraphRows] = []
        self._saved_residuals: Mapping[str, np.ndarray] = {}
        with outside_of_graphs():
            self._claimed = counter("claimed")
        if carrier is not None:
            self._problems = Problems(name, config.nonfinite)
            self._start = MeetingPoint(carrier, f"{name}.start", self._explain_start)

    def _check_layout(self, layout: list[tuple[str, str]], gradients: Sequence[Gradient]) -> None:
        super()._check_layout(layout, gradients)
        if self._config.correction is not None:
            check_dense(self._config.correction, layout)

    def _choose_place(self, specs: Sequence[VariableSpec], variables: Sequence[Any]) -> Place:
        if self._carrier is None:
            return ON_HOST
        return choose_place(places_of(specs, variables), self._anchor_device)

    def _build(
        self,
        dense: Sequence[VariableSpec],
        variables: Sequence[Any],
        layout: list[tuple[str, str]],
        sparse: Sequence[SparseSpec],
    ) -> None:
        if self._carrier is None and self._config.correction is None:
            return
        digest = 0
        if self._carrier is not None:
            digest = self._agree(
                layout, exchange=self._config.config(), **self._config.describe_codecs([*dense, *sparse])
            )
        with succeed_together(self._carrier, f"{self._name}.memory"):
            self._build_agreed(dense, sparse, digest)

    def _build_agreed(self, dense: Sequence[VariableSpec], sparse: Sequence[SparseSpec], digest: int) -> None:
        position = {spec.name: i for i, spec in enumerate(dense)}
        parts = [members for _, members in self._config.by_way(dense)]
        self._positions = [[position[spec.name] for spec in members] for members in parts]
        correction = self._config.correction
        stages = [self._plan(dense, stage) for stage in range(1 if correction is None else len(correction.densities))]
        plans = stages[-1]
        residuals: Sequence[Sequence[tf.Variable]] = [() for _ in plans]
        coded = [] if self._carrier is None else [not self._config.codec_of_rows(spec).lossless for spec in sparse]
        feeds_back = [self._config.feedback is not None and is_coded for is_coded in coded]
        if any(plan.feedback or plan.correction for plan in plans) or any(feeds_back):
            tables = [spec.table for spec, has_one in zip(sparse, feeds_back, strict=True) if has_one]
            self.state.residuals = Residuals(
                plans, tables, None if self._carrier is None else self._carrier.ranks_per_node, self._place
            )
            expected = self.state.residuals.named()
            self.state.residuals.take(fitted(self._saved_residuals, expected, self._carrier is None))
            residuals = self.state.residuals.of(plans)
            kept = self.state.residuals.velocities
            self._velocities = [Velocity(plan, of_plan) for plan, of_plan in zip(plans, kept, strict=bool(kept))]
        if self._carrier is None:
            return
        of_tables = iter(self.state.residuals.tables if self.state.residuals is not None else ())
        self._rows = [
            GraphRows(
                spec,
                self._config,
                self._carrier,
                name=self._name,
                table=number,
                digest=digest,
                problems=self._problems,
                residual=next(of_tables) if feeds_back[number] else None,
            )
            for number, spec in enumerate(sparse)
        ]
        warn_of_size(stages[0], self._carrier.nodes or self._carrier, PeriodicAveraging(period=1))
        self._stages = []
        for stage, of_stage in enumerate(stages):
            others = self._stages[0] if self._stages else [None] * len(plans)
            self._stages.append(
                [
                    make_channel(
                        plan,
                        self._carrier,
                        (digest + stage) % 2**64,
                        self._problems,
                        None,
                        None,
                        kept,
                        other=other,
                        place=self._place,
                    )
                    for plan, kept, other in zip(of_stage, residuals, others, strict=True)
                ]
            )

    def _plan(self, dense: Sequence[VariableSpec], stage: int) -> list[ChannelPlan]:
        correction, size = self._config.correction, 1
        if self._carrier is not None:
            size = num_parts(self._carrier.nodes or self._carrier)
        density = 0.0 if correction is None else correction.densities[stage]
        return [
            plan_channel(
                FlatLayout(members),
                self._config,
                way._replace(codec=way.codec.at_least(density)),
                name=self._name,
                index=index,
                size=size,
            )
            for index, (way, members) in enumerate(self._config.by_way(dense))
        ]

    def _average_both(
        self, dense: list[tf.Tensor], sparse: list[tf.IndexedSlices], met: Records
    ) -> tuple[list[tf.Tensor], list[tf.IndexedSlices]]:
        return self._exchange(sparse, met, lambda *stage: self._average_stage(dense, *stage))

    @hosted
    def _exchange(
        self,
        sparse: list[tf.IndexedSlices],
        met: Records,
        run_stage: Callable[[int, list[tf.Tensor], Round], list[tf.Tensor]],
    ) -> tuple[list[tf.Tensor], list[tf.IndexedSlices]]:
        """Exchange sparse gradients, and dense ones by ``run_stage(stage, flags of sparse ones, round)``; return means.

        That returns the means, and after them something that is there when the verdict is.
        """
        if self.state.residuals is not None:
            when(self._claimed > 0, None, self._claim)
        steps = self.state.steps.value()
        round_ = Round(steps, steps, tf.ones([]) if self._settings.op == horovod.Sum else met.scale)
        if len(self._stages) > 1:
            assert self._config.correction is not None

            def branch(stage: int) -> Callable[[], list[tf.Tensor]]:
                return lambda: run_stage(stage, [], round_)

            stage = tf.cast(self._config.correction.stage(steps, tf.minimum), tf.int32)
            *means, _ = tf.switch_case(stage, {index: branch(index) for index in range(len(self._stages))})
            return means, []
        of_rows = round_._replace(scale=self._factor * round_.scale)
        landed = [rows.exchange(gradient, of_rows) for rows, gradient in zip(self._rows, sparse, strict=True)]
        # One verdict about all: an error must not leave anything on its way.
        *means, done = run_stage(0, [each.flags for each in landed], round_)
        return means, self._take_rows(landed, done)

    def _take_rows(self, landed: Sequence[Landed], done: tf.Tensor) -> list[tf.IndexedSlices]:
        """Return the means of sparse gradients, when ``done`` is there."""
        with after(done):
            for rows, each in zip(self._rows, landed, strict=True):
                rows.keep(each)
                self._counted_sent.assign_add(each.nbytes[0])
                self._counted_received.assign_add(each.nbytes[1])
            return [
                tf.IndexedSlices(tf.identity(each.mean.values), each.mean.indices, each.mean.dense_shape)
                for each in landed
            ]

    @property
    def _factor(self) -> float:
        assert self._carrier is not None
        return float(self._carrier.size) if self._settings.op == horovod.Sum else 1.0

    @hosted
    def _average_stage(
        self, gradients: list[tf.Tensor], stage: int, of_rows: list[tf.Tensor], round: Round
    ) -> list[tf.Tensor]:
        channels = self._stages[stage]
        given = [[gradients[i] for i in positions] for positions in self._positions]
        with self._place.here():
            moved = self._advance(gradients, given)
        exchanged = [channel.exchange(moved[i][1] if moved else given[i], round) for i, channel in enumerate(channels)]
        verdict = self._problems.verdict([*of_rows, *(flag for flags in exchanged for flag in flags)])
        result: list[tf.Tensor] = list(gradients)
        with after(verdict):
            for i, (channel, flags) in enumerate(zip(channels, exchanged, strict=True)):
                with self._place.here():
                    done = [self._velocities[i].keep(*moved[i], channel.residual, flags)] if moved else []
                with after(*done):
                    channel.keep_residuals(flags)
                for position, mean in zip(self._positions[i], channel.means(given[i], self._factor), strict=True):
                    result[position] = mean
            self._count_bytes_of(channels)
            return [*result, tf.constant(True)]

    def _count_bytes_of(self, channels: Sequence[GraphChannel]) -> None:
        if len(self._stages) > 1:  # else they are the same in every step
            sent, received = _sum_of_bytes(channels)
            self._counted_sent.assign_add(sent)
            self._counted_received.assign_add(received)

    @hosted
    def _serve_stage(self, stage: int, of_rows: list[tf.Tensor], round: Round) -> list[tf.Tensor]:
        """Do what :meth:`_average_stage` does with nothing to give, and without means."""
        channels = self._stages[stage]
        exchanged = [channel.exchange_nothing(round) for channel in channels]
        verdict = self._problems.verdict([*of_rows, *(flag for flags in exchanged for flag in flags)])
        with after(verdict):
            for channel, flags in zip(channels, exchanged, strict=True):
                channel.keep_residuals(flags, absent=True)
            self._count_bytes_of(channels)
            return [tf.constant(True)]

    @hosted
    def _serve(self, met: Records) -> None:
        self._exchange([rows.nothing() for rows in self._rows], met, self._serve_stage)
        self._count()

    def check_for_join(self) -> None:
        """Raise ArgumentError unless a rank without data can send nothing."""
        self._config.check_for_join()

    def join(self, variables: Sequence[Any]) -> tuple[int, bool]:
        """Take part in the averages of ranks that have more data, until none has, with zeros in place of gradients.

        As :meth:`pqasgd_horovod.averaging.gradients.GradientAverager.join`. ``variables`` are those that are trained:
        where no average was made yet, each is taken to have a dense gradient, which the ranks compare.
        """
        if not self.is_laid_out:
            self._prepare(variables, variables)
        own_steps = int(self._total_steps)
        while True:
            agreement, met = self._meeting.meet(Purpose.JOINED, own_steps, own_steps)
            if agreement.has_ended:
                return agreement.last, any(intent.steps < agreement.steps for intent in agreement.intents)
            self._traced(self._serve, met)

    def _advance(
        self, gradients: Sequence[tf.Tensor], given: Sequence[Sequence[tf.Tensor]]
    ) -> list[tuple[list[tf.Tensor], list[tf.Tensor]]]:
        """Return velocities and increments of each channel; nothing without momentum correction."""
        correction, clipping = self._config.correction, None
        if correction is not None and correction.clip_norm is not None:
            squares = [tf.reduce_sum(tf.square(tf.cast(gradient, tf.float64))) for gradient in gradients]
            norm = tf.sqrt(tf.add_n(squares))
            limit = correction.clip_limit(1 if self._carrier is None else self._carrier.size)
            clips = tf.math.is_finite(norm) & (norm > limit)
            clipping = tf.cast(tf.where(clips, limit / norm, tf.ones_like(norm)), tf.float32)
        return [
            velocity.advance(of_channel, clipping)
            for velocity, of_channel in zip(self._velocities, given, strict=bool(self._velocities))
        ]

    def _average_alone(self, gradients: list[tf.Tensor]) -> list[tf.Tensor]:
        if self._config.correction is None:
            return gradients
        when(self._claimed > 0, None, self._claim)
        result = list(gradients)
        given = [[gradients[i] for i in positions] for positions in self._positions]
        for i, (velocities, increments) in enumerate(self._advance(gradients, given)):
            self._velocities[i].keep(velocities, increments)
            for position, increment in zip(self._positions[i], increments, strict=True):
                like = gradients[position]
                result[position] = tf.cast(tf.reshape(increment, tf.shape(like)), like.dtype)
        return result

    @property
    def awaits_residuals(self) -> bool:
        """True until the first average, if there is feedback: residuals are laid out when there are gradients."""
        keeps = self._config.correction if self._carrier is None else self._config.feedback
        return keeps is not None and self.state.residuals is None

    def restore_residuals(self, saved: Mapping[str, np.ndarray]) -> None:
        """Take over residuals from a model file, by their names there, when they are laid out."""
        self._saved_residuals = saved

    def _dense_bytes_per_step(self) -> tuple[int, int]:
        # In a warm-up a step's bytes are counted as it is made.
        return _sum_of_bytes(self._stages[0]) if len(self._stages) == 1 else (0, 0)

    def _node_bytes_per_step(self) -> tuple[int, int]:
        each = [channel.node_bytes_per_round() for channel in (self._stages[0] if self._stages else ())]
        return sum(sent for sent, _ in each), sum(received for _, received in each)

    @hosted
    def _claim(self) -> None:
        assert self.state.residuals is not None
        self.state.residuals.claim(self._carrier or AloneCarrier())
        starts = [variable.value() for variable in self.state.residuals.starts]
        agreed = [] if self._carrier is None or not starts else [self._start.agree(ops.pqasgd_digest(tensors=starts))]
        with after(*agreed):
            self._claimed.assign(1)

    def _explain_start(self, data: Bytes) -> None:
        assert self._carrier is not None
        digests = data.view(np.uint64).reshape(self._carrier.size, -1)[:, 0]
        found = format_by_rank(enumerate(f"{digest:016x}" for digest in digests.tolist()))
        raise MismatchError(
            "the ranks do not start from the same factors of low rank: a checkpoint has to be restored on every rank. "
            f"Digests of the values: {found}"
        )


def _sum_of_bytes(channels: Sequence[GraphChannel]) -> tuple[int, int]:
    each = [channel.bytes_per_round() for channel in channels]
    return sum(sent for sent, _ in each), sum(received for _, received in each)


class StockGradients(GradientAverager):
    """Horovod's own allreduce of each gradient, or of groups of them, under names that do not depend on scopes."""

    def __init__(
        self, carrier: HorovodCarrier | None, settings: GradientSettings, compression: Any, itemsize: int | None, *,
        name: str, meeting: Meeting | None = None,
    ) -> None:  # fmt: skip
        super().__init__(carrier, settings, name=name, meeting=meeting)
        self._compression = compression
        self._itemsize = itemsize
        self._dense: list[VariableSpec] = []
        self._groups: list[list[int]] | None = None

    def _build(
        self,
        dense: Sequence[VariableSpec],
        variables: Sequence[Any],
        layout: list[tuple[str, str]],
        sparse: Sequence[SparseSpec],
    ) -> None:
        self._dense = list(dense)
        groups = self._settings.groups
        if isinstance(groups, int) and groups > 0:
            self._groups = [part.tolist() for part in np.array_split(range(len(dense)), groups) if part.size]
        elif not isinstance(groups, int):
            position = {id(unwrap(variable)): i for i, variable in enumerate(variables)}
            keys = ([id(unwrap(member)) for member in group] for group in groups)
            found = ([position[key] for key in group if key in position] for group in keys)
            self._groups = [group for group in found if group]
            grouped = {i for group in self._groups for i in group}
            self._groups += [[i] for i in range(len(dense)) if i not in grouped]
        if self._carrier is not None:
            factor = self._settings.gradient_predivide_factor
            self._agree(layout, groups=self._groups, gradient_predivide_factor=factor)

    def _average_both(
        self, dense: list[tf.Tensor], sparse: list[tf.IndexedSlices], met: Records
    ) -> tuple[list[tf.Tensor], list[tf.IndexedSlices]]:
        rows = [self._average_sparse(number, gradient) for number, gradient in enumerate(sparse)]
        return self._average_dense(dense) if dense else [], rows

    def _average_sparse(self, number: int, gradient: tf.IndexedSlices) -> tf.IndexedSlices:
        """Horovod's way: everybody gets everybody's rows, of each rank each row once."""
        assert self._carrier is not None
        gradient = _coalesced(gradient)
        process_set, name = self._carrier.process_set, f"{self._name}.sparse.{number}"
        device = self._settings.device_sparse
        values = allgather(gradient.values, f"{name}.values", process_set, device)
        indices = allgather(gradient.indices, f"{name}.indices", process_set, device)
        own = _nbytes(gradient.values) + _nbytes(gradient.indices)
        self._counted_sent.assign_add((self._carrier.size - 1) * own)
        self._counted_received.assign_add(_nbytes(values) + _nbytes(indices) - own)
        if self._settings.op == horovod.Average:
            values = values / tf.cast(self._carrier.size, values.dtype)
        return tf.IndexedSlices(values, indices, gradient.dense_shape)

    def _average_dense(self, gradients: list[tf.Tensor]) -> list[tf.Tensor]:
        assert self._carrier is not None
        settings, factor = self._settings, self._settings.gradient_predivide_factor
        options: dict[str, Any] = {
            "device_dense": settings.device_dense,
            "compression": self._compression,
            "op": settings.op,
            "prescale_factor": 1.0 / factor,
            "postscale_factor": factor,
            "process_set": self._carrier.process_set,
            "ignore_name_scope": True,
        }
        result: list[tf.Tensor] = list(gradients)
        if self._groups is None:
            for i, gradient in enumerate(gradients):
                with constant_names():
                    result[i] = horovod.allreduce(gradient, name=f"{self._name}.gradient.{i}", **options)
            return result
        for index, group in enumerate(self._groups):
            with constant_names():
                means = horovod.grouped_allreduce(
                    [gradients[i] for i in group], name=f"{self._name}.group.{index}", **options
                )
            for i, mean in zip(group, means, strict=True):
                result[i] = mean
        return result

    def _dense_bytes_per_step(self) -> tuple[int, int]:
        size = self._carrier.size if self._carrier is not None else 1
        nbytes = sum(spec.numel * (self._itemsize or _ITEMSIZE[spec.description.split()[0]]) for spec in self._dense)
        sent = ring_allreduce_nbytes(nbytes, size, itemsize=1)
        return sent, sent


_ITEMSIZE = {dtype.name: dtype.size for dtype in (tf.float16, tf.bfloat16, tf.float32, tf.float64)}
