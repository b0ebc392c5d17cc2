"""``period>1`` in TensorFlow: the replica of one rank, all of its state in variables, so that a graph can step it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from ..averaging import ExchangeConfig, PeriodicAveraging
from ..averaging.channel import ChannelPlan, group_tensors, plan_channel, warn_of_size
from ..averaging.meeting import Agreement, Purpose
from ..averaging.outer import OuterOptimizer
from ..averaging.pace import unpack_details
from ..averaging.schedule import Observed
from ..averaging.statistics import CommunicationStatistics
from ..averaging.together import NO_ERROR, refused_together, succeed_together, telling
from ..averaging.vector import FlatLayout
from ..errors import CollectiveTimeoutError, MismatchError
from ..exchange.carriers import Bytes, Carrier, Handle
from ..exchange.handshake import verify_same
from ..exchange.plan import num_parts
from ..exchange.wire import format_by_rank
from .carrier import HorovodCarrier
from .delayed import DelayedExchange
from .graph import GraphChannel, Problems, Round
from .library import ops
from .low_rank import make_channel
from .meeting import Meeting, MeetingPoint, Records
from .outer import OuterStepper
from .places import ON_HOST, Place, choose_place, hosted, on_host, places_of
from .residuals import Residuals
from .traced import Traced, after, as_written, counter, outside_of_graphs, when
from .variables import VariableSpec, describe_variables, unwrap

_COUNTERS = ("steps", "rounds", "steps_since_average", "steps_since_round", "period", "has_dropped")


class PeriodicState(tf.Module):
    """What of a replica is saved: counters and anchors. ``tf.train.Checkpoint`` finds it in the optimizer."""

    def __init__(
        self,
        first_period: int,
        dtypes_and_sizes: Sequence[tuple[tf.DType, int]],
        momentum_sizes: Sequence[int],
        plans: Sequence[ChannelPlan],
        delayed: bool,
        ranks_per_node: int | None,
        place: Place,
    ) -> None:
        super().__init__(name="pqasgd")
        with on_host():
            self._make(first_period, dtypes_and_sizes, momentum_sizes, delayed, place)
        self.residuals = Residuals(plans, ranks_per_node=ranks_per_node, place=place)

    def _make(
        self,
        first_period: int,
        dtypes_and_sizes: Sequence[tuple[tf.DType, int]],
        momentum_sizes: Sequence[int],
        delayed: bool,
        place: Place,
    ) -> None:
        self.period = counter("period")
        self.period.assign(first_period)
        self.learning_rate = tf.Variable(-1.0, dtype=tf.float64, trainable=False)  # at the last average
        self.has_dropped = counter("has_dropped")
        self.memory = tf.Variable([0.0, 0.0], dtype=tf.float64, trainable=False)  # the schedule's
        self.distance = tf.Variable(-1.0, dtype=tf.float32, trainable=False)  # from the mean, at the last average
        with place.here():
            self.momentum = [tf.Variable(tf.zeros([size]), trainable=False) for size in momentum_sizes]
        self.outer: list[tf.Variable] = []  # of an optimizer in that place
        self.steps = counter("steps")
        self.rounds = counter("rounds")
        self.steps_since_average = counter("steps_since_average")
        self.steps_since_round = counter("steps_since_round")
        self.anchored = counter("anchored")
        with place.here():
            self.anchors = [
                tf.Variable(tf.zeros([size], dtype), trainable=False, name=f"anchor_{i}")
                for i, (dtype, size) in enumerate(dtypes_and_sizes)
            ]
        # With a delay: when the average under way is due, or -1, the steps when it began, and its fragment.
        self.snapshots: list[tf.Variable] = []
        if delayed and dtypes_and_sizes:
            self.pending = tf.Variable([-1, -1, -1], dtype=tf.int64, trainable=False)
            self.snapshot_owner = tf.Variable([-1, -1], dtype=tf.int64, trainable=False)
            self.pending_learning_rate = tf.Variable(0.0, dtype=tf.float64, trainable=False)
            with place.here():
                self.snapshots = [
                    tf.Variable(tf.zeros([size], dtype), trainable=False) for dtype, size in dtypes_and_sizes
                ]

    def common(self) -> dict[str, tf.Variable]:
        """Return the variables that all ranks have alike, by the names under which a model file holds them."""
        names: tuple[str, ...] = (*_COUNTERS, "anchored", "learning_rate", "memory")
        momentum = {f"momentum.{i}": momentum for i, momentum in enumerate(self.momentum)}
        anchors = {f"anchor.{i}": anchor for i, anchor in enumerate(self.anchors)}
        outer = {f"outer.{i}": variable for i, variable in enumerate(self.outer)}
        names += ("pending", "pending_learning_rate") if self.snapshots else ()
        counters = {name: getattr(self, name) for name in names}
        return {**counters, **anchors, **momentum, **outer, **self.residuals.common()}

    def named(self) -> dict[str, tf.Variable]:
        """Return these, and those that are each rank's own."""
        snapshots = {f"snapshot.{i}": snapshot for i, snapshot in enumerate(self.snapshots)}
        owner = {"snapshot_owner": self.snapshot_owner} if self.snapshots else {}
        return {**self.common(), "distance": self.distance, **self.residuals.named(), **snapshots, **owner}

    def claim_snapshots(self, carrier: Carrier) -> None:
        """Before the first step in a process: a snapshot of another rank says nothing about this one's replica."""
        if not self.snapshots:
            return
        this = tf.constant([carrier.rank, carrier.size], tf.int64)

        @hosted
        def take_anchors() -> None:
            for snapshot, anchor in zip(self.snapshots, self.anchors, strict=True):
                snapshot.assign(anchor)

        when(tf.reduce_all(tf.equal(self.snapshot_owner, this)), None, take_anchors)
        self.snapshot_owner.assign(this)


class PeriodicAverager:
    """The replica of one rank: its anchor, its counters, and the averages it takes part in.

    Use: :meth:`build` once, outside of any graph; then in each step, eagerly or traced, :meth:`before_step`, the local
    update, and :meth:`count_step`. ``carrier`` is None for a rank that trains alone; then steps are counted and nothing
    else happens.
    """

    def __init__(
        self,
        carrier: HorovodCarrier | None,
        averaging: PeriodicAveraging,
        config: ExchangeConfig,
        *,
        name: str,
        check_consistency: bool = False,
        anchor_device: str | None = None,
    ) -> None:
        config.check_for_parameters(averaging)
        self._anchor_device = anchor_device
        self._carrier = carrier
        self.averaging = averaging
        self._config = config
        self._name = name
        self._check_consistency = check_consistency
        self._channels: list[GraphChannel] = []
        self._members: list[list[tf.Variable]] = []
        self._cleared: list[list[tuple[int, int]]] = []  # spans of buffers: their anchor is zero
        self._reset: list[tuple[tf.Variable, float]] = []  # what is reset after an average, and to which number
        self._stepper: OuterStepper | None = None
        self._specs: list[VariableSpec] = []
        self._num_parameters = 0
        self._pending: Handle | None = None
        self._of_fragments: dict[int, Callable[[], None]] = {}
        self._traced = Traced()
        self.state: PeriodicState | None = None
        self.is_laid_out = False
        """Whether the ranks have agreed on what is averaged."""

    @as_written
    def build(self, parameters: Sequence[Any], buffers: Sequence[Any] = (), moments: Sequence[Any] = ()) -> None:
        """Lay out the variables and agree on that; collective. ``moments`` are as the optimizer has begun with them.

        Raises ArgumentError for a variable that cannot be averaged, and MismatchError on every rank if they differ.
        """
        with outside_of_graphs(), on_host():
            if self.averaging.moments == "average":
                buffers = [*buffers, *moments]
            elif self.averaging.moments == "reset" and self._carrier is not None:
                # Keras begins each of them with one number.
                own = [unwrap(moment) for moment in moments]
                self._reset = [(v, float(np.ravel(v.numpy())[0])) for v in own if v.shape.num_elements()]
            self._build(parameters, buffers)

    def _build(self, parameters: Sequence[Any], buffers: Sequence[Any]) -> None:
        specs, digest, place = self._agree_on_layout(parameters, buffers)
        with succeed_together(self._carrier, f"{self._name}.memory"):
            self._build_agreed(parameters, buffers, specs, digest, place)
        self.is_laid_out = True

    def _build_agreed(
        self, parameters: Sequence[Any], buffers: Sequence[Any], specs: list[VariableSpec], digest: int, place: Place
    ) -> None:
        buffer_specs = specs[len(parameters) :]
        by_name = dict(zip((spec.name for spec in specs), map(unwrap, [*parameters, *buffers]), strict=True))
        self._specs = specs[: len(parameters)]
        self._num_parameters = sum(spec.numel for spec in self._specs)
        groups = group_tensors(self._specs, buffer_specs, self._config)
        layouts = [FlatLayout(members) for members, _, _ in groups]
        dtypes = [tf.as_dtype(dtype) for _, dtype, _ in groups]
        sizes = [layout.num_elements for layout in layouts]
        buffer_names = {spec.name for spec in buffer_specs}
        # Of each channel, the elements that an outer optimizer moves: parameters come before buffers.
        outer_sizes = [sum(spec.numel for spec in members if spec.name not in buffer_names) for members, _, _ in groups]
        self._parameter_sizes = outer_sizes
        alone = self._carrier is None
        plans = [
            plan_channel(
                layout,
                self._config,
                way,
                name=self._name,
                index=index,
                size=1 if self._carrier is None else num_parts(self._carrier.nodes or self._carrier),
                selection=self.averaging.selection,
            )
            for index, ((_, _, way), layout) in enumerate(zip(groups, layouts, strict=True))
        ]
        self.state = PeriodicState(
            int(self.averaging.schedule.next_period(0, False)),
            [] if alone else list(zip(dtypes, sizes, strict=True)),
            outer_sizes if self._has_outer and not alone else [],
            [] if alone else plans,
            self.averaging.delay > 0,
            None if self._carrier is None else self._carrier.ranks_per_node,
            place,
        )
        self._learning_rate = tf.Variable(0.0, dtype=tf.float64, trainable=False)  # of the last step
        self._started = counter("started")
        self._total_rounds, self._total_steps = counter("total_rounds"), counter("total_steps")
        self._bytes = [counter(f"{kind}{where}") for where in ("", "_inside_node") for kind in ("sent", "received")]
        self._seconds = tf.Variable(0.0, dtype=tf.float64, trainable=False)
        if self._carrier is None:
            return
        self._problems = Problems(self._name, self._config.nonfinite)
        warn_of_size(plans, self._carrier.nodes or self._carrier, self.averaging)
        residuals = self.state.residuals.of(plans)
        for index, (plan, (members, _, _), layout) in enumerate(zip(plans, groups, layouts, strict=True)):
            anchor = self.state.anchors[index]
            momentum = self.state.momentum[index] if self._has_outer else None
            kept, stepped = residuals[index], isinstance(self.averaging.outer, OuterOptimizer)
            self._channels.append(
                make_channel(
                    plan,
                    self._carrier,
                    digest,
                    self._problems,
                    anchor,
                    momentum,
                    kept,
                    mean_arrives=stepped,
                    place=place,
                )
            )
            self._members.append([by_name[spec.name] for spec in members])
            self._cleared.append(
                [
                    (layout.offsets[i], layout.offsets[i + 1])
                    for i, spec in enumerate(members)
                    if spec.name in buffer_names
                ]
            )
        if isinstance(self.averaging.outer, OuterOptimizer):
            shapes = [
                [by_name[spec.name].shape for spec in members if spec.name not in buffer_names]
                for members, _, _ in groups
            ]
            self._stepper = OuterStepper(self.averaging.outer.optimizer, self._channels, shapes)
            self.state.outer = self._stepper.variables()
        if self.state.snapshots:
            self._delayed = DelayedExchange(self._exchange_snapshots)
            self._details = tf.Variable(tf.zeros([self._carrier.size], tf.int64), trainable=False)
            self._flags = [tf.Variable(tf.zeros([len(plan.sizes)], tf.int32), trainable=False) for plan in plans]
        self._meeting = Meeting(self._carrier, self._name)
        self._start = MeetingPoint(self._carrier, f"{self._name}.start", self._explain_start)
        self._consistency = MeetingPoint(self._carrier, f"{self._name}.consistency", self._explain_consistency)

    def _agree_on_layout(
        self, parameters: Sequence[Any], buffers: Sequence[Any]
    ) -> tuple[list[VariableSpec], int, Place]:
        """Return the specs of all variables, the digest of what the ranks agree on, and where averages are made."""
        name = f"{self._name}.layout"
        with refused_together(telling(self._carrier, name)):
            specs = describe_variables([*parameters, *buffers])
            if self._carrier is None:
                return specs, 0, ON_HOST
            place = choose_place(places_of(specs, [*parameters, *buffers]), self._anchor_device)
        first = len(parameters)
        description = {
            **NO_ERROR,
            "averaging": self.averaging.config(),
            "exchange": self._config.config(),
            "parameters": {spec.name: spec.description for spec in specs[:first]},
            "buffers": {spec.name: spec.description for spec in specs[first:]},
            "parameter_order": [spec.name for spec in specs[:first]],
            "buffer_order": [spec.name for spec in specs[first:]],
            **self._config.describe_codecs(specs[:first]),
        }
        return specs, verify_same(self._carrier, description, name), place

    # ---- in a graph, or eagerly ----

    @as_written
    def before_step(self) -> None:
        """Before the first local update: take anchors, which must be the same on every rank."""
        if self._carrier is not None:
            self._traced(self._before_step)

    @hosted
    def _before_step(self) -> None:
        when(self._started > 0, None, self._begin)

    @hosted
    def _begin(self) -> None:
        assert self.state is not None
        assert self._carrier is not None
        when(self.state.anchored > 0, None, self._capture)
        self.state.residuals.claim(self._carrier)
        self.state.claim_snapshots(self._carrier)
        # Of each tensor by itself, so that an error can name it.
        digests = [ops.pqasgd_digest(tensors=tf.split(anchor, layout.sizes())) for anchor, layout in self._anchors()]
        counters = [getattr(self.state, name).value() for name in _COUNTERS]
        starts = [variable.value() for variable in self.state.residuals.starts]
        if starts:
            digests.append(ops.pqasgd_digest(tensors=starts))
        record = tf.concat([tf.stack(counters), *digests], 0)
        self._start.agree(record)
        self._started.assign(1)

    def _anchors(self) -> list[tuple[tf.Variable, FlatLayout]]:
        assert self.state is not None
        layouts = [channel.plan.layout for channel in self._channels]
        return list(zip(self.state.anchors, layouts, strict=True))

    @hosted
    def _capture(self) -> None:
        assert self.state is not None
        for (anchor, _), members, cleared in zip(self._anchors(), self._members, self._cleared, strict=True):
            with tf.device(anchor.device):
                flat = [tf.reshape(tf.cast(variable.value(), anchor.dtype), [-1]) for variable in members]
                anchor.assign(tf.concat(flat, 0))
            _clear(anchor, cleared)
        self.state.anchored.assign(1)

    @property
    def _has_outer(self) -> bool:
        return self.averaging.outer.coefficients(1.0) is not None

    @as_written
    def count_step(self, learning_rate: tf.Tensor | float = 0.0) -> None:
        """Count a local step, taken or skipped, and average if the schedule says so; collective then.

        ``learning_rate`` is that of the step; schedules and outer optimizers may depend on it. On an error every rank
        raises the same, with parameters and anchor untouched; the next step then tries again.
        """
        self._traced(self._count_step, tf.cast(learning_rate, tf.float64))

    @hosted
    def _count_step(self, learning_rate: tf.Tensor) -> None:
        assert self.state is not None
        if self.averaging.uses_learning_rate:  # else it is not compared, so that nothing may depend on it
            # Rounded, as the ranks tell it each other: see averaging/pace.py.
            self._learning_rate.assign(tf.cast(tf.cast(learning_rate, tf.float32), tf.float64))
        self.state.steps.assign_add(1)
        self._total_steps.assign_add(1)
        self.state.steps_since_average.assign_add(1)
        self.state.steps_since_round.assign_add(1)
        if self.state.snapshots:
            due = self.state.pending[0]
            when((due >= 0) & (self.state.steps >= due), self._land)
            when(self.state.steps_since_round >= self.state.period, self._begin_delayed)
        else:
            when(self.state.steps_since_round >= self.state.period, self._meet_and_average)

    @hosted
    def _meet_and_average(self) -> None:
        assert self.state is not None
        if self._carrier is not None:
            steps, rounds = self.state.steps.value(), self.state.rounds.value()
            met = self._meeting.agree(Purpose.AVERAGE, steps, rounds, self._detail())
            with after(met.words):
                self._average_turn(met)
        else:
            self._average(None)

    @hosted
    def _average_turn(self, met: Records, absent: bool = False) -> None:
        """Average what is due: all, or the fragment whose turn it is."""
        self._select(self._turn(), lambda fragment: self._average(met, fragment, absent))

    @hosted
    def _serve_turn(self, met: Records) -> None:
        """Do so with nothing to give."""
        self._average_turn(met, absent=True)

    @hosted
    def _serve(self, met: Records) -> None:
        """Average all with nothing to give."""
        self._average(met, absent=True)

    def _turn(self) -> tf.Tensor:
        """Return the fragment whose turn it is; -1: all coordinates are averaged together."""
        assert self.state is not None
        if not self.averaging.is_sparse:
            return tf.constant(-1, tf.int64)
        return self.state.rounds.value() % self.averaging.selection.num_fragments

    def _select(self, turn: tf.Tensor, act: Callable[[int | None], None]) -> None:
        """Call ``act`` with the fragment whose turn it is, or None."""
        if not self.averaging.is_sparse:
            act(None)
            return

        def branch(fragment: int) -> Callable[[], tf.Tensor]:
            def run() -> tf.Tensor:
                act(fragment)
                return tf.constant(True)

            return run

        fragments = range(self.averaging.selection.num_fragments)
        tf.switch_case(tf.cast(turn, tf.int32), {fragment: branch(fragment) for fragment in fragments})

    # ---- with a delay ----

    @hosted
    def _begin_delayed(self) -> None:
        """Take a snapshot, and let the exchange of it run beside the next steps."""
        assert self.state is not None
        began = ops.pqasgd_clock()
        state, turn = self.state, self._turn()

        @hosted
        def take(fragment: int | None) -> None:
            for channel, snapshot, members in zip(self._channels, state.snapshots, self._members, strict=True):
                channel.take_snapshot(snapshot, [variable.value() for variable in members], fragment)

        with after(began):
            self._select(turn, take)
        # TensorFlow orders what touches a variable: these wait for the copies, and the thread for these.
        copied = [snapshot.value() for snapshot in state.snapshots]
        steps = state.steps.value()
        with after(*copied):
            ticket = state.pending.assign(tf.stack([steps + self.averaging.delay, steps, turn]), read_value=True)
            rate = state.pending_learning_rate.assign(self._learning_rate.value(), read_value=True)
            state.steps_since_round.assign(0)
        with after(rate, self._delayed.start(tf.identity(ticket)[1:])):
            self._seconds.assign_add(ops.pqasgd_clock() - began)

    def _exchange_snapshots(self, fragment: int) -> None:
        """Exchange them, in a thread; the main one reads what this writes when it is over."""
        self._traced(self._exchange_all if fragment < 0 else self._exchange_fragment(fragment))

    def _exchange_fragment(self, fragment: int) -> Callable[[], None]:
        if fragment not in self._of_fragments:
            self._of_fragments[fragment] = lambda: self._exchange_all(fragment)
        return self._of_fragments[fragment]

    @hosted
    def _exchange_all(self, fragment: int | None = None) -> None:
        assert self.state is not None
        steps, rounds = self.state.pending[1], self.state.rounds.value()
        rate = tf.cast(self.state.pending_learning_rate.value(), tf.float32)
        met = self._meeting.agree(Purpose.AVERAGE, steps, rounds, self._detail(rate))
        with after(met.words):
            round_ = Round(steps, rounds, met.scale)
            flags = [
                channel.exchange_vector(snapshot.value(), round_, fragment)
                for channel, snapshot in zip(self._channels, self.state.snapshots, strict=True)
            ]
        all_flags = [flag for of_channel in flags for flag in of_channel]
        with after(*([self._problems.verdict(all_flags)] if all_flags else [])):
            self._details.assign(met.details)
            for kept, of_channel in zip(self._flags, flags, strict=True):
                if of_channel:
                    kept[: len(of_channel)].assign(tf.stack([tf.reshape(flag, []) for flag in of_channel]))

    @hosted
    def _land(self) -> None:
        """Apply the average under way; raise what went wrong with it, and forget it then."""
        assert self.state is not None
        state, began = self.state, ops.pqasgd_clock()
        with after(began):
            pending = tf.identity(state.pending.value())
            failed = self._delayed.wait(pending[1:])
        again = tf.where(failed > 0, state.period.value(), state.steps_since_round.value())
        with after(failed):
            forgotten = [
                state.pending.assign([-1, -1, -1], read_value=True),
                state.steps_since_round.assign(again, read_value=True),  # so that the next step tries again
            ]
        with after(*forgotten):
            verdict = self._delayed.verdict(failed)
        with after(verdict):
            self._select(pending[2], lambda fragment: self._apply_landed(pending[1], fragment))
        with after(state.rounds.value()):
            self._seconds.assign_add(ops.pqasgd_clock() - began)

    @hosted
    def _apply_landed(self, began_at: tf.Tensor, fragment: int | None) -> None:
        assert self.state is not None
        state, rate = self.state, self.state.pending_learning_rate.value()
        if self._stepper is not None:
            self._stepper.step()
        coefficients = self._coefficients(rate)
        for i, (channel, members) in enumerate(zip(self._channels, self._members, strict=True)):
            flags = tf.unstack(self._flags[i].value())[: len(channel.limits(fragment)) // 2]
            channel.keep_residuals(flags, fragment)
            channel.commit_since(state.snapshots[i], members, self._parameter_sizes[i], coefficients, fragment)
            self._count_bytes(channel, fragment)
        self._clear_buffers()
        state.rounds.assign_add(1)
        self._total_rounds.assign_add(1)
        if fragment is None:
            since = state.steps_since_average.value()
            state.steps_since_average.assign(tf.where(began_at == state.steps, tf.zeros_like(since), since))
        self._advance(self._details.value(), began_at, rate)
        self._verify()

    def settle(self) -> None:
        """Wait for a thread that exchanges, before the state that it reads is replaced."""
        if self.state is not None and self.state.snapshots:
            self._delayed.join()

    def _detail(self, rate: tf.Tensor | None = None) -> tf.Tensor:
        """Return what ranks tell each other: learning rate and distance, as :meth:`Pace.detail` packs them."""
        assert self.state is not None
        zero = tf.zeros([], tf.float32)
        if rate is None:
            rate = tf.cast(self._learning_rate.value(), tf.float32)
        rate = rate if self.averaging.uses_learning_rate else zero
        distance = self.state.distance.value() if self.averaging.schedule.uses_drift else zero
        return tf.bitcast(tf.stack([rate, distance]), tf.int64)

    def _coefficients(self, now: tf.Tensor) -> tf.Tensor | None:
        """Return the outer step of an average at this learning rate."""
        assert self.state is not None
        if not self._has_outer:
            return None
        before = self.state.learning_rate.value()
        ratio = tf.where(before < 0, tf.ones_like(now), tf.math.divide_no_nan(now, before))
        coefficients = self.averaging.outer.coefficients(ratio)
        assert coefficients is not None
        return tf.stack([tf.cast(number, tf.float32) for number in coefficients])

    def _advance(self, details: tf.Tensor | None, steps: tf.Tensor, now: tf.Tensor) -> None:
        """Decide on the next period, after an average of what there was after ``steps``, at a learning rate.

        The ranks have said ``details`` in it.
        """
        assert self.state is not None
        before = self.state.learning_rate.value()
        dropped = tf.cast((before >= 0) & (now < before), tf.int64)
        has_dropped = self.state.has_dropped.assign(tf.maximum(self.state.has_dropped, dropped), read_value=True)
        self.state.learning_rate.assign(now)
        drift = tf.constant(-1.0, tf.float64)
        if details is not None and self.averaging.schedule.uses_drift:
            distances = tf.cast(tf.bitcast(details, tf.float32)[:, 1], tf.float64)
            known = tf.boolean_mask(distances, ~(distances < 0))  # not at first, and not on a rank that was absent
            drift = tf.where(tf.size(known) > 0, tf.reduce_mean(known), drift)
        memory = tf.unstack(self.state.memory.value())
        seen = Observed(steps, tf.cast(has_dropped, tf.bool), now, drift, self.state.period.value(), memory)
        period, remembered = self.averaging.schedule.advance(seen, xp=tf)
        self.state.period.assign(tf.cast(period, tf.int64))
        self.state.memory.assign(tf.stack(list(remembered)))

    @hosted
    def _average(self, met: Records | None, fragment: int | None = None, absent: bool = False) -> None:
        """Average all, or a fragment; ``met`` is what all ranks have said, this one that it is ``absent``."""
        assert self.state is not None
        began = ops.pqasgd_clock()
        with after(began):
            scale = 1.0 if met is None else met.scale
            round_ = Round(self.state.steps.value(), self.state.rounds.value(), scale)
            flags = [
                channel.exchange_nothing(round_, fragment)
                if absent
                else channel.exchange([variable.value() for variable in members], round_, fragment)
                for channel, members in zip(self._channels, self._members, strict=True)
            ]
        coefficients = self._coefficients(self._learning_rate.value())
        all_flags = [flag for of_channel in flags for flag in of_channel]
        with after(*([self._problems.verdict(all_flags)] if all_flags else [])):
            if self._channels and self.averaging.schedule.uses_drift:
                self._measure_distance(fragment, absent)
            if self._stepper is not None:
                self._stepper.step()
            for channel, members, of_channel in zip(self._channels, self._members, flags, strict=True):
                channel.keep_residuals(of_channel, fragment, absent=absent)
                channel.commit(members, coefficients, fragment)
                self._count_bytes(channel, fragment)
            self._clear_buffers()
            for variable, number in self._reset:
                variable.assign(tf.fill(variable.shape, tf.cast(number, variable.dtype)))
            done = self.state.rounds.assign_add(1)
            self._total_rounds.assign_add(1)
            self.state.steps_since_round.assign(0)
            if fragment is None:
                self.state.steps_since_average.assign(0)
            details = None if met is None else met.details
            self._advance(details, self.state.steps.value(), self._learning_rate.value())
        self._verify()
        with after(done):
            self._seconds.assign_add(ops.pqasgd_clock() - began)

    def _count_bytes(self, channel: GraphChannel, fragment: int | None) -> None:
        counts = (*channel.bytes_per_round(fragment), *channel.node_bytes_per_round(fragment))
        for total, count in zip(self._bytes, counts, strict=True):
            total.assign_add(count)

    def _clear_buffers(self) -> None:
        for (anchor, _), cleared in zip(self._anchors(), self._cleared, strict=True):
            _clear(anchor, cleared)

    def _verify(self) -> None:
        if self._check_consistency and self._channels:
            anchors = [anchor.value() for anchor, _ in self._anchors()]
            self._consistency.agree(ops.pqasgd_digest(tensors=anchors))

    def _measure_distance(self, fragment: int | None, absent: bool) -> None:
        assert self.state is not None
        if absent:
            self.state.distance.assign(-1.0)
            return
        total = tf.add_n(
            [
                channel.distance([variable.value() for variable in members], size, fragment)
                for channel, members, size in zip(self._channels, self._members, self._parameter_sizes, strict=True)
            ]
        )
        self.state.distance.assign(tf.cast(total, tf.float32))

    # ---- eagerly ----

    def flush(self, timeout: float | None = None) -> None:
        """Average a last partial period; collective, but nothing happens if no step was made since the last average.

        An average under way is applied first. With ``timeout`` the ranks first wait for each other, and raise
        CollectiveTimeoutError, nothing lost, if one does not come in that many seconds.
        """
        if self.state is None or int(self.state.steps_since_average) == 0:
            return
        if self._carrier is None:
            self._traced(self._average, None)
            return
        is_pending = self._is_pending
        if is_pending:
            self._delayed.join(timeout)
            if self._delayed.error is not None:
                self._traced(self._land)  # which raises it, as on all ranks; nobody would come to the meeting
                is_pending = False  # it was the error of an earlier one
        if timeout is not None:
            self._wait_for_all(timeout)
        _, met = self._meet(Purpose.FLUSH, int(self.state.steps))
        if is_pending:
            self._traced(self._land)
            if int(self.state.steps_since_average) == 0:
                return
        self._traced(self._average, met)

    @property
    def _is_pending(self) -> bool:
        assert self.state is not None
        return bool(self.state.snapshots) and int(self.state.pending[0]) >= 0

    def _meet(self, purpose: Purpose, steps: int) -> tuple[Agreement, Records]:
        assert self.state is not None
        return self._meeting.meet(purpose, steps, int(self.state.rounds), int(self._detail()))

    def join(self) -> int:
        """Take part in the averages of ranks that have more data, until none has; return the rank that joined last.

        As :meth:`pqasgd_horovod.averaging.periodic.PeriodicAverager.join`; :meth:`build` first.
        """
        assert self.state is not None
        state = self.state
        if self._carrier is None:
            self.flush()
            return 0
        self.before_step()  # where no step was made
        if self._is_pending:
            self._delayed.join()
            self._traced(self._land)
        own_steps = int(state.steps)
        # In how many averages something of this rank is left: one for each part, but for that of the last step.
        rounds_left = self.averaging.selection.num_fragments - (int(state.steps_since_round) == 0)
        rounds_left *= int(state.steps_since_average) > 0
        while True:
            agreement, met = self._meet(Purpose.LAST if rounds_left else Purpose.JOINED, own_steps)
            self._catch_up(agreement)
            if agreement.has_ended:
                if agreement.num_counted:
                    self._traced(self._average if rounds_left else self._serve, met)
                state.steps_since_average.assign(0)
                return agreement.last
            if self.averaging.is_sparse:
                self._traced(self._average_turn if rounds_left else self._serve_turn, met)
            else:
                self._traced(self._average if rounds_left else self._serve, met)
            rounds_left = max(0, rounds_left - 1)

    @property
    def num_steps(self) -> int:
        """How many steps were counted."""
        assert self.state is not None
        return int(self.state.steps)

    def _catch_up(self, met: Agreement) -> None:
        """Count the steps that others have made meanwhile, with their learning rate."""
        assert self.state is not None
        missed = met.steps - int(self.state.steps)
        for variable in (self.state.steps, self.state.steps_since_average, self._total_steps):
            variable.assign_add(missed)
        self._learning_rate.assign(unpack_details(met.details_of_training)[0][0])

    def _wait_for_all(self, timeout: float) -> None:
        """Wait under a name of its own: whoever gives up and trains on meets the others under the usual one."""
        assert self._carrier is not None
        assert self.state is not None
        if self._pending is None:
            self._pending = self._carrier.allgather(f"{self._name}.waiting", np.zeros(1, np.uint8))
        try:
            self._pending.wait(timeout)
        except CollectiveTimeoutError:
            raise CollectiveTimeoutError(
                f"{int(self.state.steps_since_average)} steps were made since the last average, and averaging them "
                f"takes every rank, but not every rank called flush(timeout=...) within {timeout} s: call it on every "
                "rank, with a timeout or without one on all of them"
            ) from None
        self._pending = None

    def communication_stats(self) -> dict[str, Any]:
        """Return running totals; see :class:`~pqasgd_horovod.averaging.statistics.CommunicationStatistics`."""
        statistics = CommunicationStatistics.of(None if self._carrier is None else self._carrier.nodes or self._carrier)
        if self.state is None:
            return statistics.as_dict(0, 0)
        statistics.count_steps(int(self._total_steps), self._num_parameters)
        statistics.rounds = int(self._total_rounds)
        statistics.exchange_seconds = float(self._seconds)
        return statistics.as_dict(*map(int, self._bytes))

    # ---- what is wrong, in words ----

    def _explain_start(self, data: Bytes) -> None:
        assert self._carrier is not None
        names = [
            *_COUNTERS,
            *(f"parameters.{name}" for channel in self._channels for name in channel.plan.layout.names),
            *(f"factors of {c.plan.layout.names[0]} and others" for c in self._channels if c.plan.low_rank is not None),
        ]
        raise MismatchError(
            "the ranks do not start from the same parameters: before the first step call "
            "hvd.broadcast_variables(model.variables, root_rank=0), or give model.fit the "
            "BroadcastGlobalVariablesCallback(0); a checkpoint has to be restored on every rank. Counters and digests "
            f"of the values: {_difference(names, data, self._carrier.size)}"
        )

    def _explain_consistency(self, data: Bytes) -> None:
        assert self._carrier is not None
        names = [channel.plan.name for channel in self._channels]
        raise MismatchError(
            f"replicas differ after an average, which must not happen: {_difference(names, data, self._carrier.size)}"
        )


def _difference(names: Sequence[str], data: Bytes, size: int) -> str:
    """Name the first of the numbers that all ranks have sent in which they differ."""
    records = data.view(np.int64).reshape(size, -1)
    if records.shape[1] != len(names):
        return f"the ranks have sent {records.shape[1]} numbers, {len(names)} were expected"
    index = int(np.flatnonzero((records != records[0]).any(axis=0))[0])
    numbers = [
        number if names[index] in _COUNTERS else f"{number & 2**64 - 1:016x}" for number in records[:, index].tolist()
    ]
    return f"the ranks have to agree on {names[index]}: it is {format_by_rank(enumerate(numbers))}"


def _clear(anchor: tf.Variable, spans: Sequence[tuple[int, int]]) -> None:
    for start, stop in spans:
        anchor[start:stop].assign(tf.zeros([stop - start], anchor.dtype))
