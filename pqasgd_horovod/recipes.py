r"""Recipes: configurations that were measured, as keyword arguments of ``DistributedOptimizer``.

Two of them take the momentum out of the inner optimizer and apply it to the averages. Inside, each rank's own noise
stays in its momentum for about :math:`1 / (1 - \mu)` steps, ten for :math:`\mu = 0.9`, and drives the replicas apart
however they are averaged; outside, momentum acts on what all ranks have in common. ``docs/recipes.md`` has the
measurements.
"""

from __future__ import annotations

from typing import Any

from . import codecs
from .averaging import GrowingPeriod, Nesterov, PeriodicAveraging
from .averaging.schedule import Schedule
from .codecs.base import check_integer


def max_fidelity() -> dict[str, Any]:
    """Gradients at 4 bits in every step: an eighth of the bytes.

    The optimizer, its momentum and its learning rate stay as they are. The relative squared error of what is sent is
    0.01, far below the noise of the batches.

    Returns: ``compression`` and ``averaging``, for ``DistributedOptimizer``.

    >>> max_fidelity()["averaging"].period
    1
    """
    return {"compression": codecs.quantize(bits=4), "averaging": PeriodicAveraging(period=1)}


def balanced(steps: int, momentum: float = 0.9) -> dict[str, Any]:
    r"""Parameters at 1 bit, often at first and seldom later, and the momentum on their averages: 1 % of the bytes.

    The period is 2, 4, 8 and 16, and doubles after each 29 % of the training. Wants an inner optimizer without
    momentum. Where SGD with a learning rate :math:`\gamma` and momentum :math:`\mu` is good, take ``SGD(lr)`` with

    .. math:: lr = \gamma \, \frac{1 - momentum}{1 - \mu},

    which is the same learning rate for the same momentum. Momentum inside as well would count twice. Call ``flush()``
    before evaluating or saving.

    Args:
        steps: optimizer steps of the whole training, at least 1.
        momentum: Nesterov's, of the averages, from 0 to below 1.

    Returns: ``compression`` and ``averaging``, for ``DistributedOptimizer``.

    Raises ArgumentError for other values.

    >>> balanced(steps=1000)["averaging"].period
    GrowingPeriod(first=2, last=16, every=288)
    """
    every = max(1, round(0.288 * check_integer("steps", steps, 1, 2**31)))
    return _momentum_outside(GrowingPeriod(first=2, last=16, every=every), momentum)


def max_saving(momentum: float = 0.8) -> dict[str, Any]:
    r"""Parameters at 1 bit every 16 steps, and the momentum on their averages: a quarter of a percent of the bytes.

    As :func:`balanced`, with a smaller momentum, for it spans four times as many steps: SGD with a learning rate
    :math:`\gamma` and momentum 0.9 becomes ``SGD(lr=2 * gamma)``.

    Args:
        momentum: Nesterov's, of the averages, from 0 to below 1.

    Returns: ``compression`` and ``averaging``, for ``DistributedOptimizer``.

    Raises ArgumentError for another momentum.

    >>> max_saving()["averaging"].period
    16
    """
    return _momentum_outside(16, momentum)


def _momentum_outside(period: int | Schedule, momentum: float) -> dict[str, Any]:
    outer = Nesterov(lr=1.0, momentum=momentum)
    return {"compression": codecs.quantize(bits=1), "averaging": PeriodicAveraging(period, outer=outer)}
