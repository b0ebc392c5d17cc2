"""What this rank has not sent yet, in variables: :mod:`pqasgd_horovod.averaging.feedback` in a graph."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from ..averaging.channel import ChannelPlan
from ..errors import ArgumentError
from .carrier import HorovodCarrier
from .traced import when


class Residuals(tf.Module):
    """Of each channel with feedback, two variables: what was not sent of a rank's own numbers, and of means it made.

    They are this rank's own. A checkpoint that was saved by another rank, or in a world of another size, brings
    residuals that are not: :meth:`claim` clears those.
    """

    def __init__(self, plans: Sequence[ChannelPlan]) -> None:
        super().__init__(name="residuals")
        sizes = [(plan.layout.num_elements, plan.feedback, plan.feeds_back_means) for plan in plans]
        self.own = [tf.Variable(tf.zeros([size]), trainable=False) for size, of_own, _ in sizes if of_own]
        self.means = [tf.Variable(tf.zeros([size]), trainable=False) for size, _, of_means in sizes if of_means]
        with tf.device("CPU:0"):
            self.owner = tf.Variable([-1, -1], dtype=tf.int64, trainable=False, name="residual_owner")

    def of(self, plans: Sequence[ChannelPlan]) -> list[list[tf.Variable]]:
        """Return the variables of each channel, as ``GraphChannel`` takes them."""
        own, means = iter(self.own), iter(self.means)
        return [
            [next(kind) for kind, has_one in ((own, plan.feedback), (means, plan.feeds_back_means)) if has_one]
            for plan in plans
        ]

    def claim(self, carrier: HorovodCarrier) -> None:
        """Before the first step in a process: begin without residuals where they are those of another rank."""
        if not self.own:
            return
        this = tf.constant([carrier.rank, carrier.size], tf.int64)
        when(tf.reduce_all(tf.equal(self.owner, this)), None, lambda: when(self.owner[0] < 0, None, self._clear))
        self.owner.assign(this)

    def _clear(self) -> None:
        tf.print(
            "pqasgd_horovod: the restored residual is that of (rank, world size)", self.owner, "and this rank begins "
            "without one: restore each rank's own checkpoint",
            output_stream=sys.stderr,
        )  # fmt: skip
        for variable in (*self.own, *self.means):
            variable.assign(tf.zeros_like(variable))

    def named(self) -> dict[str, tf.Variable]:
        """Return the variables by the names under which a model file holds them."""
        if not self.own:
            return {}
        own = {f"residual.{i}": variable for i, variable in enumerate(self.own)}
        means = {f"mean_residual.{i}": variable for i, variable in enumerate(self.means)}
        return {**own, **means, "residual_owner": self.owner}

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
