"""How a Horovod optimizer is built, and what all of ours have in common.

Horovod makes a class at run time, a subclass of the user's optimizer class whose methods are copied in. So do we: the
methods of the classes in this package are copied over Horovod's, and the class says that it comes from
``horovod.torch.optimizer``, which ``broadcast_optimizer_state`` looks for. Methods call the user's optimizer as
``self._inner_class.step(self)``: in such a class ``super()`` would not find it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from horovod.torch.optimizer import _DistributedOptimizer

from ..averaging import ExchangeConfig, PeriodicAveraging
from ..averaging.construction import Membership
from ..averaging.feedback import check_no_momentum
from ..averaging.policy import Shaped
from ..averaging.state import ARRAYS, check_state
from ..errors import ArgumentError
from ..exchange.carriers import Carrier
from .tensors import GradientMemory, describe, matrix_of

STATE_KEY = "pqasgd"
_NOT_COPIED = frozenset({"__dict__", "__weakref__", "__module__", "__doc__", "__annotations__"})


def describe_parameters(optimizer: Any) -> dict[str, Any]:
    """Return what of the parameters has to be the same on every rank.

    Raises ArgumentError if the policy has a pattern that is for none of them.
    """
    names = [optimizer._parameter_names[p] for p in parameters_of(optimizer)]
    shapes = [Shaped(name, tuple(p.shape)) for name, p in zip(names, parameters_of(optimizer), strict=True)]
    config: ExchangeConfig = optimizer._settings.exchange
    config.check_names(shapes)
    layout: dict[str, Any] = {
        "parameters": dict(zip(names, map(describe, parameters_of(optimizer)), strict=True)),
    }
    if hasattr(optimizer, "_averager"):
        # Tensors are laid end to end, so their order matters; Horovod itself goes by names alone.
        layout["parameter_order"] = names
        layout.update(config.describe_codecs(shapes))
    return layout


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an optimizer is built with, beyond Horovod's own arguments."""

    averaging: PeriodicAveraging
    exchange: ExchangeConfig
    model: torch.nn.Module | None
    check_consistency: bool
    flush_timeout: float | None
    op: Any
    process_set: Any
    membership: Membership
    anchor_device: str | None = None

    @property
    def name(self) -> str:
        """The prefix of all names on the wire."""
        return self.membership.name

    @property
    def carrier(self) -> Carrier | None:
        """What carries bytes; None for a rank that trains alone."""
        return self.membership.carrier


def build(optimizer: torch.optim.Optimizer, *layers: type, arguments: tuple[Any, ...], settings: Settings) -> Any:
    """Return an optimizer of a new class: the user's, with the methods of ``layers`` copied in, later over earlier."""
    namespace: dict[str, Any] = {}
    for layer in layers:
        namespace.update({key: value for key, value in vars(layer).items() if key not in _NOT_COPIED})
    namespace["__module__"] = _DistributedOptimizer.__module__
    namespace["_inner_class"] = type(optimizer)
    namespace["_settings"] = settings
    cls = type(type(optimizer).__name__, (type(optimizer),), namespace)
    wrapped: Any = cls(optimizer.param_groups, *arguments)
    # Horovod's constructor passes parameter groups only; without this a group added later would get the class's
    # defaults, not the user's.
    wrapped.defaults = dict(optimizer.defaults)
    # Nor is state passed: a checkpoint that was loaded already, or Adagrad's initial_accumulator_value.
    wrapped.state.update(optimizer.state)
    return wrapped


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[torch.nn.Parameter]:
    """Yield every parameter of every group once, tied ones included."""
    seen: set[int] = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter


def momenta_of(group: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return what of a parameter group is a momentum, by name."""
    betas = group.get("betas") or (0.0,)
    return [("momentum", group.get("momentum", 0.0)), ("betas[0]", betas[0])]


def export_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an averager's state with tensors in place of arrays, as checkpoints hold it."""
    return {
        **state,
        **{key: {name: torch.from_numpy(values) for name, values in state[key].items()} for key in ARRAYS},
    }


def to_arrays(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's state with arrays in place of tensors: the inverse of :func:`export_state`."""
    arrays = {
        key: {name: values.detach().cpu().numpy().reshape(-1).copy() for name, values in state[key].items()}
        for key in ARRAYS
        if key in state
    }
    return {**state, **arrays}


def import_state(
    state: Mapping[str, Any], parameters: Mapping[str, torch.nn.Parameter], config: ExchangeConfig
) -> dict[str, Any]:
    """Return a checkpoint's state with arrays; raise ArgumentError unless they fit ``parameters``."""
    for key in ARRAYS:
        for name, values in state.get(key, {}).items():
            if name not in parameters:
                raise ArgumentError(
                    f"the saved {key} has a parameter {name!r}, which this optimizer has not: the checkpoint is of "
                    "another model"
                )
            parameter = parameters[name]
            numel = parameter.numel()
            if key == "factor":
                codec = config.way_for(GradientMemory(name, parameter)).codec
                numel = codec.kept_numel(matrix_of(parameter))
            if values.numel() != numel:
                raise ArgumentError(
                    f"the saved {key} of parameter {name!r} has {values.numel()} elements, with this model it has "
                    f"{numel}: the checkpoint is of another model"
                )
    return to_arrays(state)


class CommonMethods(_DistributedOptimizer):
    """What every optimizer of this package adds to Horovod's. Never instantiated: :func:`build` copies the methods."""

    _step_supports_amp_scaling = True
    """GradScaler then always calls ``step()``, also when it finds Inf, so that the ranks count the same steps."""

    def _inner_step(self, closure: Callable[[], Any] | None) -> Any:
        """Let the user's optimizer step, unless GradScaler has found Inf; the gradients that it left scaled are not."""
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is None:
            return self._inner_class.step(self, closure)
        if float(found_inf):
            return None
        if grad_scale is not None:
            inverse = grad_scale.double().reciprocal().float()
            for parameter in parameters_of(self):
                if parameter.grad is not None:
                    parameter.grad.mul_(inverse)
        # A fused optimizer would take these for its own and scale once more; GradScaler removes them afterwards.
        self.found_inf = self.grad_scale = None
        return self._inner_class.step(self, closure)

    def flush(self, timeout: float | None = None) -> None:
        """Average a last partial period: call it on every rank before evaluating, saving or ending.

        Nothing happens with ``period=1``, or right after an average. Raises CollectiveTimeoutError if the other ranks
        do not come in ``timeout`` seconds (None: wait as any collective does); nothing is lost then.
        """

    def join(self) -> int:
        """Say that this rank has no more data, for now, and wait until no rank has; return the rank that joined last.

        Call it on every rank, at the end of each epoch: where ranks have different numbers of batches, those that have
        more go on. Each mean is then that of the ranks that have more data, and of what the others have done since the
        average before; a rank that has joined sends zeros. When all have joined what is left is averaged, as by
        :meth:`flush`, and all ranks have the same parameters; training can go on. Of several ranks that joined between
        two averages the one with the most steps is returned, of those the lowest.

        With ``period=1`` parameters and the optimizer's state become those of the rank that joined last; buffers stay
        local. Where Horovod itself averages (``none`` or ``fp16`` with ``period=1``) it is refused.

        A learning rate that is set in every step is not set on a rank that has joined; where a schedule or an outer
        optimizer depends on it those of the other ranks count. What error feedback has not sent of a rank that has
        joined, and its velocity, stay with it until it has data again.

        Raises ArgumentError, before anything is sent, if gradients are in flight, with ``signsgd(scaled=False)``, and
        where Horovod averages; DesynchronizedError on every rank if one
        calls flush(), or state_dict() in the middle of a period, while others have joined.

        >>> import torch, pqasgd_horovod.torch as hvd
        >>> hvd.init()
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = hvd.DistributedOptimizer(
        ...     torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), period=8
        ... )
        >>> for _ in range(3 + hvd.rank()):  # uneven data
        ...     optimizer.zero_grad()
        ...     model(torch.ones(1, 4)).sum().backward()
        ...     optimizer.step()
        >>> optimizer.join() == hvd.size() - 1
        True
        """
        raise NotImplementedError

    def communication_stats(self) -> dict[str, Any]:
        """Return running totals of this process.

        ``steps``, ``rounds`` (averages), ``world_size``, ``num_elements`` (parameters that are exchanged),
        ``bytes_sent``, ``bytes_received``, ``uncompressed_bytes`` (what a float32 ring allreduce of all gradients would
        have sent for the same steps), ``compression_ratio`` (uncompressed over sent) and ``exchange_seconds`` (spent
        waiting and applying). A gradient that Horovod sends as sparse counts with its values and indices, sent to each
        other rank, and as a dense one in ``uncompressed_bytes``. Control traffic is not counted.
        """
        result: dict[str, Any] = self._averager.communication_stats()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients; raises AssertionError while they are being exchanged, as Horovod does."""
        if self._handles:
            raise AssertionError(
                "optimizer.zero_grad() was called after loss.backward() but before optimizer.step() or "
                "optimizer.synchronize(): the gradients are still being exchanged"
            )
        self._inner_class.zero_grad(self, set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, on every rank, with the same values on every rank; they are exchanged from the next step on.

        Names come from ``named_parameters`` of the constructor if they were listed there, from the group if it has
        named parameters, or are made up. Raises ArgumentError if gradients are being exchanged, or a name is taken.
        """
        # They would join that exchange on no rank, and each rank would apply its own gradient.
        if "_handles" in self.__dict__ and self._handles and self._settings.carrier is not None:
            raise ArgumentError(
                "param_group: parameters cannot be added after loss.backward() and before optimizer.step() or "
                "optimizer.synchronize(): the gradients are still being exchanged"
            )
        if "_parameter_names" in self.__dict__:
            check_no_momentum(self._settings.exchange.feedback, momenta_of({**self.defaults, **param_group}))
        self._inner_class.add_param_group(self, param_group)
        if "_parameter_names" not in self.__dict__:
            return  # the constructor of the user's optimizer adds the first groups
        group = self.param_groups[-1]
        for i, parameter in enumerate(group["params"]):
            if parameter not in self._parameter_names:
                names = group.get("param_names")
                name = names[i] if names else f"allreduce.noname.{len(self.param_groups) - 1}.{i}"
                if name in self._parameter_names.values():
                    self.param_groups.pop()
                    raise ArgumentError(
                        f"param_group: the name {name!r} is taken by another parameter; names must be unique"
                    )
                self._parameter_names[parameter] = name
            self._allreduce_delay[parameter] = self.backward_passes_per_step

    def _export_averaging_state(self) -> dict[str, Any]:
        return export_state(self._averager.state_dict())

    def _import_averaging_state(self, state: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if state is None:
            return None
        named = {self._parameter_names[p]: p for p in parameters_of(self)}
        imported = import_state(state, named, self._settings.exchange)
        check_state(imported, self._averager.config())
        return imported

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state and, under ``"pqasgd"``, counters, configuration and the anchor.

        In the middle of a period it first averages it, which takes every rank: a rank that calls it alone gets
        CollectiveTimeoutError after ``flush_timeout`` seconds, nothing lost, or DesynchronizedError, as all ranks do,
        if the others come to their next average meanwhile. After ``flush()``, or when the period has just ended, one
        rank may call it alone.
        """
        self.flush(self._settings.flush_timeout)
        state: dict[str, Any] = self._inner_class.state_dict(self)
        state[STATE_KEY] = self._export_averaging_state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state. One without ``"pqasgd"`` (of a plain optimizer) starts a new period at the next step.

        Raises ArgumentError, and changes nothing, if it was made with another configuration or for another model.
        """
        state = self._import_averaging_state(state_dict.get(STATE_KEY))
        _DistributedOptimizer.load_state_dict(self, state_dict)
        self._averager.load_state_dict(state)
