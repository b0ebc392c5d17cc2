"""A carrier that knows which ranks share a node."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import numpy as np

from ...errors import ArgumentError
from . import Bytes, Carrier, Handle

_PLACE = struct.Struct("<qq")


class NodesCarrier:
    """The ranks of a carrier, ``across`` nodes of equal size: the carrier itself, and one for each way to cut it.

    Args:
        world: all ranks.
        local: the ranks of this node.
        across: one rank of each node, those that have this rank's number in their node's ``local``.
        local_ranks: their numbers in ``world``.
        across_ranks: likewise.
    """

    def __init__(
        self, world: Carrier, local: Carrier, across: Carrier, local_ranks: Sequence[int], across_ranks: Sequence[int]
    ) -> None:
        self.world = world
        self.rank, self.size = world.rank, world.size
        self.local, self.across = local, across
        self.local_ranks, self.across_ranks = tuple(local_ranks), tuple(across_ranks)

    def allgather(self, name: str, payload: Bytes) -> Handle[Bytes]:
        """Send ``payload`` to every rank."""
        return self.world.allgather(name, payload)

    def alltoall(self, name: str, payload: Bytes, splits: Sequence[int]) -> Handle[Bytes]:
        """Send the r-th of ``size`` consecutive pieces of ``payload`` to rank r."""
        return self.world.alltoall(name, payload, splits)


def find_nodes(
    world: Carrier, node: int, place: int, name: str, make_carrier: Callable[[Sequence[int]], Carrier | None]
) -> NodesCarrier:
    """Return a carrier that knows the nodes; collective.

    Args:
        world: all ranks.
        node: the number of this rank's node.
        place: the number of this rank on it.
        name: begins the names of what is sent.
        make_carrier: returns a carrier of some ranks; called on all ranks for the same ones, in the same order; None
            where this rank is not among them.

    Raises ArgumentError on every rank unless each node has equally many.
    """
    places = world.allgather(f"{name}.nodes", np.frombuffer(_PLACE.pack(node, place), np.uint8)).wait().tobytes()
    nodes: dict[int, list[tuple[int, int]]] = {}
    for rank, (of, number) in enumerate(_PLACE.iter_unpack(places)):
        nodes.setdefault(of, []).append((number, rank))
    groups = [[rank for _, rank in sorted(nodes[of])] for of in sorted(nodes)]
    if len({len(group) for group in groups}) > 1:
        listing = ", ".join(f"{len(group)} on the node of rank {min(group)}" for group in groups)
        raise ArgumentError(
            f"hierarchy is 'node', which needs as many ranks on every node; there are {listing}: start as many on "
            "each host (-H host1:4,host2:4), or leave hierarchy out"
        )
    chains = [list(chain) for chain in zip(*groups, strict=True)]
    found: list[tuple[list[int], Carrier]] = []
    for ranks in [*groups, *chains]:
        carrier = make_carrier(ranks)
        if carrier is not None:
            found.append((ranks, carrier))
    (local_ranks, local), (across_ranks, across) = found
    return NodesCarrier(world, local, across, local_ranks, across_ranks)
