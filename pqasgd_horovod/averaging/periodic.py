"""PQASGD: local steps, and every period an exchange of what changed since the anchor."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from .. import native
from ..codecs.base import FLOAT32
from ..errors import ArgumentError, CollectiveTimeoutError, MismatchError
from ..exchange.carriers import Carrier
from ..exchange.handshake import HANDSHAKE_TIMEOUT_SECONDS, verify_same
from ..exchange.placement import verify_and_place
from ..exchange.plan import num_parts
from .background import Background
from .channel import Channel, ChannelSet, digest_arrays, digest_tensors, group_tensors, plan_channel, warn_of_size
from .config import ExchangeConfig, Way
from .counted import CountedStatistics, gather_most_counted
from .meeting import Agreement, Meeting, Purpose
from .moments import Moments, common_moments
from .outer import OuterOptimizer, OuterStepper
from .pace import Pace, check_learning_rates, rounded, unpack_details
from .state import ARRAYS, STATE_VERSION, Arrays, check_state, copied, no_arrays, owner_of, saved_config, taken_over
from .statistics import CommunicationStatistics
from .strategy import PeriodicAveraging
from .together import NO_ERROR, refused_together, succeed_together, telling
from .vector import AnchorArray, FlatVector, TensorView, common_device

if TYPE_CHECKING:
    from ..native.cuda import Device


@dataclasses.dataclass(frozen=True)
class _Pending:
    """An average that is under way, and applied later."""

    exchange: Background[Agreement]
    """What the ranks have told each other comes out of it; until then the channels' exchanges are its own."""
    steps: int
    """Steps at the snapshot."""
    due: int
    """After which step it is applied."""
    learning_rate: float
    fragment: int | None
    byte_counts: tuple[int, ...]
    """Before it."""


class PeriodicAverager:
    """The replica of one rank: its anchor, its counters, and the averages it takes part in.

    Use: :meth:`prepare` before each local update, :meth:`count_step` after it. Both are collective at times: every rank
    has to make the same calls. ``carrier`` is None for a rank that trains alone; then steps are counted and nothing
    else happens. ``moments`` is needed where ``averaging.moments`` is not ``"local"``, ``outer_stepper`` where
    ``averaging.outer`` is an :class:`~.outer.OuterOptimizer`.
    """

    def __init__(
        self,
        carrier: Carrier | None,
        averaging: PeriodicAveraging,
        config: ExchangeConfig,
        *,
        name: str,
        check_consistency: bool = False,
        moments: Moments | None = None,
        outer_stepper: OuterStepper | None = None,
    ) -> None:
        config.check_for_parameters(averaging)
        self._carrier = carrier if carrier is not None and carrier.size > 1 else None
        self._stepper = outer_stepper if isinstance(averaging.outer, OuterOptimizer) else None
        self._moments = moments
        self._parameters: Sequence[TensorView] = ()
        self._buffers: Sequence[TensorView] = ()
        self._counted: Sequence[CountedStatistics] = ()
        self._averaging = averaging
        self._config = config
        self._name = name
        self._check_consistency = check_consistency
        self._channels = ChannelSet()
        self._prepared = False
        self._buffer_names: frozenset[str] = frozenset()
        self._restored = no_arrays()
        self._pace = Pace(averaging)
        self._learning_rate = 0.0
        self._meeting = Meeting(self._carrier, name) if self._carrier is not None else None
        self._num_parameters = 0
        self.statistics = CommunicationStatistics.of(self._carrier)
        self.steps = 0
        self.rounds = 0
        self.steps_since_average = 0
        """Steps since all replicas were the same."""
        self._steps_since_round = 0
        self._pending: _Pending | None = None

    @property
    def prepared(self) -> bool:
        """Whether the anchor is there."""
        return self._prepared

    def prepare(
        self,
        parameters: Sequence[TensorView],
        buffers: Sequence[TensorView] = (),
        counted: Sequence[CountedStatistics] = (),
    ) -> None:
        """Lay out the tensors and take anchors; collective.

        Buffers become the mean of their values, ``counted`` statistics those of the rank with the most batches.
        Tensors that had an anchor keep it, also in the middle of a period; the others take a restored anchor, or else
        their present value, which must be the same on every rank. Raises MismatchError on every rank if layout,
        counters or anchors differ, and changes nothing then. An average under way is applied first.
        """
        self._land(HANDSHAKE_TIMEOUT_SECONDS)
        self._num_parameters = sum(tensor.numel for tensor in parameters)
        if self._carrier is None:
            self._restored = no_arrays()
            self._prepared = True
            return
        self._lay_out(parameters, buffers, counted)
        self._parameters, self._buffers, self._counted = parameters, buffers, counted

    def refused_together(self, has_met: bool = False) -> AbstractContextManager[None]:
        """Look at tensors before :meth:`prepare`: the other ranks, on their way there, learn of an error.

        All raise MismatchError then, unless all have the same one.
        """

        def tell(refusal: Mapping[str, Any]) -> None:
            self._land(HANDSHAKE_TIMEOUT_SECONDS)  # as they do
            self._compare_layouts(refusal, None, has_met)

        return refused_together(None if self._carrier is None else tell)

    def _compare_layouts(
        self, description: Mapping[str, Any], device: Device | None, has_met: bool
    ) -> tuple[int, bool]:
        assert self._carrier is not None
        assert self._meeting is not None
        if not has_met:
            self._meeting.announce(Purpose.LAYOUT, self.steps, self.rounds)
            self._meeting.agree(HANDSHAKE_TIMEOUT_SECONDS)
        return verify_and_place(self._carrier, description, device, f"{self._name}.layout")

    def _lay_out(
        self,
        parameters: Sequence[TensorView],
        buffers: Sequence[TensorView],
        counted: Sequence[CountedStatistics],
        has_met: bool = False,
    ) -> None:
        assert self._carrier is not None
        arrays = self._arrays()
        anchors = arrays["anchor"]
        buffer_names = frozenset(tensor.name for tensor in buffers)
        layout: list[tuple[FlatVector, AnchorArray, Way]] = []
        digests: dict[str, str] = {}
        with self.refused_together(has_met):
            device = common_device([*parameters, *buffers])
            for tensors, dtype, way in group_tensors(parameters, buffers, self._config):
                vector = FlatVector(tensors)
                anchor = vector.gather(dtype)
                for i, tensor in enumerate(tensors):
                    if tensor.name in buffer_names:
                        # Buffers are averaged as values: the change from zero.
                        anchor[vector.span(i)] = 0
                    elif tensor.name in anchors:
                        anchor[vector.span(i)] = anchors[tensor.name]
                digests.update(digest_tensors(vector, anchor))
                layout.append((vector, anchor, way))
        digest, device_messages = self._agree(
            parameters, buffers, counted, device, digests, digest_arrays(arrays["factor"]), has_met
        )
        plans = [
            plan_channel(
                vector,
                self._config,
                way,
                name=self._name,
                index=index,
                size=num_parts(self._carrier),
                selection=self._averaging.selection,
            )
            for index, (vector, _, way) in enumerate(layout)
        ]
        warn_of_size(plans, self._carrier, self._averaging)
        with succeed_together(self._carrier, f"{self._name}.memory"):
            channels = [
                Channel(
                    vector,
                    plan,
                    anchor,
                    carrier=self._carrier,
                    config=self._config,
                    digest=digest,
                    device_messages=device_messages,
                )
                for plan, (vector, anchor, _) in zip(plans, layout, strict=True)
            ]
            for channel in channels:
                if self._pace.coefficients(0.0) is not None:
                    _hold_momentum(channel, buffer_names, arrays["momentum"])
                elif self._stepper is not None:
                    channel.move_by_outer(_parameter_elements(channel, buffer_names), holds_momentum=False)
                channel.restore(arrays)
                channel.reserve(snapshots=self._averaging.delay > 0, distances=self._pace.uses_drift)
        self._channels.replace(channels)
        self._buffer_names = buffer_names
        if self._stepper is not None:
            self._stepper.place({name: anchor for name, (anchor, _) in self._moved().items()})
        self._restored = no_arrays()
        self._prepared = True

    def _step_outer(self) -> None:
        """Let an optimizer of the framework move the anchors, if there is one, in place of the means."""
        if self._stepper is not None and self._carrier is not None:
            moved = self._moved()
            self._stepper.step(moved)
            for _, mean in moved.values():
                mean[:] = 0  # the anchor has moved

    def _moved(self) -> dict[str, tuple[AnchorArray, FLOAT32]]:
        """Return anchor and mean of each parameter, in their order in memory, for an outer optimizer."""
        return {name: pair for channel in self._channels for name, pair in channel.anchors_and_means().items()}

    def _agree(
        self,
        parameters: Sequence[TensorView],
        buffers: Sequence[TensorView],
        counted: Sequence[CountedStatistics],
        device: Device | None,
        digests: Mapping[str, str],
        factors: Mapping[str, str],
        has_met: bool,
    ) -> tuple[int, bool]:
        assert self._carrier is not None
        description = {
            **NO_ERROR,
            "averaging": self._averaging.config(),
            "exchange": self._config.config(),
            "parameters": {tensor.name: tensor.description for tensor in parameters},
            "buffers": {tensor.name: tensor.description for tensor in buffers},
            "parameter_order": [tensor.name for tensor in parameters],
            "buffer_order": [tensor.name for tensor in buffers],
            "counted": [f"{layer.name}: {layer.description}" for layer in counted],
            **self._config.describe_codecs(parameters),
        }
        agreed = self._compare_layouts(description, device, has_met)
        counters = {
            "steps": self.steps,
            "rounds": self.rounds,
            "steps_since_average": self.steps_since_average,
            "pace": self._pace.common_state(),
        }
        try:
            start = {**counters, "parameters": digests, "factors": factors}
            verify_same(self._carrier, start, f"{self._name}.start")
        except MismatchError as error:
            raise MismatchError(
                "the ranks do not start from the same parameters: before the first step call "
                "hvd.broadcast_parameters(model.state_dict(), root_rank=0) and, if one rank loaded a checkpoint, "
                f"hvd.broadcast_optimizer_state(optimizer, root_rank=0). Counters and digests of the values: {error}"
            ) from None
        return agreed

    def count_step(self, learning_rate: float = 0.0) -> None:
        """Count a local step, taken or skipped, and average if the schedule says so; collective then.

        With a delay an average begins then, and is applied by the call after that many more steps. ``learning_rate`` is
        that of the step; schedules and outer optimizers may depend on it. Raises NonFiniteError or DesynchronizedError
        on every rank, with parameters and anchor untouched; the next step then tries again.
        """
        self.steps += 1
        self.steps_since_average += 1
        self._steps_since_round += 1
        # Else it is not compared, so that nothing may depend on it.
        self._learning_rate = rounded(learning_rate) if self._averaging.uses_learning_rate else 0.0
        self.statistics.count_step(self._num_parameters)
        if self._pending is not None and self.steps >= self._pending.due:
            self._land()
        if self._steps_since_round >= self._pace.period:
            self._announce(Purpose.AVERAGE, self.steps)
            fragment = self._fragment()
            if self._averaging.delay and self._carrier is not None:
                self._begin(fragment)
            else:
                self._average(None, fragment)

    def _fragment(self) -> int | None:
        """Return which part of the coordinates the next average is about; None: all of them."""
        return self.rounds % self._averaging.selection.num_fragments if self._averaging.is_sparse else None

    def _announce(self, purpose: Purpose, steps: int) -> None:
        if self._meeting is not None:
            self._meeting.announce(purpose, steps, self.rounds, self._pace.detail(self._learning_rate))

    def _average(self, met: Agreement | None, fragment: int | None = None, is_last: bool = True) -> None:
        """Average all, or a fragment: anchor += mean of the decoded changes, parameters = anchor.

        ``met`` is what the ranks have told each other if they have met already. Unless it ``is_last`` others have made
        steps when they apply it.
        """
        started = time.perf_counter()
        if self._carrier is not None and self._averaging.moments == "average":
            if met is None:
                assert self._meeting is not None
                met = self._meeting.agree()
            self._place_moments(self._carrier)
        absent = self._carrier is not None and met is not None and met.is_absent(self._carrier.rank)
        # Every source first: it fails if a tensor has changed, and nothing may be in flight then.
        targets = [(channel, channel.source()) for channel in self._channels]
        sources = [(channel, channel.nothing() if absent else channel.coded(target)) for channel, target in targets]
        met = self._exchange(sources, self.steps, fragment, met)
        adopt = self._gather_counted(fragment)
        if self._pace.uses_drift:
            # Before an outer optimizer: what counts is how far the ranks are from each other.
            distances = (
                channel.distance(_parameter_elements(channel, self._buffer_names)) for channel in self._channels
            )
            self._pace.distance = -1.0 if absent else sum(distances)
        self._step_outer()
        outer = self._pace.coefficients(self._learning_rate)
        for channel, target in targets:
            channel.apply(target, outer, absent)
            self._clear_buffer_anchors(channel)
        adopt()
        self._steps_since_round = 0
        if fragment is None and is_last:
            self.steps_since_average = 0
        if self._carrier is not None and self._averaging.moments == "reset":
            assert self._moments is not None
            self._moments.reset()
        self._complete(self.steps, self._learning_rate, met)
        self.statistics.exchange_seconds += time.perf_counter() - started
        self._verify(anchors=self.steps_since_average > 0)

    def _exchange(
        self,
        sources: Sequence[tuple[Channel, native.Source]],
        steps: int,
        fragment: int | None,
        met: Agreement | None = None,
    ) -> Agreement:
        """Send and receive; return what the ranks have told each other."""
        for channel, source in sources:
            channel.begin(source, step=steps, round=self.rounds, fragment=fragment)
        if met is None:
            met = Agreement() if self._meeting is None else self._meeting.agree()
        self._channels.finish(met.scale)
        check_learning_rates(met.details_of_training)
        return met

    def _complete(self, steps: int, learning_rate: float, met: Agreement) -> None:
        """Count an average of what there was after ``steps``."""
        self._pace.advance(steps, learning_rate, met.details)
        self.rounds += 1
        self.statistics.rounds += 1

    def _verify(self, anchors: bool) -> None:
        if self._check_consistency and self._carrier is not None:
            self._channels.verify_replicas(self._carrier, self._name, "parameters", anchors=anchors)

    def _begin(self, fragment: int | None) -> None:
        """Take a snapshot, and let the exchange of it run beside the next steps."""
        started = time.perf_counter()
        steps, byte_counts = self.steps, self._channels.byte_counts()
        sources = [(channel, channel.take_snapshot(fragment)) for channel in self._channels]
        self._pending = _Pending(
            Background(lambda: self._exchange(sources, steps, fragment)),
            steps,
            steps + self._averaging.delay,
            self._learning_rate,
            fragment,
            byte_counts,
        )
        self._steps_since_round = 0
        self.statistics.exchange_seconds += time.perf_counter() - started

    def _land(self, timeout: float | None = None) -> None:
        """Apply the average under way, if there is one; raise what went wrong with it, and forget it then."""
        if self._pending is None:
            return
        pending, started = self._pending, time.perf_counter()
        # First: it fails if a tensor has changed.
        targets = [(channel, channel.since_snapshot()) for channel in self._channels]
        pending.exchange.wait(timeout)
        self._pending = None
        try:
            met = pending.exchange.result()
        except Exception:
            self._steps_since_round = self._pace.period  # so that the next step tries again
            raise
        self._step_outer()
        outer = self._pace.coefficients(pending.learning_rate)
        for channel, target in targets:
            channel.apply_since(target, outer, _parameter_elements(channel, self._buffer_names))
            self._clear_buffer_anchors(channel)
        if pending.steps == self.steps and pending.fragment is None:
            self.steps_since_average = 0
        self._complete(pending.steps, pending.learning_rate, met)
        self.statistics.exchange_seconds += time.perf_counter() - started
        self._verify(anchors=True)

    def _gather_counted(self, fragment: int | None) -> Callable[[], None]:
        """Return what adopts statistics, once in a rotation; collective."""
        is_due = fragment is None or fragment == self._averaging.selection.num_fragments - 1
        if self._carrier is None or not self._counted or not is_due:
            return lambda: None
        name, refuse = f"{self._name}.statistics", self._config.nonfinite == "raise"
        return gather_most_counted(self._carrier, self._counted, name, self.statistics, refuse_nonfinite=refuse)

    def _place_moments(self, carrier: Carrier) -> None:
        """Lay out the moments that all ranks have, as buffers, if they are not those of the last average."""
        assert self._moments is not None
        name = f"{self._name}.moments"
        with refused_together(telling(carrier, name)):
            own = self._moments.views()
        moments = common_moments(carrier, own, name)
        buffers = [*self._buffers, *moments]
        if {tensor.name for tensor in buffers} != self._buffer_names:
            self._lay_out(self._parameters, buffers, self._counted)

    def _clear_buffer_anchors(self, channel: Channel) -> None:
        assert channel.anchor is not None
        for i, tensor in enumerate(channel.vector.tensors):
            if tensor.name in self._buffer_names:
                channel.anchor[channel.vector.span(i)] = 0

    def flush(self, timeout: float | None = None) -> None:
        """Average a last partial period; collective, but nothing happens if no step was made since the last average.

        An average under way is applied first. With ``timeout`` the ranks first wait for each other, and raise
        CollectiveTimeoutError, nothing lost, if one does not come in that many seconds.
        """
        if self.steps_since_average == 0:
            return
        met = Agreement()
        if self._meeting is not None:
            deadline = None if timeout is None else time.monotonic() + timeout
            try:
                if self._pending is not None:
                    self._pending.exchange.wait(timeout)
                    if self._pending.exchange.error is not None:
                        self._land()  # which raises it, as on all ranks; nobody would come to the meeting
                self._announce(Purpose.FLUSH, self.steps)
                met = self._meeting.agree(None if deadline is None else max(0.0, deadline - time.monotonic()))
            except CollectiveTimeoutError:
                raise CollectiveTimeoutError(
                    f"{self.steps_since_average} steps were made since the last average, and averaging them takes "
                    f"every rank, but not every rank called flush() or state_dict() within {timeout} s: call "
                    "optimizer.flush() on every rank first, then state_dict() where you like"
                ) from None
            self._land()
            if self.steps_since_average == 0:
                return
        self._average(met)

    def join(self) -> int:
        """Take part in the averages of ranks that have more data, until none has; return the rank that joined last.

        Of several that joined between two averages that is the one with the most steps, of those the lowest. The mean
        is that of the ranks that have more data; what this rank has done since its last average counts as much in the
        next. Then its change is 0, and what it has not sent before stays with it. When all ranks have joined, what any
        of them has done since is averaged: the replicas, counters and all that ranks have alike, are then the same.

        :meth:`prepare` first. An average under way is applied at once. Raises DesynchronizedError on every rank if
        another one flushes meanwhile.
        """
        self._land()
        if self._meeting is None:
            self.flush()
            return 0
        own_steps = self.steps
        # In how many averages something of this rank is left: one for each part, but for that of the last step.
        rounds_left = self._averaging.selection.num_fragments - (self._steps_since_round == 0)
        rounds_left *= self.steps_since_average > 0
        while True:
            self._announce(Purpose.LAST if rounds_left else Purpose.JOINED, own_steps)
            met = self._meeting.agree()
            self._catch_up(met)
            if met.lays_out:
                self._lay_out(self._parameters, self._buffers, self._counted, has_met=True)
                continue
            if met.has_ended:
                if met.num_counted:
                    self._average(met)
                self.steps_since_average = 0
                return met.last
            self._average(met, self._fragment(), is_last=not self._averaging.delay)
            rounds_left = max(0, rounds_left - 1)

    def _catch_up(self, met: Agreement) -> None:
        """Count the steps that others have made meanwhile, with their learning rate."""
        missed = met.steps - self.steps
        self.steps += missed
        self.steps_since_average += missed
        self.statistics.count_steps(missed, self._num_parameters)
        self._learning_rate = unpack_details(met.details_of_training)[0][0]

    def _arrays(self) -> Arrays:
        """Return what is saved of the parameters, by name; what was restored and is not in place yet counts."""
        present = self._channels.arrays(skipped=self._buffer_names)
        return {kind: {**present[kind], **self._restored[kind]} for kind in ARRAYS}

    def config(self) -> dict[str, Any]:
        """Return what a saved state must have been made with."""
        return saved_config(self._averaging, self._config)

    def state_dict(self) -> dict[str, Any]:
        """Return counters, configuration, and copies of anchor, momentum and residuals, by parameter name.

        Raises ArgumentError in the middle of a period: :meth:`flush` first.
        """
        if self.steps_since_average:
            raise ArgumentError(
                f"{self.steps_since_average} steps were made since all replicas were the same: call flush() first"
            )
        return {
            "version": STATE_VERSION,
            "steps": self.steps,
            "rounds": self.rounds,
            "config": self.config(),
            **copied(self._arrays()),
            "pace": self._pace.state_dict(),
            "outer": None if self._stepper is None else self._stepper.state_dict(),
            "owner": owner_of(self._carrier),
        }

    def load_state_dict(self, state: Mapping[str, Any] | None, keep_residuals: bool = False) -> None:
        """Take over a state; None: begin anew, from the parameters as they are at the next step.

        With ``keep_residuals`` this rank's own residuals stay, and those of the state, another rank's, do not matter.

        The ranks compare what they have loaded at their next step. Raises ArgumentError, and changes nothing, if the
        state was made with another configuration.
        """
        arrays = no_arrays()
        if state is not None:
            check_state(state, self.config())
            arrays = taken_over(state, self._carrier, self._arrays() if keep_residuals else None)
        if self._pending is not None:  # what it brings is not wanted, but it uses names and memory until it ends
            self._pending.exchange.wait(HANDSHAKE_TIMEOUT_SECONDS)
            self._pending = None
        if state is None:
            self._pace.reset()
        else:
            self._pace.load_state_dict(state["pace"])
        if self._stepper is not None:
            self._stepper.load_state_dict(None if state is None else state["outer"])
        self.steps = 0 if state is None else int(state["steps"])
        self.rounds = 0 if state is None else int(state["rounds"])
        self.steps_since_average = self._steps_since_round = 0
        self._restored = arrays
        self._channels.replace(())
        self._prepared = False

    def communication_stats(self) -> dict[str, Any]:
        """Return running totals; see :class:`~pqasgd_horovod.averaging.statistics.CommunicationStatistics`."""
        counts = self._channels.byte_counts() if self._pending is None else self._pending.byte_counts
        return self.statistics.as_dict(*counts)


def _parameter_elements(channel: Channel, buffer_names: frozenset[str]) -> int:
    """Return how many elements are those of parameters, which come before buffers."""
    return channel.vector.offsets[sum(name not in buffer_names for name in channel.vector.names)]


def _hold_momentum(channel: Channel, buffer_names: frozenset[str], momentum: Mapping[str, AnchorArray]) -> None:
    """Give the parameters of a channel their place in the outer optimizer."""
    channel.move_by_outer(_parameter_elements(channel, buffer_names), holds_momentum=True)
    for i, name in enumerate(channel.vector.names):
        if name not in buffer_names:
            channel.momentum[channel.vector.span(i)] = momentum.get(name, 0.0)
