"""Any torch optimizer as the outer one."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..averaging import PeriodicAveraging
from ..averaging.outer import AnchorArray, OuterOptimizer
from ..codecs.base import FLOAT32
from ..errors import ArgumentError
from .wrapping import parameters_of

_NOT_SAVED = ("params", "param_names")


def describe_outer(averaging: PeriodicAveraging) -> PeriodicAveraging:
    """Return the strategy with a description of its outer optimizer, if that is one of torch; it is tried out for that.

    Raises ArgumentError unless the callable gives an optimizer that steps on dense gradients, without a closure.
    """
    if not isinstance(averaging.outer, OuterOptimizer):
        return averaging
    make = averaging.outer.optimizer
    probe = torch.nn.Parameter(torch.zeros(1, 1, device="cpu"))
    probe.grad = torch.zeros_like(probe, requires_grad=False)
    try:
        optimizer = make([probe])
        if isinstance(optimizer, torch.optim.Optimizer):
            optimizer.step()
    except Exception as error:
        raise ArgumentError(
            f"outer is {make!r}; it must be a callable that is given parameters and returns a torch optimizer, which "
            f"steps without a closure. Of one parameter with a gradient of zero it raised {type(error).__name__}: "
            f"{error}"
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ArgumentError(
            f"outer is {make!r}, which returned a {type(optimizer).__name__}; it must return a torch optimizer, as "
            "lambda params: torch.optim.Adam(params, lr=0.01) does"
        )
    cls = type(optimizer)
    description = {
        "class": f"{cls.__module__}.{cls.__qualname__}",
        **{key: repr(value) for key, value in optimizer.param_groups[0].items() if key not in _NOT_SAVED},
    }
    return dataclasses.replace(averaging, outer=OuterOptimizer(make, description))


class OuterStepper:
    """A torch optimizer whose parameters are the anchors: :class:`~pqasgd_horovod.averaging.outer.OuterStepper`."""

    def __init__(self, make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], inner: Any) -> None:
        self._make = make
        self._inner = inner
        self._parameters: dict[str, torch.nn.Parameter] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self._saved: Mapping[str, Any] | None = None

    def place(self, anchors: Mapping[str, AnchorArray]) -> None:
        """Make the optimizer of these parameters; those that it had keep their state."""
        saved = self.state_dict()
        models = {self._inner._parameter_names[p]: p for p in parameters_of(self._inner)}
        self._parameters = {
            name: torch.nn.Parameter(_shaped(torch.from_numpy(anchor), models[name]))
            for name, anchor in anchors.items()
        }
        self._optimizer = self._make(list(self._parameters.values()))
        if saved is not None:
            for name, parameter in self._parameters.items():
                if name in saved["state"]:
                    self._optimizer.state[parameter] = dict(saved["state"][name])
            for group, options in zip(self._optimizer.param_groups, saved["groups"], strict=False):
                group.update(options)

    def step(self, anchors_and_means: Mapping[str, tuple[AnchorArray, FLOAT32]]) -> None:
        """Move the anchors, in place, by the means of the changes."""
        assert self._optimizer is not None
        for name, (anchor, mean) in anchors_and_means.items():
            parameter = self._parameters[name]
            parameter.data = _shaped(torch.from_numpy(anchor), parameter)
            parameter.grad = _shaped(torch.from_numpy(-mean).to(parameter.dtype), parameter)
        self._optimizer.step()
        for name, (anchor, _) in anchors_and_means.items():
            parameter = self._parameters[name]
            _shaped(torch.from_numpy(anchor), parameter).copy_(parameter.detach())  # if it is elsewhere now
            parameter.grad = None

    def state_dict(self) -> Mapping[str, Any] | None:
        """Return a copy of the state of each parameter, by its name, and the options of groups."""
        if self._optimizer is None:
            return self._saved
        groups = [{k: v for k, v in group.items() if k not in _NOT_SAVED} for group in self._optimizer.param_groups]
        state = {name: dict(self._optimizer.state.get(p, {})) for name, p in self._parameters.items()}
        return copy.deepcopy({"state": state, "groups": groups})

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take over what was saved, when parameters are placed; None: begin anew."""
        self._saved = copy.deepcopy(state)
        self._optimizer = None


def _shaped(flat: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a flat tensor in the shape, and the order in memory, of a dense one."""
    return flat.as_strided(like.shape, like.stride())
