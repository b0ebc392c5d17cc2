"""``period=1`` in TensorFlow: gradients become their mean over the ranks, coded by us or added up by Horovod."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import horovod.tensorflow as horovod
import numpy as np
import tensorflow as tf

from ..averaging import ExchangeConfig
from ..averaging.channel import plan_channel, split_by_size
from ..averaging.meeting import Purpose
from ..averaging.statistics import CommunicationStatistics, ring_allreduce_nbytes
from ..averaging.vector import FlatLayout
from ..errors import ArgumentError
from ..exchange.handshake import HANDSHAKE_TIMEOUT_SECONDS, verify_same
from .carrier import HorovodCarrier, allgather
from .graph import GraphChannel, Problems
from .meeting import Meeting
from .residuals import Residuals
from .traced import Traced, after, counter, outside_of_graphs, when
from .variables import NO_ERROR, VariableSpec, describe_together, describe_variables

Gradient = Any  # tf.Tensor, tf.IndexedSlices or None


class GradientState(tf.Module):
    """What is saved: the step counter, which keys the rounding noise. ``tf.train.Checkpoint`` finds it."""

    def __init__(self) -> None:
        super().__init__(name="pqasgd")
        self.steps = counter("steps")
        self.residuals: Residuals | None = None

    def named(self) -> dict[str, tf.Variable]:
        """Return the variables by the names under which a model file holds them."""
        return {"steps": self.steps, **({} if self.residuals is None else self.residuals.named())}


@dataclasses.dataclass(frozen=True)
class GradientSettings:
    """How gradients are combined; as Horovod's arguments of these names."""

    op: Any = horovod.Average
    gradient_predivide_factor: float = 1.0
    groups: Any = None
    sparse_as_dense: bool = False
    device_dense: str = ""
    device_sparse: str = ""


def layout_of(specs: Sequence[VariableSpec], gradients: Sequence[Gradient]) -> list[tuple[str, str]]:
    """Return what has to be the same on every rank: names, types, shapes, and which gradients are sparse or absent."""
    kinds = [
        "absent" if gradient is None else "sparse" if isinstance(gradient, tf.IndexedSlices) else "dense"
        for gradient in gradients
    ]
    return [(spec.name, f"{spec.description} {kind}") for spec, kind in zip(specs, kinds, strict=True)]


class GradientAverager(abc.ABC):
    """Replaces gradients by their mean, or sum, over the ranks.

    What has a gradient is looked at in the first call, and is the same on every rank and in every later call. Sparse
    gradients (``tf.IndexedSlices``) travel as they are, by two allgathers, unless ``sparse_as_dense``. ``carrier`` is
    None for a rank that trains alone; then gradients are what they were.
    """

    def __init__(self, carrier: HorovodCarrier | None, settings: GradientSettings, *, name: str) -> None:
        with outside_of_graphs():
            self.state = GradientState()
            self._total_steps = counter("total_steps")
            self._sparse_sent, self._sparse_received = counter("sparse_sent"), counter("sparse_received")
        self._carrier = carrier
        self._settings = settings
        self._name = name
        self._layout: list[tuple[str, str]] | None = None
        self._num_elements = 0
        self._traced = Traced()

    def average(self, gradients: Sequence[Gradient], variables: Sequence[Any]) -> list[Gradient]:
        """Return the means, in the order of ``gradients``; where there is no gradient there is none after.

        Raises ArgumentError if other variables have gradients than in the first call.
        """
        if self._layout is None:
            with outside_of_graphs():
                specs = describe_together(variables, self._carrier, f"{self._name}.layout")
        else:
            specs = describe_variables(variables)
        if self._settings.sparse_as_dense:
            gradients = [tf.convert_to_tensor(g) if isinstance(g, tf.IndexedSlices) else g for g in gradients]
        present = [i for i, gradient in enumerate(gradients) if gradient is not None]
        self._check_layout([specs[i] for i in present], [gradients[i] for i in present])
        result = list(gradients)
        if self._carrier is None:
            self._count()
            return result
        means = self._traced(self._average, [gradients[i] for i in present])
        for i, mean in zip(present, means, strict=True):
            result[i] = mean
        return result

    def _check_layout(self, specs: Sequence[VariableSpec], gradients: Sequence[Gradient]) -> None:
        layout = layout_of(specs, gradients)
        if self._layout is None:
            if not layout:
                raise ArgumentError("gradients are all None: there is nothing to average")
            with outside_of_graphs():
                dense = [spec for spec, g in zip(specs, gradients, strict=True) if not isinstance(g, tf.IndexedSlices)]
                self._num_elements = sum(spec.numel for spec in specs)
                self._build(dense, layout)
            self._layout = layout
        elif layout != self._layout:
            with outside_of_graphs():
                self._tell_of_change()
            changed = sorted(set(layout) ^ set(self._layout)) or "their order"
            raise ArgumentError(
                f"the gradients are not those of the first step; what differs: {changed}. Every step has to compute "
                "gradients of the same variables, on every rank: make another optimizer or tape for others"
            )

    def _average(self, gradients: list[Gradient]) -> list[Gradient]:
        dense = [gradient for gradient in gradients if not isinstance(gradient, tf.IndexedSlices)]
        with after(self._meet()):
            means = iter(self._average_dense(dense) if dense else ())
            result = [
                self._average_sparse(i, gradient) if isinstance(gradient, tf.IndexedSlices) else next(means)
                for i, gradient in enumerate(gradients)
            ]
            self._count()
        return result

    def _meet(self) -> tf.Operation | None:
        """Return what makes sure that every rank is about to average the same gradients; Horovod's own are not."""
        return None

    def _tell_of_change(self) -> None:  # noqa: B027 - Horovod has no way to tell
        """Let the others know, who may be about to average, that this rank has other gradients."""

    def _count(self) -> None:
        self.state.steps.assign_add(1)
        self._total_steps.assign_add(1)

    def _average_sparse(self, index: int, gradient: tf.IndexedSlices) -> tf.IndexedSlices:
        """Horovod's way: everybody gets everybody's rows."""
        assert self._carrier is not None
        process_set, name = self._carrier.process_set, f"{self._name}.sparse.{index}"
        with tf.device(self._settings.device_sparse):
            values = allgather(gradient.values, f"{name}.values", process_set)
            indices = allgather(gradient.indices, f"{name}.indices", process_set)
        own = _nbytes(gradient.values) + _nbytes(gradient.indices)
        self._sparse_sent.assign_add((self._carrier.size - 1) * own)
        self._sparse_received.assign_add(_nbytes(values) + _nbytes(indices) - own)
        if self._settings.op == horovod.Average:
            values = values / tf.cast(self._carrier.size, values.dtype)
        return tf.IndexedSlices(values, indices, gradient.dense_shape)

    def _agree(self, layout: list[tuple[str, str]], **rest: Any) -> int:
        assert self._carrier is not None
        description = {**NO_ERROR, "gradients": dict(layout), "gradient_order": [name for name, _ in layout], **rest}
        return verify_same(self._carrier, description, f"{self._name}.layout")

    def communication_stats(self) -> dict[str, Any]:
        """Return running totals; see :class:`~pqasgd_horovod.averaging.statistics.CommunicationStatistics`."""
        statistics = CommunicationStatistics(self._carrier.size if self._carrier is not None else 1)
        statistics.count_steps(int(self._total_steps), self._num_elements)
        statistics.rounds = statistics.steps
        sent, received = self._dense_bytes_per_step()
        return statistics.as_dict(
            statistics.rounds * sent + int(self._sparse_sent), statistics.rounds * received + int(self._sparse_received)
        )

    @abc.abstractmethod
    def _build(self, dense: Sequence[VariableSpec], layout: list[tuple[str, str]]) -> None:
        """Prepare to average gradients like ``dense``; collective."""

    @abc.abstractmethod
    def _average_dense(self, gradients: list[tf.Tensor]) -> list[tf.Tensor]:
        """Return the means of gradients like those of :meth:`_build`."""

    @abc.abstractmethod
    def _dense_bytes_per_step(self) -> tuple[int, int]:
        """Return the bytes sent and received for dense gradients in a step."""


def _nbytes(tensor: tf.Tensor) -> tf.Tensor:
    return tf.size(tensor, tf.int64) * tensor.dtype.size


class CodedGradients(GradientAverager):
    r"""Replace gradients :math:`g_i` by :math:`\frac1n \sum_i Q(g_i)`, a bucket as soon as its gradients are there."""

    def __init__(
        self, carrier: HorovodCarrier | None, settings: GradientSettings, config: ExchangeConfig, *, name: str
    ) -> None:
        super().__init__(carrier, settings, name=name)
        self._config = config
        self._channels: list[tuple[GraphChannel, list[int]]] = []
        if carrier is not None:
            self._problems = Problems(name, config.nonfinite)
            with outside_of_graphs():
                self._claimed = counter("claimed")
            self._meeting = Meeting(carrier, name)

    def _meet(self) -> tf.Operation:
        # It depends on no gradient, so that it is over when the first of them is there.
        steps = self.state.steps.value()
        return self._meeting.agree(Purpose.AVERAGE, steps, steps)[0]

    def _tell_of_change(self) -> None:
        if self._carrier is not None:
            steps = int(self.state.steps)
            self._meeting.check(self._meeting.announce(Purpose.LAYOUT, steps, steps).wait(HANDSHAKE_TIMEOUT_SECONDS))

    def _build(self, dense: Sequence[VariableSpec], layout: list[tuple[str, str]]) -> None:
        if self._carrier is None:
            return
        digest = self._agree(layout, exchange=self._config.config())
        position = {spec.name: i for i, spec in enumerate(dense)}
        groups = zip(split_by_size(dense, self._config.small_tensor_threshold), (True, False), strict=True)
        parts = [(members, compressed) for members, compressed in groups if members]
        plans = [
            plan_channel(FlatLayout(members), self._config, compressed=compressed, name=self._name, index=index)
            for index, (members, compressed) in enumerate(parts)
        ]
        self.state.residuals = Residuals([plan.layout.num_elements for plan in plans if plan.feedback])
        residuals = iter(self.state.residuals)
        for plan, (members, _) in zip(plans, parts, strict=True):
            fed = next(residuals) if plan.feedback else ()
            channel = GraphChannel(plan, self._carrier, digest, self._problems, None, residuals=fed)
            self._channels.append((channel, [position[spec.name] for spec in members]))

    def _average_dense(self, gradients: list[tf.Tensor]) -> list[tf.Tensor]:
        assert self._carrier is not None
        when(self._claimed > 0, None, self._claim)
        steps = self.state.steps.value()
        exchanged = [
            (channel, positions, channel.exchange([gradients[i] for i in positions], steps, steps))
            for channel, positions in self._channels
        ]
        verdict = self._problems.verdict([flag for _, _, flags in exchanged for flag in flags])
        factor = float(self._carrier.size) if self._settings.op == horovod.Sum else 1.0
        result: list[tf.Tensor] = list(gradients)
        with tf.control_dependencies([] if verdict is None else [verdict]):
            for channel, positions, flags in exchanged:
                channel.keep_residuals(flags)
                means = channel.means([gradients[i] for i in positions], factor)
                for i, mean in zip(positions, means, strict=True):
                    result[i] = mean
        return result

    def _dense_bytes_per_step(self) -> tuple[int, int]:
        each = [channel.bytes_per_round() for channel, _ in self._channels]
        return sum(sent for sent, _ in each), sum(received for _, received in each)

    def _claim(self) -> None:
        assert self._carrier is not None
        assert self.state.residuals is not None
        self.state.residuals.claim(self._carrier)
        self._claimed.assign(1)


class StockGradients(GradientAverager):
    """Horovod's own allreduce of each gradient, or of groups of them, under names that do not depend on scopes."""

    def __init__(
        self, carrier: HorovodCarrier | None, settings: GradientSettings, compression: Any, itemsize: int | None, *,
        name: str,
    ) -> None:  # fmt: skip
        super().__init__(carrier, settings, name=name)
        self._compression = compression
        self._itemsize = itemsize
        self._dense: list[VariableSpec] = []
        self._groups: list[list[int]] | None = None

    def _build(self, dense: Sequence[VariableSpec], layout: list[tuple[str, str]]) -> None:
        self._dense = list(dense)
        if self._carrier is not None:
            self._agree(layout)
        groups = self._settings.groups
        if isinstance(groups, int) and groups > 0:
            self._groups = [part.tolist() for part in np.array_split(range(len(dense)), groups) if part.size]
        elif groups:
            position = {spec.name: i for i, spec in enumerate(dense)}
            self._groups = [
                [position[spec.name] for spec in describe_variables(group) if spec.name in position] for group in groups
            ]
            grouped = {i for group in self._groups for i in group}
            self._groups += [[i] for i in range(len(dense)) if i not in grouped]

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
        if self._groups is None:
            return [
                horovod.allreduce(gradient, name=f"{self._name}.gradient.{i}", **options)
                for i, gradient in enumerate(gradients)
            ]
        result: list[tf.Tensor] = list(gradients)
        for index, group in enumerate(self._groups):
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
