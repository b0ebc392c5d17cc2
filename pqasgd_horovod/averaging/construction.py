"""An optimizer is constructed on all ranks alike, or on none."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from .. import __version__
from ..codecs.base import is_number
from ..errors import ArgumentError
from ..exchange.carriers import Carrier
from ..exchange.carriers.nodes import find_nodes
from ..exchange.handshake import HANDSHAKE_TIMEOUT_SECONDS, verify_same
from .config import ExchangeConfig
from .strategy import PeriodicAveraging
from .together import NO_ERROR, Telling, succeed_together, telling

_constructed: collections.Counter[tuple[int, ...]] = collections.Counter()


def check_process_set(horovod: Any, process_set: Any) -> None:
    """Raise ArgumentError if Horovod is not initialised, or does not know the process set."""
    if not horovod.is_initialized():
        raise ArgumentError("Horovod is not initialised: call hvd.init() first")
    if not isinstance(process_set, horovod.ProcessSet):
        raise ArgumentError(
            f"process_set is {process_set!r}; it must be an hvd.ProcessSet, such as hvd.ProcessSet([0, 1])"
        )
    if process_set.process_set_id is None:
        raise ArgumentError(
            f"process_set is {process_set}, which is not registered: pass it to hvd.init(process_sets=[...]), or to "
            "hvd.add_process_set"
        )


def check_timeout(name: str, seconds: Any) -> float | None:
    """Return ``seconds`` as a float, or None; raise ArgumentError unless it is a number of seconds, or None."""
    if seconds is None:
        return None
    if not is_number(seconds) or not seconds >= 0:
        raise ArgumentError(f"{name} is {seconds!r}; it must be a number of seconds, 0 or more, or None, without end")
    return float(seconds)


def registered_process_set(horovod: Any, ranks: Sequence[int]) -> Any:
    """Return Horovod's process set of these ranks, in this order; None: it has none."""
    for number, members in horovod.mpi_ops._basics._get_process_set_ids_and_ranks().items():
        if list(members) == list(ranks):
            process_set = horovod.ProcessSet(list(ranks))
            process_set.process_set_id = number
            return process_set
    return None


def most_constructed(carrier: Carrier, own: int) -> int:
    """Return the most that any rank has constructed: one that has joined later, in elastic mode, has fewer; collective.

    >>> from pqasgd_horovod.exchange.carriers.threads import run_ranks
    >>> run_ranks(3, lambda carrier: most_constructed(carrier, own=carrier.rank))
    [2, 2, 2]
    """
    told = carrier.allgather("pqasgd.construction", np.frombuffer(own.to_bytes(8, "little"), np.uint8))
    return int(told.wait(HANDSHAKE_TIMEOUT_SECONDS).view("<u8").max())


def process_set_of(horovod: Any, ranks: Sequence[int]) -> Any:
    """Return Horovod's process set of these ranks, a new one if there is none; collective, on all ranks.

    Raises ArgumentError if Horovod makes no process sets after its initialization.
    """
    wanted = horovod.ProcessSet(list(ranks))
    if wanted.ranks == horovod.global_process_set.ranks:
        return horovod.global_process_set
    try:
        return registered_process_set(horovod, wanted.ranks) or horovod.add_process_set(wanted)
    except ValueError as error:
        raise ArgumentError(
            "hierarchy is 'node', which needs process sets that are made later: call hvd.init(process_sets=\"dynamic\")"
        ) from error


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
        self._horovod = horovod
        self._process_set = process_set
        self._make_carrier = make_carrier
        self._world = self._present_world()
        if process_set.included():
            ranks = tuple(process_set.ranks)
            if len(ranks) > 1:
                self.carrier = make_carrier(process_set)
                _constructed[ranks] = most_constructed(self.carrier, _constructed[ranks])
            self.name = f"pqasgd.optimizer.{_constructed[ranks]}"
            _constructed[ranks] += 1

    def _present_world(self) -> tuple[int, int, int]:
        return self._horovod.rank(), self._horovod.size(), self._process_set.size()

    def check_world(self) -> None:
        """Raise ArgumentError if Horovod has other ranks now, as in elastic mode, or no such process set any more."""
        check_process_set(self._horovod, self._process_set)
        world = self._present_world()
        if world != self._world:
            raise ArgumentError(
                f"{self.name} was made as rank {self._world[0]} of {self._world[1]}, and this is rank {world[0]} of "
                f"{world[1]} now: Horovod has been initialised anew. Make a DistributedOptimizer afterwards, on every "
                "rank: with Horovod's elastic mode in the function that hvd.elastic.run decorates, and give the state "
                "the model but not the optimizer"
            )

    @property
    def tell_in_layout(self) -> Telling | None:
        """Tells the other ranks of an error where they compare what they average."""
        return telling(self.carrier, f"{self.name}.layout")

    def find_nodes(self) -> None:
        """Let the carrier know which ranks share a node; collective.

        Raises ArgumentError on every rank if nodes have different numbers of ranks, for a process set that is not that
        of all ranks, and if Horovod was not initialised for it. With one rank on each node there is nothing to know.
        """
        horovod = self._horovod
        if self._process_set.process_set_id != 0:
            raise ArgumentError(
                f"hierarchy is 'node' with process_set={self._process_set}; it is for all ranks: leave one of them out"
            )
        if self.carrier is None:
            return

        # Before anything else: a rank that has failed is on its way to this handshake.
        verify_same(self.carrier, {**NO_ERROR, "hierarchy": "node"}, self.name)

        def make_carrier(ranks: Sequence[int]) -> Carrier | None:
            process_set = process_set_of(horovod, ranks)
            return self._make_carrier(process_set) if process_set.included() else None

        place = (horovod.cross_rank(), horovod.local_rank())
        found = find_nodes(self.carrier, *place, self.name, make_carrier)
        if found.local.size > 1:
            self.carrier = found

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
            "hierarchy": exchange.hierarchy,
            "package_version": __version__,
            "optimizer": optimizer,
            "averaging": averaging.config(),
            "exchange": exchange.config(),
            "op": str(op),
            "check_consistency": check_consistency,
            "world_size": self.carrier.size if self.carrier is not None else 1,
            **rest,
        }


def construct_together(membership: Membership) -> AbstractContextManager[None]:
    """Construct an optimizer on all ranks or on none: they compare descriptions, or learn of an error that some had."""
    return succeed_together(membership.carrier, membership.name, lambda: membership.description)
