"""Any Keras optimizer as the outer one, in a graph."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from ..averaging import PeriodicAveraging
from ..averaging.outer import OuterOptimizer
from ..errors import ArgumentError
from .graph import GraphChannel
from .places import hosted
from .variables import unwrap


def describe_outer(averaging: PeriodicAveraging) -> PeriodicAveraging:
    """Return the strategy with the configuration of its outer optimizer, if that is one of Keras.

    Raises ArgumentError unless it is one that can be made anew from its configuration.
    """
    if not isinstance(averaging.outer, OuterOptimizer):
        return averaging
    given = averaging.outer.optimizer
    try:
        config = given if isinstance(given, Mapping) else keras.saving.serialize_keras_object(given)
        made = keras.saving.deserialize_keras_object(config)
    except Exception as error:
        raise ArgumentError(
            f"outer is {given!r}, which cannot be made anew from its configuration: {type(error).__name__}: {error}. "
            "It must be a Keras optimizer; register your own class with keras.saving.register_keras_serializable"
        ) from error
    if not isinstance(made, keras.optimizers.Optimizer) or isinstance(made, keras.optimizers.LossScaleOptimizer):
        raise ArgumentError(
            f"outer is {given!r}; it must be a plain Keras optimizer, such as keras.optimizers.Adam(0.01)"
        )
    return dataclasses.replace(averaging, outer=OuterOptimizer(config, config))


class OuterStepper:
    """A Keras optimizer that moves the anchors of ``channels``, which begin with parameters of these shapes.

    It steps copies of the parameters, since they lie end to end in an anchor, and some optimizers look at shapes.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        channels: Sequence[GraphChannel],
        shapes: Sequence[Sequence[tf.TensorShape]],
    ) -> None:
        self._channels = [
            (channel, [_zeros(shape, _anchor_of(channel).dtype.name, f"anchor_{i}_{j}") for j, shape in enumerate(own)])
            for i, (channel, own) in enumerate(zip(channels, shapes, strict=True))
        ]
        self._optimizer = keras.saving.deserialize_keras_object(config)
        self._optimizer.build([copy for _, copies in self._channels for copy in copies])

    def variables(self) -> list[tf.Variable]:
        """Return the state of the optimizer."""
        return [unwrap(variable) for variable in self._optimizer.variables]

    @hosted
    def step(self) -> None:
        """Move the anchors by the means that have arrived, and leave zeros there; after the verdict, before commit."""
        gradients, stepped = [], []
        for channel, copies in self._channels:
            sizes = [math.prod(copy.shape) for copy in copies]
            anchor, arriving = _anchor_of(channel), channel.arriving
            num_elements = sum(sizes)
            numbers = tf.split(anchor[:num_elements], sizes), tf.split(arriving[:num_elements], sizes)
            for copy, own, mean in zip(copies, *numbers, strict=True):
                copy.assign(tf.reshape(own, copy.shape))
                gradients.append(-tf.cast(tf.reshape(mean, copy.shape), copy.dtype))
                stepped.append(copy)
        self._optimizer.apply(gradients, stepped)
        for channel, copies in self._channels:
            if copies:
                flat = tf.concat([tf.reshape(unwrap(copy).value(), [-1]) for copy in copies], 0)
                _anchor_of(channel)[: flat.shape[0]].assign(flat)
                channel.arriving[: flat.shape[0]].assign(tf.zeros_like(flat, channel.arriving.dtype))


def _zeros(shape: tf.TensorShape, dtype: str, name: str) -> keras.Variable:
    return keras.Variable(np.zeros(shape.as_list()), dtype=dtype, name=name)


def _anchor_of(channel: GraphChannel) -> tf.Variable:
    assert channel.anchor is not None
    return channel.anchor
