"""Recipes: configurations that were measured, by name, as keyword arguments of ``DistributedOptimizer``."""

from __future__ import annotations

from typing import Any

from . import codecs
from .averaging import PeriodicAveraging, PostLocal, SlowMo
from .codecs.base import check_integer


def balanced(total_steps: int) -> dict[str, Any]:
    """Return the recipe for one percent."""
    total_steps = check_integer("total_steps", total_steps, 1, 2**31)
    first_steps = round(0.15 * total_steps)
    return {
        "compression": codecs.quantize(bits=1),
        "averaging": PeriodicAveraging(PostLocal(period=10, first_steps=first_steps), outer=SlowMo(0.5, 0.7)),
    }


def max_saving(total_steps: int) -> dict[str, Any]:
    """Return the recipe for the fewest bytes."""
    total_steps = check_integer("total_steps", total_steps, 1, 2**31)
    return {
        "compression": codecs.quantize(bits=1),
        "averaging": PeriodicAveraging(PostLocal(period=16, first_steps=round(0.05 * total_steps))),
    }


def max_fidelity(total_steps: int) -> dict[str, Any]:
    """Return the recipe for the accuracy of full communication."""
    check_integer("total_steps", total_steps, 1, 2**31)
    return {"compression": codecs.quantize(bits=4), "averaging": PeriodicAveraging(period=1)}
