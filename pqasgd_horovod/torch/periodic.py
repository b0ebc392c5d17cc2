"""``period>1``: local steps, and at the end of each period PQASGD's average."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from horovod.torch.optimizer import _DistributedOptimizer

from ..averaging import PeriodicAverager
from ..averaging.construction import check_timeout
from ..averaging.outer import OuterOptimizer
from .moments import OptimizerMoments
from .outer import OuterStepper
from .tensors import TensorMemory, select_buffers, select_counted
from .wrapping import CommonMethods, Settings, parameters_of


class PeriodicMethods(CommonMethods):
    """``period>1``: local steps, and at the end of each period PQASGD's average."""

    def __init__(self, params: Any, *arguments: Any) -> None:
        _DistributedOptimizer.__init__(self, params, *arguments)
        settings: Settings = self._settings
        outer = settings.averaging.outer
        self._averager = PeriodicAverager(
            settings.carrier,
            settings.averaging,
            settings.exchange,
            name=settings.name,
            check_consistency=settings.check_consistency,
            moments=OptimizerMoments(self),
            outer_stepper=OuterStepper(outer.optimizer, self) if isinstance(outer, OuterOptimizer) else None,
        )
        self._placed: dict[torch.nn.Parameter, TensorMemory] = {}

    def _register_hooks(self) -> None:
        """Register none: gradients stay local."""

    def _prepare(self) -> None:
        """Before the local update: see that what is trainable has an anchor. Collective when that has changed."""
        self._settings.membership.check_world()
        # A parameter frozen in the middle of a period has local progress left to average, so it keeps its place until
        # the next one: then it leaves, or the codec's noise would move it.
        if self._settings.averaging.delay and not all(p.requires_grad for p in self._placed):
            self._averager.flush()  # with a delay no average of the schedule leaves all replicas the same
        leaving = self._averager.steps_since_average == 0
        due = [p for p in parameters_of(self) if p.requires_grad or (p in self._placed and not leaving)]
        if self._averager.prepared and len(due) == len(self._placed) and all(p in self._placed for p in due):
            return
        place = self._settings.anchor_device
        model, policy = self._settings.model, self._settings.averaging.buffers
        with self._averager.refused_together():
            placed = {p: TensorMemory(self._parameter_names[p], functools.partial(_itself, p), place) for p in due}
            buffers = [] if model is None else list(select_buffers(model, policy, place))
        counted = [] if model is None else select_counted(model, policy)
        self._averager.prepare(list(placed.values()), buffers, counted)
        self._placed = placed

    def synchronize(self) -> None:
        """Do nothing: with ``period>1`` gradients stay local, and so does clipping them."""
        self._synchronized = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the user's optimizer step; at the end of a period average the replicas, which is collective.

        With a delay that average is applied so many steps later. Raises NonFiniteError or DesynchronizedError on every
        rank; parameters and anchor are then as before the average.
        """
        self._prepare()
        loss = self._inner_step(closure)
        self._synchronized = False
        self._averager.count_step(float(self.param_groups[0].get("lr", 0.0)))
        return loss

    def flush(self, timeout: float | None = None) -> None:
        """Average a last partial period: call it on every rank before evaluating, saving or ending.

        Nothing happens right after an average. Raises CollectiveTimeoutError if the other ranks do not come in
        ``timeout`` seconds (None: wait as any collective does); nothing is lost then.
        """
        timeout = check_timeout("timeout", timeout)
        self._settings.membership.check_world()
        self._averager.flush(timeout)

    def join(self) -> int:
        """Serve the averages of the ranks that have more data, and return the rank that joined last."""
        self._prepare()
        return int(self.process_set.ranks[self._averager.join()])


def _itself(parameter: torch.nn.Parameter) -> torch.Tensor:
    return parameter


# The user's own step is hooked and profiled by torch; this one around it must not be, or step hooks would run twice.
PeriodicMethods.step.hooked = True  # type: ignore[attr-defined]
