"""``period=1`` with any other codec: coded gradients, bucket by bucket, while backward runs."""

from __future__ import annotations

import functools
import itertools
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import horovod.torch as horovod
import numpy as np
import torch
from horovod.torch.optimizer import _DistributedOptimizer

from ..averaging import GradientAverager, MomentumCorrection
from ..averaging.tables import SparseSpec
from ..errors import ArgumentError
from ..exchange.rows import Rows
from .joining import check_before_join, take_over
from .tensors import GradientMemory, describe
from .wrapping import CommonMethods, Settings, parameters_of

_CHANGE_MEANS = (
    "gradients leave during backward, so it is their means that have to be clipped or unscaled. Call "
    "optimizer.synchronize() before, and afterwards, inside optimizer.skip_synchronize(), optimizer.step()"
)


class GradientMethods(CommonMethods):
    """``period=1`` with a codec that does not commute with a sum: coded gradients, exchanged during backward."""

    def __init__(self, params: Any, *arguments: Any) -> None:
        _DistributedOptimizer.__init__(self, params, *arguments)
        settings: Settings = self._settings
        self._averager = GradientAverager(
            settings.carrier,
            settings.exchange,
            name=settings.name,
            sum_over_ranks=settings.op == horovod.Sum,
            check_consistency=settings.check_consistency,
        )
        self._gradients: dict[torch.nn.Parameter, GradientMemory] = {}
        self._sparse: dict[torch.nn.Parameter, str] = {}
        self._computed: dict[torch.nn.Parameter, tuple[torch.Tensor, int]] = {}
        self._layout_is_current: bool | None = None
        self._hooked: set[torch.nn.Parameter] = set()
        self._add_hooks()

    def _register_hooks(self) -> None:
        """Register none of Horovod's."""

    def _add_hooks(self) -> None:
        """Watch the gradients of all parameters that are trainable now."""
        if self._settings.carrier is None:
            return
        this = weakref.ref(self)

        def on_gradient(parameter: Any) -> None:
            optimizer = this()
            if optimizer is not None:
                optimizer._on_gradient(parameter)

        for parameter in parameters_of(self):
            if parameter.requires_grad and parameter not in self._hooked:
                self._hooked.add(parameter)
                parameter.register_post_accumulate_grad_hook(on_gradient)

    def _on_gradient(self, parameter: torch.nn.Parameter) -> None:
        if self._allreduce_delay[parameter] <= 0:
            raise AssertionError(
                "Gradients were computed more than backward_passes_per_step times before step() or synchronize(). "
                "Increase backward_passes_per_step to accumulate gradients locally."
            )
        assert parameter.grad is not None
        assert not parameter.grad.requires_grad, "gradients must not need gradients themselves (create_graph=True)"
        self._allreduce_delay[parameter] -= 1
        # Horovod's skip_synchronize and zero_grad look here for gradients in flight.
        self._handles[parameter] = None
        if self._allreduce_delay[parameter] == 0:
            self._computed[parameter] = parameter.grad, parameter.grad._version
            if self._is_current():
                self._launch(parameter)

    def _launch(self, parameter: torch.nn.Parameter) -> None:
        if parameter in self._gradients:
            self._averager.ready(self._gradients[parameter].name)
        else:
            self._averager.ready_rows(self._sparse[parameter], functools.partial(rows_of, parameter))

    def _is_current(self) -> bool:
        """Return whether the layout has every trainable parameter, as it is in memory; looked up once in a step."""
        if self._layout_is_current is None:
            self._settings.membership.check_world()
            placed = self._gradients.keys() | self._sparse.keys()
            self._layout_is_current = (
                bool(placed)
                and all(p in placed for p in parameters_of(self) if p.requires_grad)
                and all(gradient.is_current() for gradient in self._gradients.values())
            )
        return self._layout_is_current

    def _lay_out(self) -> None:
        """Give every trainable parameter its place; one that was placed keeps it when it is frozen, and sends zeros."""
        gradients: dict[torch.nn.Parameter, GradientMemory] = {}
        sparse: dict[torch.nn.Parameter, str] = {}
        with self._averager.refused_together():
            for parameter in parameters_of(self):
                name = self._parameter_names[parameter]
                if parameter in self._sparse or (
                    parameter not in self._gradients
                    and not self.sparse_as_dense
                    and parameter.grad is not None
                    and parameter.grad.is_sparse
                ):
                    sparse[parameter] = name
                elif parameter in self._gradients or parameter.requires_grad:
                    gradients[parameter] = GradientMemory(name, parameter)
            feedback = self._settings.exchange.feedback
            if sparse and isinstance(feedback, MomentumCorrection):
                raise ArgumentError(
                    f"gradients of {sorted(sparse.values())} are sparse, with feedback={feedback}: only rows that are "
                    "used in a step are sent, and momentum moves all of them; use sparse_as_dense=True"
                )
        specs = [SparseSpec(name, tuple(p.shape), describe(p)) for p, name in sparse.items()]
        self._averager.prepare(list(gradients.values()), specs)
        self._gradients, self._sparse = gradients, sparse
        self._add_hooks()

    def synchronize(self) -> None:
        """Wait until every gradient is the mean over all ranks; collective.

        Raises NonFiniteError, MismatchError or DesynchronizedError on every rank, with the gradients as this rank
        computed them; and, when the exchange is over, ArgumentError on a rank that has changed gradients since backward
        computed them, as clipping does: they leave during backward. (``GradScaler.unscale_`` leaves no trace that could
        be found here.)
        """
        if not self._averager.exchanges:
            self._settings.membership.check_world()
            self._averager.finish()
            self._synchronized = True
            return
        if not self._is_current():
            self._lay_out()
        for parameter in itertools.chain(self._gradients, self._sparse):
            self._launch(parameter)
        averaged, received = False, {}
        changed = [
            self._parameter_names[parameter]
            for parameter, (gradient, version) in self._computed.items()
            if gradient._version != version or not _is_same(parameter.grad, gradient)
        ]
        self._computed.clear()
        frozen = [gradient.name for parameter, gradient in self._gradients.items() if not parameter.requires_grad]
        try:
            received = self._averager.finish(frozen)
            averaged = True
        finally:
            for gradient in self._gradients.values():
                gradient.restore(keep_mean=averaged)
            for parameter in self._allreduce_delay:
                self._allreduce_delay[parameter] = self.backward_passes_per_step
            self._handles.clear()
            self._layout_is_current = None
        for parameter, name in self._sparse.items():
            parameter.grad = gradient_of(parameter, received[name])
        if changed:
            raise ArgumentError(
                f"the gradients of {changed} were changed after backward had computed them, and before they were "
                f"averaged: {_CHANGE_MEANS}"
            )
        self._synchronized = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Synchronize, unless inside ``skip_synchronize()``, then let the user's optimizer step.

        A ``closure`` computes gradients anew: they are synchronized each time it is called. Raises ArgumentError, when
        the exchange is over, if GradScaler calls it outside of ``skip_synchronize()``.
        """
        is_scaled = getattr(self, "found_inf", None) is not None
        if is_scaled and self._should_synchronize and self._averager.exchanges:
            self.synchronize()
            self._synchronized = False
            del self.found_inf, self.grad_scale
            raise ArgumentError(
                f"GradScaler has looked for Inf in gradients that are not averaged yet: {_CHANGE_MEANS}, "
                "scaler.step(optimizer)"
            )
        if closure is not None and self._should_synchronize:
            return self._inner_class.step(self, lambda: self._evaluate(closure))
        if self._should_synchronize:
            if self._synchronized:
                warnings.warn(
                    "optimizer.step() called without optimizer.skip_synchronize() after optimizer.synchronize(): "
                    "the gradients are exchanged twice",
                    stacklevel=2,
                )
            self.synchronize()
        self._synchronized = False
        return self._inner_step(closure)

    def join(self) -> int:
        """Send zeros while others have gradients; then take over parameters of the rank that joined last."""
        check_before_join(self)
        if self._averager.exchanges and not self._is_current():
            self._lay_out()
        try:
            last, uneven = self._averager.join()
        finally:
            for gradient in self._gradients.values():
                gradient.restore(keep_mean=False)
            self._layout_is_current = None
        last = int(self.process_set.ranks[last])
        if uneven:
            take_over(self, last)
        return last

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        with torch.enable_grad():
            loss = closure()
        self.synchronize()
        self._synchronized = False
        return loss


def rows_of(parameter: torch.nn.Parameter) -> Rows:
    """Return the rows of a gradient; a row that was used several times is there once. No gradient: no rows."""
    gradient = parameter.grad
    if gradient is None:
        return Rows(np.empty(0, np.int64), np.empty(0, np.float32))
    gradient = (gradient if gradient.is_sparse else gradient.to_sparse(1)).coalesce()
    numbers, values = gradient.indices()[0].cpu(), gradient.values().float().cpu()
    return Rows(numbers.contiguous().numpy(), values.contiguous().numpy())


def gradient_of(parameter: torch.nn.Parameter, rows: Rows) -> torch.Tensor:
    """Return rows as a gradient of a parameter."""
    values = torch.from_numpy(rows.values).to(parameter.dtype).reshape(-1, *parameter.shape[1:])
    numbers = torch.from_numpy(rows.numbers)[None]
    return torch.sparse_coo_tensor(numbers, values, parameter.shape, is_coalesced=True, check_invariants=False)


def _is_same(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    return one is other or (one is not None and torch.equal(one, other))


# The user's own step is hooked and profiled by torch; this one around it must not be, or step hooks would run twice.
GradientMethods.step.hooked = True  # type: ignore[attr-defined]
