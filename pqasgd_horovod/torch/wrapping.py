"""How a Horovod optimizer is built, and what all of ours have in common.

Horovod makes a class at run time, a subclass of the user's optimizer class whose methods are copied in. So do we: the
methods of the classes in this package are copied over Horovod's, and the class says that it comes from
``horovod.torch.optimizer``, which ``broadcast_optimizer_state`` looks for. Methods call the user's optimizer as
``self._inner_class.step(self)``: in such a class ``super()`` would not find it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import horovod.torch as horovod
import numpy as np
import torch
from horovod.torch.optimizer import _DistributedOptimizer

from .. import __version__
from ..averaging import ExchangeConfig, PeriodicAveraging
from ..averaging.state import check_state
from ..errors import ArgumentError, PqasgdError
from ..exchange.handshake import verify_same
from .carrier import HorovodCarrier
from .tensors import describe

STATE_KEY = "pqasgd"
_NOT_COPIED = frozenset({"__dict__", "__weakref__", "__module__", "__doc__", "__annotations__"})

_constructed: collections.Counter[tuple[int, ...]] = collections.Counter()


class Membership:
    """One optimizer's place among the ranks: its name, alike on all of them, and its carrier unless it is alone."""

    def __init__(self, process_set: Any) -> None:
        if not horovod.is_initialized():
            raise ArgumentError("Horovod is not initialised: call hvd.init() before hvd.DistributedOptimizer")
        included = process_set.included()
        if included is None:
            raise ArgumentError(
                f"process_set is {process_set}, which is not registered: pass it to hvd.init(process_sets=[...])"
            )
        self.name = ""
        self.carrier: HorovodCarrier | None = None
        self.description: dict[str, Any] = {}
        if included:
            ranks = tuple(process_set.ranks)
            self.name = f"pqasgd.optimizer.{_constructed[ranks]}"
            _constructed[ranks] += 1
            if len(ranks) > 1:
                self.carrier = HorovodCarrier(process_set)

    def describe(self, optimizer: Any, inner_name: str, settings: Settings) -> None:
        """Note what has to be the same on every rank."""
        self.description = {
            "package_version": __version__,
            "optimizer": inner_name,
            "averaging": settings.averaging.config(),
            "exchange": settings.exchange.config(),
            "op": str(settings.op),
            "check_consistency": settings.check_consistency,
            "world_size": self.carrier.size if self.carrier is not None else 1,
            "parameters": {optimizer._parameter_names[p]: describe(p) for p in parameters_of(optimizer)},
        }
        if hasattr(optimizer, "_averager"):
            # Tensors are laid end to end, so their order matters; Horovod itself goes by names alone.
            order = [optimizer._parameter_names[p] for p in parameters_of(optimizer)]
            self.description["parameter_order"] = order


@contextlib.contextmanager
def construct_together(process_set: Any) -> Iterator[Membership]:
    """Construct an optimizer on all ranks or on none: they compare descriptions, or learn of an error that some had."""
    membership = Membership(process_set)
    carrier = membership.carrier
    try:
        yield membership
    except Exception as error:
        if carrier is not None:
            with contextlib.suppress(PqasgdError):
                verify_same(carrier, {"error": f"{type(error).__name__}: {error}"}, membership.name)
        raise
    if carrier is not None:
        verify_same(carrier, {"error": None, **membership.description}, membership.name)


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

    @property
    def name(self) -> str:
        """The prefix of all names on the wire."""
        return self.membership.name

    @property
    def carrier(self) -> HorovodCarrier | None:
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
    return wrapped


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[torch.nn.Parameter]:
    """Yield every parameter of every group once, tied ones included."""
    seen: set[int] = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter


def export_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an averager's state with tensors in place of arrays, as checkpoints hold it."""
    return {**state, "anchor": {name: torch.from_numpy(values) for name, values in state["anchor"].items()}}


def import_state(state: Mapping[str, Any], parameters: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return a checkpoint's state with arrays; raise ArgumentError unless its anchor fits ``parameters``."""
    anchors: dict[str, np.ndarray] = {}
    for name, values in state.get("anchor", {}).items():
        if name not in parameters:
            raise ArgumentError(
                f"the saved anchor has a parameter {name!r}, which this optimizer has not: the checkpoint is of "
                "another model"
            )
        if values.numel() != parameters[name].numel():
            raise ArgumentError(
                f"the saved anchor of parameter {name!r} has {values.numel()} elements, the parameter has "
                f"{parameters[name].numel()}: the checkpoint is of another model"
            )
        anchors[name] = values.detach().cpu().numpy().reshape(-1).copy()
    return {**state, "anchor": anchors}


class CommonMethods(_DistributedOptimizer):
    """What every optimizer of this package adds to Horovod's. Never instantiated: :func:`build` copies the methods."""

    def flush(self, timeout: float | None = None) -> None:
        """Average a last partial period: call it on every rank before evaluating, saving or ending.

        Nothing happens with ``period=1``, or right after an average. Raises CollectiveTimeoutError if the other ranks
        do not come in ``timeout`` seconds (None: wait as any collective does); nothing is lost then.
        """

    def communication_stats(self) -> dict[str, Any]:
        """Return running totals of this process.

        ``steps``, ``rounds`` (averages), ``world_size``, ``num_elements`` (parameters that are exchanged),
        ``bytes_sent``, ``bytes_received``, ``uncompressed_bytes`` (what a float32 ring allreduce of all gradients would
        have sent for the same steps), ``compression_ratio`` (uncompressed over sent) and ``exchange_seconds`` (spent
        waiting and applying). Control traffic and gradients that Horovod sends as sparse are not counted.
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
        imported = import_state(state, {self._parameter_names[p]: p for p in parameters_of(self)})
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
