"""An optimizer is constructed on all ranks alike, or on none."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from .. import __version__
from ..errors import ArgumentError, PqasgdError
from ..exchange.carriers import Carrier
from ..exchange.handshake import verify_same
from .config import ExchangeConfig
from .strategy import PeriodicAveraging

_constructed: collections.Counter[tuple[int, ...]] = collections.Counter()


def check_process_set(horovod: Any, process_set: Any) -> None:
    """Raise ArgumentError if Horovod is not initialised, or does not know the process set."""
    if not horovod.is_initialized():
        raise ArgumentError("Horovod is not initialised: call hvd.init() first")
    if process_set.process_set_id is None:
        raise ArgumentError(
            f"process_set is {process_set}, which is not registered: pass it to hvd.init(process_sets=[...])"
        )


class Membership:
    """One optimizer's place among the ranks: its name, alike on all of them, and its carrier unless it is alone.

    Args:
        horovod: the framework's Horovod module, ``horovod.torch`` or ``horovod.tensorflow``.
        process_set: the ranks that train together.
        make_carrier: returns the carrier of a process set.

    Raises ArgumentError if Horovod is not initialised, or does not know the process set.
    """

    def __init__(self, horovod: Any, process_set: Any, make_carrier: Callable[[Any], Carrier]) -> None:
        check_process_set(horovod, process_set)
        self.name = ""
        self.carrier: Carrier | None = None
        self.description: dict[str, Any] = {}
        if process_set.included():
            ranks = tuple(process_set.ranks)
            self.name = f"pqasgd.optimizer.{_constructed[ranks]}"
            _constructed[ranks] += 1
            if len(ranks) > 1:
                self.carrier = make_carrier(process_set)

    def describe(
        self,
        optimizer: str,
        averaging: PeriodicAveraging,
        exchange: ExchangeConfig,
        *,
        op: Any,
        check_consistency: bool,
        **rest: Any,
    ) -> None:
        """Note what has to be the same on every rank."""
        self.description = {
            "package_version": __version__,
            "optimizer": optimizer,
            "averaging": averaging.config(),
            "exchange": exchange.config(),
            "op": str(op),
            "check_consistency": check_consistency,
            "world_size": self.carrier.size if self.carrier is not None else 1,
            **rest,
        }


@contextlib.contextmanager
def construct_together(membership: Membership) -> Iterator[None]:
    """Construct an optimizer on all ranks or on none: they compare descriptions, or learn of an error that some had."""
    carrier = membership.carrier
    try:
        yield
    except Exception as error:
        if carrier is not None:
            with contextlib.suppress(PqasgdError):
                verify_same(carrier, {"error": f"{type(error).__name__}: {error}"}, membership.name)
        raise
    if carrier is not None:
        verify_same(carrier, {"error": None, **membership.description}, membership.name)
