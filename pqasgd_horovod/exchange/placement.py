"""Where messages are: in the memory of GPUs, or of hosts.

Numbers of a GPU are coded there, and messages may stay there if all of them do: a collective moves memory of GPUs or of
hosts, not of both. So before anything is sent the ranks agree: each one has a GPU of its own, whose memory is carried,
or all messages are in host memory.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .carriers import Carrier
from .carriers.nodes import NodesCarrier
from .handshake import HANDSHAKE_TIMEOUT_SECONDS
from .wire import format_ranks

if TYPE_CHECKING:
    from ..native.cuda import Device

logger = logging.getLogger("pqasgd_horovod")

_ON_HOST = bytes(16)  # in the place of a GPU's identity


def place_messages(carrier: Carrier, device: Device | None, name: str) -> bool:
    """Return whether messages of the numbers of ``device`` are in its memory, as on all ranks; collective.

    A rank with a GPU says in its log which it is, and why, once of each.

    >>> from pqasgd_horovod.exchange.carriers.threads import run_ranks
    >>> run_ranks(2, lambda carrier: place_messages(carrier, None, "example"))
    [False, False]
    """
    if carrier.size == 1:
        return False
    reason = "" if device is None else device.host_messages
    if isinstance(carrier, NodesCarrier):
        reason = "hierarchy is 'node'"
    own = _ON_HOST if device is None or reason else device.identity
    received = carrier.allgather(f"{name}.place", np.frombuffer(own, np.uint8)).wait(HANDSHAKE_TIMEOUT_SECONDS)
    places = [place.tobytes() for place in received.reshape(carrier.size, len(_ON_HOST))]
    reason = reason or _why_on_host(places)
    if device is not None:
        _say(f"messages of {device} travel {f'through pinned host memory: {reason}' if reason else 'from its memory'}")
    return not reason


def _why_on_host(places: Sequence[bytes]) -> str:
    absent = [rank for rank, place in enumerate(places) if place == _ON_HOST]
    if absent:
        return f"those of {format_ranks(absent)} do"
    ranks_of = {place: [rank for rank, other in enumerate(places) if other == place] for place in places}
    shared = next((ranks for ranks in ranks_of.values() if len(ranks) > 1), None)
    return f"{format_ranks(shared)} have the same GPU" if shared else ""


@functools.cache
def _say(text: str) -> None:
    logger.info("%s", text)
