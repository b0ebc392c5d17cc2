"""What was communicated, and what full communication would have cost."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..exchange.carriers import Carrier
from ..exchange.carriers.nodes import NodesCarrier

FLOAT32_NBYTES = 4


def ring_allreduce_nbytes(num_elements: int, world_size: int, itemsize: int = FLOAT32_NBYTES) -> int:
    r"""Return the bytes each rank sends in a ring allreduce, rounded down.

    :math:`2\frac{n-1}{n} \cdot s \cdot d` for :math:`d` elements of :math:`s` bytes.

    >>> ring_allreduce_nbytes(1000, world_size=4)
    6000
    """
    return 2 * (world_size - 1) * itemsize * num_elements // world_size


@dataclasses.dataclass
class CommunicationStatistics:
    """Running totals of one rank.

    Not counted: handshakes (32 bytes, a few in a run), the meeting before each average (32 bytes to each other rank)
    and Horovod's own control traffic.

    >>> statistics = CommunicationStatistics(world_size=2)
    >>> for _ in range(8):
    ...     statistics.count_step(num_elements=1000)
    >>> statistics.as_dict(bytes_sent=320, bytes_received=320)["compression_ratio"]
    100.0
    """

    world_size: int
    ranks_per_node: int = 1
    """Where ranks of a node share its work: then all bytes but the last two totals are those between nodes."""
    steps: int = 0
    rounds: int = 0
    num_elements: int = 0
    """Elements that full communication would average in a step."""
    exchange_seconds: float = 0.0
    """Time the training thread spent in averages."""
    _elements: int = 0
    _gathered_sent: int = 0
    _gathered_received: int = 0

    @classmethod
    def of(cls, carrier: Carrier | None) -> CommunicationStatistics:
        """Return the statistics of one rank of a carrier; None: of a rank that is alone."""
        if carrier is None:
            return cls(1)
        return cls(carrier.size, carrier.local.size if isinstance(carrier, NodesCarrier) else 1)

    def count_step(self, num_elements: int) -> None:
        """Count a step after which stock Horovod would have averaged ``num_elements`` gradients."""
        self.count_steps(1, num_elements)

    def count_steps(self, steps: int, num_elements: int) -> None:
        """Count several of them."""
        self.steps += steps
        self.num_elements = num_elements
        self._elements += steps * num_elements

    def count_allgather(self, own: int, total: int) -> None:
        """Count an allgather of ``total`` bytes beside the exchange, ``own`` of them this rank's."""
        self.count_elsewhere((self.world_size - 1) * own, total - own)

    def count_elsewhere(self, sent: int, received: int) -> None:
        """Count bytes that are not, or no longer, those of the exchange."""
        self._gathered_sent += sent
        self._gathered_received += received

    def as_dict(
        self, bytes_sent: int, bytes_received: int, sent_inside_node: int = 0, received_inside_node: int = 0
    ) -> dict[str, Any]:
        """Return the totals, with the bytes that the exchange has sent and received.

        ``compression_ratio`` is uncompressed bytes over bytes sent: 1 if both are 0, inf before the first average.
        """
        bytes_sent += self._gathered_sent
        bytes_received += self._gathered_received
        # A ring enters and leaves each node once, whatever the number of its ranks.
        uncompressed = ring_allreduce_nbytes(self._elements, self.world_size) // self.ranks_per_node
        nothing_sent = float("inf") if uncompressed else 1.0
        inside = {"bytes_sent_inside_node": sent_inside_node, "bytes_received_inside_node": received_inside_node}
        return {
            "steps": self.steps,
            "rounds": self.rounds,
            "world_size": self.world_size,
            "num_elements": self.num_elements,
            "bytes_sent": bytes_sent,
            "bytes_received": bytes_received,
            "uncompressed_bytes": uncompressed,
            "compression_ratio": uncompressed / bytes_sent if bytes_sent else nothing_sent,
            "exchange_seconds": self.exchange_seconds,
            **(inside if self.ranks_per_node > 1 else {}),
        }
