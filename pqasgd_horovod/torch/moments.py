"""The moments of a torch optimizer, as :mod:`pqasgd_horovod.averaging.moments` asks for them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import ArgumentError
from .tensors import TensorMemory, is_exchangeable
from .wrapping import parameters_of


def check_has_moments(optimizer: torch.optim.Optimizer, policy: str) -> None:
    """Raise ArgumentError if what the optimizer keeps is not one number for each of a parameter's."""
    if policy != "local" and isinstance(optimizer, torch.optim.LBFGS):
        raise ArgumentError(
            f"moments is {policy!r} and the optimizer is LBFGS, whose state is a history of steps: use moments='local'"
        )


class OptimizerMoments:
    """What the state of an optimizer holds of each parameter, but for step counts: made anew, moved or dropped at will.

    Construct it when the optimizer is new: ``reset`` makes the state what it is then.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._initial = copy.deepcopy([dict(optimizer.state.get(p, {})) for p in parameters_of(optimizer)])

    def _found(self) -> Iterator[tuple[torch.nn.Parameter, str]]:
        for parameter in parameters_of(self._optimizer):
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if (
                    key != "step"
                    and isinstance(value, torch.Tensor)
                    and (value.ndim or not parameter.ndim)
                    and is_exchangeable(value)
                ):
                    yield parameter, key

    def views(self) -> list[TensorMemory]:
        """Return the moments that are there now."""
        names = self._optimizer._parameter_names
        return [
            TensorMemory(
                f"moment {key} of {names[parameter]}",
                functools.partial(self._look_up, parameter, key),
                self._optimizer._settings.anchor_device,
            )
            for parameter, key in self._found()
        ]

    def reset(self) -> None:
        """Make the state that of a new optimizer, step counts included, on which Adam's bias correction depends."""
        state = self._optimizer.state
        state.clear()
        for parameter, initial in zip(parameters_of(self._optimizer), self._initial, strict=False):
            if initial:
                state[parameter] = copy.deepcopy(initial)

    def _look_up(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        tensor: torch.Tensor = self._optimizer.state[parameter][key]
        return tensor
