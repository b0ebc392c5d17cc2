"""Quantized gradients: every step the mean of the coded gradients, exchanged while they are still being computed."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DesynchronizedError
from ..exchange.carriers import Carrier
from ..exchange.carriers.alone import AloneCarrier
from ..exchange.handshake import HANDSHAKE_TIMEOUT_SECONDS
from ..exchange.placement import verify_and_place
from ..exchange.plan import num_parts
from ..exchange.rows import Rows
from ..exchange.wire import format_by_rank
from .channel import Channel, ChannelSet, digest_arrays, plan_channel, warn_of_size
from .config import ExchangeConfig
from .meeting import Agreement, Meeting, Purpose
from .state import ARRAYS, STATE_VERSION, Arrays, check_state, copied, no_arrays, owner_of, saved_config, taken_over
from .statistics import CommunicationStatistics
from .strategy import PeriodicAveraging
from .tables import SparseSpec, Tables
from .together import NO_ERROR, refused_together, succeed_together
from .vector import FlatVector, TensorView, common_device

if TYPE_CHECKING:
    from ..native.cuda import Device

_NO_ROWS = Rows(np.zeros(0, np.int64), np.zeros(0, np.float32))


def _check_frozen(met: Agreement) -> None:
    if len(set(met.details_of_training)) > 1:
        listing = format_by_rank(
            (rank, f"{intent.detail >> 32} (checksum of their names {intent.detail & 0xFFFFFFFF:08x})")
            for rank, intent in enumerate(met.intents)
            if not intent.has_ended
        )
        raise DesynchronizedError(
            f"the ranks do not train the same parameters. With requires_grad=False there are {listing}: freeze and "
            "unfreeze the same ones on every rank, before the same step"
        )


class GradientAverager:
    r"""Replace gradients :math:`g_i` by :math:`\frac1n \sum_i Q(g_i)`, or by the sum.

    Use: :meth:`prepare` once, and again when the set of tensors changes; then in each step :meth:`ready` for each
    gradient that is complete (in any order, it never blocks), and :meth:`finish`, which sends the rest and waits.
    ``carrier`` is None for a rank that trains alone.
    """

    def __init__(
        self,
        carrier: Carrier | None,
        config: ExchangeConfig,
        *,
        name: str,
        sum_over_ranks: bool = False,
        check_consistency: bool = False,
    ) -> None:
        self._carrier = carrier if carrier is not None and carrier.size > 1 else None
        self._correction = config.correction
        if self._carrier is None and self._correction is not None:
            self._carrier = AloneCarrier()  # nobody else has the momentum
        self._config = config
        self._name = name
        self._sum_over_ranks = sum_over_ranks
        self._check_consistency = check_consistency
        self._meeting = Meeting(self._carrier, name) if self._carrier is not None else None
        self._channels = ChannelSet()
        self._buckets_of: dict[str, tuple[Channel, list[int]]] = {}
        self._missing: dict[tuple[Channel, int], int] = {}
        self._ready: set[str] = set()
        self._tables: Tables | None = None  # none if there are no sparse gradients
        self._laid_out: tuple[Sequence[TensorView], Sequence[SparseSpec]] = ((), ())
        self._num_elements = 0
        self._config_now = config
        self._is_outdated = False  # the density of a warm-up has changed since tensors were laid out
        self._restored = no_arrays()
        self.statistics = CommunicationStatistics.of(self._carrier)
        self.steps = 0

    @property
    def exchanges(self) -> bool:
        """Whether gradients become anything else; if not there is nothing to prepare."""
        return self._carrier is not None

    def prepare(self, tensors: Sequence[TensorView], sparse: Sequence[SparseSpec] = ()) -> None:
        """Lay out the gradients, dense ones and ``sparse`` ones, and agree on that; collective.

        Raises MismatchError on every rank if the ranks differ, and ArgumentError for a codec that cannot code rows.
        """
        with self.refused_together():
            common_device(tensors)
        self._laid_out = (tensors, sparse)
        self._num_elements = sum(tensor.numel for tensor in tensors) + sum(math.prod(spec.shape) for spec in sparse)
        if self._meeting is not None:
            self._meet_to_lay_out()
            self._lay_out()

    def refused_together(self) -> AbstractContextManager[None]:
        """Look at tensors before :meth:`prepare`: the other ranks, on their way there, learn of an error.

        All raise MismatchError then, unless all have the same one.
        """

        def tell(refusal: Mapping[str, Any]) -> None:
            self._meet_to_lay_out()
            self._compare_layouts(refusal, None)

        return refused_together(None if self._carrier is None else tell)

    def _meet_to_lay_out(self) -> None:
        assert self._meeting is not None
        self._meeting.announce(Purpose.LAYOUT, self.steps, self.steps)
        self._meeting.agree(HANDSHAKE_TIMEOUT_SECONDS)

    def _compare_layouts(self, description: Mapping[str, Any], device: Device | None) -> tuple[int, bool]:
        assert self._carrier is not None
        return verify_and_place(self._carrier, description, device, f"{self._name}.layout")

    def _lay_out(self) -> None:
        """Do so, when the ranks have met."""
        assert self._carrier is not None
        tensors, sparse = self._laid_out
        config = self._config.at(self.steps)
        arrays = self._arrays()
        description = {
            **NO_ERROR,
            "steps": self.steps,
            "exchange": self._config.config(),
            "gradients": {tensor.name: tensor.description for tensor in tensors},
            "gradient_order": [tensor.name for tensor in tensors],
            "sparse_gradients": {spec.name: spec.description for spec in sparse},
            "factors": digest_arrays(arrays["factor"]),
            **config.describe_codecs([*tensors, *sparse]),
        }
        digest, device_messages = self._compare_layouts(description, common_device(tensors))
        vectors = [(way, FlatVector(members)) for way, members in config.by_way(tensors)]
        plans = [
            plan_channel(vector, config, way, name=self._name, index=index, size=num_parts(self._carrier))
            for index, (way, vector) in enumerate(vectors)
        ]
        warn_of_size(plans, self._carrier, PeriodicAveraging(period=1))
        tables = None
        with succeed_together(self._carrier, f"{self._name}.memory"):
            channels = [
                Channel(
                    vector,
                    plan,
                    None,
                    carrier=self._carrier,
                    config=config,
                    digest=digest,
                    device_messages=device_messages,
                )
                for plan, (_, vector) in zip(plans, vectors, strict=True)
            ]
            for channel in channels:
                channel.restore(arrays)
                channel.reserve(distances=self._clips)
            if sparse:
                tables = Tables(sparse, config, self._carrier, name=self._name, digest=digest)
                tables.restore(arrays["residual"])
        self._channels.replace(channels)
        if self._tables is not None:
            self.statistics.count_elsewhere(*self._tables.byte_counts())
        self._tables = tables
        self._restored = no_arrays()
        self._buckets_of = {}
        for channel in channels:
            for i, tensor in enumerate(channel.vector.tensors):
                buckets = [bucket for bucket in range(channel.num_buckets) if i in channel.tensors_in(bucket)]
                self._buckets_of[tensor.name] = (channel, buckets)
        self._config_now = config
        self._start_step()

    def _start_step(self) -> None:
        self._is_outdated = list(self._channels) != [] and self._config.at(self.steps) != self._config_now
        self._ready = set()
        self._missing = {
            (channel, bucket): len(channel.tensors_in(bucket))
            for channel in self._channels
            for bucket in range(channel.num_buckets)
        }

    def ready(self, name: str) -> None:
        """Take note that a gradient stays as it is until :meth:`finish`; launch each bucket that is now complete."""
        if self._carrier is not None and not self._is_outdated and not self._clips:
            self._launch(name)

    def ready_rows(self, name: str, gradient: Callable[[], Rows]) -> None:
        """Launch a sparse gradient, each of its rows once; it is asked for only if it was not launched yet."""
        if self._tables is not None:
            self._tables.ready(name, gradient, self.steps)

    @property
    def _clips(self) -> bool:
        return self._correction is not None and self._correction.clip_norm is not None

    def _launch(self, name: str) -> None:
        if name in self._ready:
            return
        self._ready.add(name)
        channel, buckets = self._buckets_of[name]
        for bucket in buckets:
            self._missing[channel, bucket] -= 1
            if self._missing[channel, bucket] == 0:
                channel.begin_bucket(bucket, step=self.steps, round=self.steps)

    def finish(self, frozen: Sequence[str] = ()) -> dict[str, Rows]:
        """Send what is left, wait, and write the means over the gradients of every rank; collective.

        Returns those of sparse gradients, by name, all of which were given to :meth:`ready_rows`.

        ``frozen`` names the tensors that this rank does not train at the moment: they have to be the same everywhere,
        or some ranks would apply a mean that others do not. Raises NonFiniteError or DesynchronizedError on every rank,
        with the gradients untouched.
        """
        if self._is_outdated:
            self.prepare(*self._laid_out)
        if self._correction is not None and self._clips:
            norm = math.sqrt(sum(channel.squared_norm() for channel in self._channels))
            for channel in self._channels:
                assert channel.velocities is not None
                channel.velocities.clipping = self._correction.clipping(norm, channel.exchange.size)
        for name in self._buckets_of:
            self._launch(name)
        started = time.perf_counter()
        if self._meeting is not None:
            checksum = len(frozen) << 32 | zlib.crc32("\n".join(frozen).encode())
            self._meeting.announce(Purpose.AVERAGE, self.steps, self.steps, checksum)
        means = self._complete(None)
        self.statistics.exchange_seconds += time.perf_counter() - started
        return means

    def _complete(self, met: Agreement | None) -> dict[str, Rows]:
        """Wait for what has been sent, and write the means over the gradients.

        The ranks meet now unless they have ``met``: this one has nothing to give then.
        """
        absent = met is not None
        try:
            if met is None:
                met = Agreement() if self._meeting is None else self._meeting.agree()
            scale = 1.0 if self._sum_over_ranks else met.scale
            try:
                self._channels.finish(scale)
            finally:
                means = {} if self._tables is None else self._tables.finish()
            _check_frozen(met)
            if self._tables is not None:
                self._tables.commit()
        finally:
            self.steps += 1
            self._start_step()
            self.statistics.count_step(self._num_elements)
        for channel in self._channels:
            if self._carrier is not None and self._sum_over_ranks:
                for mean in channel.means:
                    np.multiply(mean, np.float32(self._carrier.size), out=mean)
            channel.apply(channel.source(), absent=absent)
        factor = self._carrier.size if self._carrier is not None and self._sum_over_ranks else scale
        if factor != 1:
            for rows in means.values():
                np.multiply(rows.values, np.float32(factor), out=rows.values)
        self.statistics.rounds += 1
        if self._check_consistency and self._carrier is not None:
            self._channels.verify_replicas(self._carrier, self._name, "gradients")
        return means

    def join(self) -> tuple[int, bool]:
        """Take part in the steps of ranks that have more data, until none has, with zeros in place of gradients.

        Return the rank that joined last, of several the lowest, and whether some rank has made fewer steps. The mean is
        that of the ranks that have more data, a sum is a sum; what this rank has not sent before, and its velocity,
        stay with it. The gradients of this rank become the means, and whoever calls this has to see that parameters
        become those of the rank that joined last.

        :meth:`prepare` first. Raises ArgumentError if a codec cannot send nothing.
        """
        self._config.check_for_join()
        own_steps = self.steps
        while self._meeting is not None:
            self._meeting.announce(Purpose.JOINED, own_steps, own_steps)
            met = self._meeting.agree()
            if met.has_ended:
                return met.last, any(intent.steps < met.steps for intent in met.intents)
            if met.lays_out:
                self._lay_out()
                continue
            for channel in self._channels:
                channel.begin(channel.nothing(), step=self.steps, round=self.steps)
            for spec in self._laid_out[1]:
                self.ready_rows(spec.name, lambda: _NO_ROWS)
            self._complete(met)
        return 0, False

    def config(self) -> dict[str, Any]:
        """Return what a saved state must have been made with."""
        return saved_config(PeriodicAveraging(period=1), self._config)

    def _arrays(self) -> Arrays:
        present = self._channels.arrays()
        if self._tables is not None:
            present["residual"].update(self._tables.residuals())
        return {kind: {**present[kind], **self._restored[kind]} for kind in ARRAYS}

    def state_dict(self) -> dict[str, Any]:
        """Return the step counter, which keys the rounding noise, the configuration, and the residuals."""
        return {
            "version": STATE_VERSION,
            "steps": self.steps,
            "rounds": self.steps,
            "config": self.config(),
            **copied(self._arrays()),
            "pace": {},
            "owner": owner_of(self._carrier),
        }

    def load_state_dict(self, state: Mapping[str, Any] | None, keep_residuals: bool = False) -> None:
        """Take over a state; None: begin anew.

        With ``keep_residuals`` this rank's own residuals stay, and those of the state, another rank's, do not matter.
        Raises ArgumentError, and changes nothing, if it was made with another configuration.
        """
        arrays = no_arrays()
        if state is not None:
            check_state(state, self.config())
            arrays = taken_over(state, self._carrier, self._arrays() if keep_residuals else None)
        for channel in self._channels:
            channel.restore(arrays)
        if self._tables is not None:
            self._tables.restore(arrays["residual"])
        self._restored = no_arrays() if list(self._channels) or self._tables is not None else arrays
        self.steps = 0 if state is None else int(state["steps"])
        self._start_step()

    def communication_stats(self) -> dict[str, Any]:
        """Return running totals; see :class:`~pqasgd_horovod.averaging.statistics.CommunicationStatistics`."""
        sent, received, *inside = self._channels.byte_counts()
        of_rows = (0, 0) if self._tables is None else self._tables.byte_counts()
        return self.statistics.as_dict(sent + of_rows[0], received + of_rows[1], *inside)
