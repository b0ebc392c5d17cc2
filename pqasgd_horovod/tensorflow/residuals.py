"""What this rank has not sent yet, in variables: :mod:`pqasgd_horovod.averaging.feedback` in a graph."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from .. import native
from ..averaging.channel import ChannelPlan
from ..errors import ArgumentError
from ..exchange.carriers import Carrier
from .places import ON_HOST, Place, hosted, on_host
from .traced import when


class Velocity:
    """The velocity of one channel's gradients, in a graph: :class:`pqasgd_horovod.averaging.feedback.Velocities`."""

    def __init__(self, plan: ChannelPlan, kept: tf.Variable) -> None:
        assert plan.correction is not None
        self._plan = plan
        self._nesterov = plan.correction.nesterov
        self._momentum = tf.constant(plan.correction.momentum, tf.float32)
        self._kept = kept

    def advance(
        self, gradients: Sequence[tf.Tensor], clipping: tf.Tensor | None
    ) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """Return velocities and increments of the plan's tensors, flat, one by one: a bucket waits for its own."""
        velocities, increments = [], []
        kept = self._kept.value()
        for i, gradient in enumerate(gradients):
            flat = tf.reshape(tf.cast(gradient, tf.float32), [-1])
            if clipping is not None:
                flat = flat * clipping
            velocity = self._momentum * kept[self._plan.layout.span(i)] + flat
            velocities.append(velocity)
            increments.append(flat + self._momentum * velocity if self._nesterov else velocity)
        return velocities, increments

    def keep(
        self,
        velocities: Sequence[tf.Tensor],
        increments: Sequence[tf.Tensor],
        residual: tuple[tf.Variable, tf.Variable] | None = None,
        flags: Sequence[tf.Tensor] | None = None,
    ) -> tf.Operation:
        """Keep the velocity of the buckets that have a mean, before residuals are kept.

        ``residual`` is that of the last round and that of this one; without ``flags`` all buckets have a mean.
        """
        velocity, kept, plan = tf.concat(list(velocities), 0), self._kept.value(), self._plan
        if plan.masks and residual is not None:
            before, after_it = (variable.value() for variable in residual)
            unsent = tf.equal(tf.concat(list(increments), 0) + before, after_it)
            velocity = tf.where(unsent, velocity, tf.zeros_like(velocity))
        if flags is None:
            return self._kept.assign(velocity)
        parts = [
            tf.where(tf.equal(tf.reshape(flag, []), 0), velocity[start:stop], kept[start:stop])
            for flag, (start, stop) in zip(flags, itertools.pairwise(plan.starts), strict=True)
        ]
        return self._kept.assign(tf.concat(parts, 0))


def first_starts(plan: ChannelPlan) -> np.ndarray:
    """Return where the iterations of all matrices of a plan start, as :class:`.exchange.LowRankExchange` draws it."""
    assert plan.low_rank is not None
    matrices = native.Matrices(plan.layout.matrices, plan.low_rank.approximation_rank)
    starts = np.zeros(matrices.right_numel, np.float32)
    matrices.redraw(plan.seed, 0, 0, starts)
    return starts


class Residuals(tf.Module):
    """Of each channel with feedback, two variables: what was not sent of a rank's own numbers, and of means it made.

    So has each sparse gradient, ``tables`` of (rows, row size). With momentum correction each channel also has the
    velocity of its gradients; with matrices of low rank there is the start of the next iteration, which all ranks have
    alike.

    The others are this rank's own. A checkpoint that was saved by another rank, or in a world of another size, brings
    residuals that are not: :meth:`claim` clears those. With ``ranks_per_node`` they are those of nodes.
    """

    def __init__(
        self,
        plans: Sequence[ChannelPlan],
        tables: Sequence[tuple[int, int]] = (),
        ranks_per_node: int | None = None,
        place: Place = ON_HOST,
    ) -> None:
        super().__init__(name="residuals")
        self._per_node = [] if ranks_per_node is None else [ranks_per_node]
        sizes = [(plan.layout.num_elements, plan.feedback, plan.feeds_back_means) for plan in plans]
        with place.here():
            self.own = [tf.Variable(tf.zeros([size]), trainable=False) for size, of_own, _ in sizes if of_own]
            self.means = [tf.Variable(tf.zeros([size]), trainable=False) for size, _, of_means in sizes if of_means]
        with_own = [of_means for _, of_own, of_means in sizes if of_own]
        self._with_means = [i for i, of_means in enumerate(with_own) if of_means]
        with on_host():
            self.tables = [tf.Variable(tf.zeros(table), trainable=False) for table in tables]
        sizes_of_velocities = [plan.layout.num_elements for plan in plans if plan.correction is not None]
        with place.here():
            self.velocities = [tf.Variable(tf.zeros([size]), trainable=False) for size in sizes_of_velocities]
            self.starts = [
                tf.Variable(first_starts(plan), trainable=False) for plan in plans if plan.low_rank is not None
            ]
        with on_host():
            self.owner = tf.Variable(
                [-1] * (2 + len(self._per_node)), dtype=tf.int64, trainable=False, name="residual_owner"
            )

    def of(self, plans: Sequence[ChannelPlan]) -> list[list[tf.Variable]]:
        """Return the variables of each channel, as ``GraphChannel`` takes them."""
        own, means, starts = iter(self.own), iter(self.means), iter(self.starts)
        return [
            [
                next(kind)
                for kind, has_one in (
                    (own, plan.feedback),
                    (means, plan.feeds_back_means),
                    (starts, plan.low_rank is not None),
                )
                if has_one
            ]
            for plan in plans
        ]

    @property
    def _kept(self) -> list[tf.Variable]:
        return [*self.own, *self.means, *self.velocities, *self.tables]

    def claim(self, carrier: Carrier) -> None:
        """Before the first step in a process: begin without residuals where they are those of another rank."""
        if not self._kept:
            return
        this = tf.constant([carrier.rank, carrier.size, *self._per_node], tf.int64)
        unlike = hosted(lambda: when(self.owner[0] < 0, None, hosted(self._clear)))
        when(tf.reduce_all(tf.equal(self.owner, this)), None, unlike)
        self.owner.assign(this)

    def _clear(self) -> None:
        tf.print(
            "pqasgd_horovod: the restored residual is that of (rank, world size)", self.owner, "and this rank begins "
            "without one: restore each rank's own checkpoint, or hvd.combine_states of all of them",
            output_stream=sys.stderr,
        )  # fmt: skip
        for variable in self._kept:
            variable.assign(tf.zeros_like(variable))

    def common(self) -> dict[str, tf.Variable]:
        """Return the variables that all ranks have alike, by the names under which a model file holds them."""
        return {f"residual_start.{i}": variable for i, variable in enumerate(self.starts)}

    def named(self) -> dict[str, tf.Variable]:
        """Return the variables by the names under which a model file holds them."""
        if not self._kept:
            return {}
        own = {f"residual.{i}": variable for i, variable in enumerate(self.own)}
        means = {f"mean_residual.{i}": variable for i, variable in zip(self._with_means, self.means, strict=True)}
        velocities = {f"residual_velocity.{i}": variable for i, variable in enumerate(self.velocities)}
        tables = {f"residual_table.{i}": variable for i, variable in enumerate(self.tables)}
        return {**own, **means, **velocities, **tables, **self.common(), "residual_owner": self.owner}

    def take(self, saved: Mapping[str, np.ndarray]) -> None:
        """Take over what :meth:`named` gave; raise ArgumentError unless it fits. Nothing saved: nothing to take."""
        variables = self.named()
        shapes = {name: list(np.shape(value)) for name, value in saved.items()}
        expected = {name: variable.shape.as_list() for name, variable in variables.items()}
        if saved and shapes != expected:
            raise ArgumentError(
                f"the saved residuals have the shapes {shapes}, and here they have {expected}: they were saved in a "
                "world of another size, with other settings or for another model: load the weights alone"
            )
        for name, value in saved.items():
            variables[name].assign(value)
