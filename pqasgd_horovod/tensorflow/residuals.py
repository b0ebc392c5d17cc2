"""What this rank has not sent yet, in variables: :mod:`pqasgd_horovod.averaging.feedback` in a graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import tensorflow as tf

from .carrier import HorovodCarrier
from .traced import when


class Residuals(tf.Module):
    """Of each channel with feedback, two variables: what was not sent of a rank's own numbers, and of means it made.

    They are this rank's own. A checkpoint that was saved by another rank, or in a world of another size, brings
    residuals that are not: :meth:`claim` clears those.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__(name="residuals")
        self.own = [tf.Variable(tf.zeros([size]), trainable=False) for size in sizes]
        self.means = [tf.Variable(tf.zeros([size]), trainable=False) for size in sizes]
        with tf.device("CPU:0"):
            self.owner = tf.Variable([-1, -1], dtype=tf.int64, trainable=False, name="residual_owner")

    def __iter__(self) -> Iterator[tuple[tf.Variable, tf.Variable]]:
        return zip(self.own, self.means, strict=True)

    def claim(self, carrier: HorovodCarrier) -> None:
        """Before the first step in a process: begin without residuals where they are those of another rank."""
        if not self.own:
            return
        this = tf.constant([carrier.rank, carrier.size], tf.int64)
        when(tf.reduce_all(tf.equal(self.owner, this)), None, self._clear)
        self.owner.assign(this)

    def _clear(self) -> None:
        for variable in (*self.own, *self.means):
            variable.assign(tf.zeros_like(variable))

    def named(self) -> dict[str, tf.Variable]:
        """Return the variables by the names under which a model file holds them."""
        if not self.own:
            return {}
        own = {f"residual.{i}": variable for i, variable in enumerate(self.own)}
        means = {f"mean_residual.{i}": variable for i, variable in enumerate(self.means)}
        return {**own, **means, "residual_owner": self.owner}
