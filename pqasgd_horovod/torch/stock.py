"""``period=1`` with a codec that commutes with a sum: Horovod's own optimizer, with a count of what it sends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import horovod.torch as horovod
import torch
from horovod.torch.optimizer import _DistributedAdasumOptimizer, _DistributedOptimizer

from ..averaging.statistics import CommunicationStatistics, ring_allreduce_nbytes
from ..errors import ArgumentError
from .joining import check_before_join
from .tensors import GatherHandle, counting
from .wrapping import CommonMethods, Settings, build


class StockMethods(_DistributedOptimizer):
    """Horovod's own optimizer, which also counts: the ring formula, or the allgathers of a sparse gradient."""

    def _start(self) -> None:
        self._statistics = CommunicationStatistics(self.process_set.size() if self.process_set.included() else 1)
        self._bytes = 0
        self._gathered: set[torch.nn.Parameter] = set()

    def _sparse_allreduce_grad_async(self, p: torch.nn.Parameter, name: str) -> tuple[GatherHandle, Any]:
        assert p.grad is not None
        handle, ctx = _DistributedOptimizer._sparse_allreduce_grad_async(self, p, name)
        self._gathered.add(p)
        return counting(handle, p.grad, self._statistics), ctx

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Synchronize unless told to skip it, then let the user's optimizer step; exactly Horovod's."""
        loss = self._stock_class.step(self, closure)
        num_elements = sum(p.numel() for p in self._requires_update)
        self._statistics.count_step(num_elements)
        self._statistics.rounds += 1
        reduced = self._requires_update - self._gathered
        nbytes = sum(p.numel() * (self._itemsize or p.element_size()) for p in reduced)
        self._bytes += ring_allreduce_nbytes(nbytes, self._statistics.world_size, itemsize=1)
        self._gathered.clear()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, on every rank, and synchronize them too, which Horovod would not."""
        CommonMethods.add_param_group(self, param_group)
        if "_stock_class" not in self.__dict__ or not self.process_set.included() or horovod.size() == 1:
            return
        if self._stock_class is _DistributedAdasumOptimizer:
            raise ArgumentError(
                "param_group: parameters cannot be added to an optimizer with op=hvd.Adasum; list them all at "
                "construction"
            )
        for parameter in self.param_groups[-1]["params"]:
            if parameter.requires_grad and parameter not in self._requires_update:
                self._requires_update.add(parameter)
                self._p_to_group[parameter] = (parameter,)
                self._group_counts[parameter,] = 0
                parameter.register_post_accumulate_grad_hook(self._make_hook(parameter))

    def flush(self, timeout: float | None = None) -> None:
        """Do nothing: every step averages."""

    def join(self) -> int:
        """Return the rank of a process that trains alone; raise ArgumentError on several ranks."""
        check_before_join(self)
        if horovod.size() == 1 or not self.process_set.included():
            return horovod.rank()
        raise ArgumentError(
            f"join() was called with op={self._settings.op} and period=1, where Horovod averages. Its own join(), in "
            "0.28.1, fails in some processes that have used other collectives before (its background loop ends with "
            "unordered_map::at), and divides by all ranks: use a codec, such as Compression.bf16, or a period"
        )

    def communication_stats(self) -> dict[str, Any]:
        """Return running totals, with the bytes of a ring allreduce, or of allgathers, since Horovod counts none."""
        return self._statistics.as_dict(self._bytes, self._bytes)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients, as Horovod does."""
        CommonMethods.zero_grad(self, set_to_none)


# The user's own step is hooked and profiled by torch; this one around it must not be, or step hooks would run twice.
StockMethods.step.hooked = True  # type: ignore[attr-defined]


def build_stock(
    optimizer: torch.optim.Optimizer, itemsize: int | None, op: Any, arguments: tuple[Any, ...], settings: Settings
) -> Any:
    """Return Horovod's optimizer for ``op``; a number counts ``itemsize`` bytes, None: as in its parameter."""
    if op == horovod.Adasum and horovod.size() > 1:
        if settings.process_set != horovod.global_process_set:
            raise NotImplementedError("Adasum does not support process sets other than the global one")
        base, arguments = _DistributedAdasumOptimizer, arguments[:3]
    else:
        base = _DistributedOptimizer
    wrapped = build(optimizer, base, StockMethods, arguments=arguments, settings=settings)
    wrapped._stock_class = base
    wrapped._itemsize = itemsize
    wrapped.process_set = settings.process_set
    wrapped._start()
    return wrapped
