"""Where messages are: in the memory of GPUs, or of hosts.

Numbers of a GPU are coded there, and messages may stay there if all of them do: a collective moves memory of GPUs or of
hosts, not of both. So before anything is sent the ranks agree: each one has a GPU of its own, whose memory is carried,
or all messages are in host memory.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .carriers import Carrier
from .handshake import verify_and_hear
from .wire import format_ranks

if TYPE_CHECKING:
    from ..native.cuda import Device

logger = logging.getLogger("pqasgd_horovod")

_ON_HOST = bytes(16)  # in the place of a GPU's identity


def verify_and_place(
    carrier: Carrier, description: Mapping[str, Any], device: Device | None, name: str
) -> tuple[int, bool]:
    """Do what :func:`~.handshake.verify_same` does; return the digest, and whether messages are in GPUs' memory.

    That is the same on every rank. One with a ``device`` says in its log which it is, and why, once of each.

    >>> from pqasgd_horovod.exchange.carriers.threads import run_ranks
    >>> digests = run_ranks(2, lambda carrier: verify_and_place(carrier, {"seed": 1}, None, "example"))
    >>> [on_device for _, on_device in digests]
    [False, False]
    """
    reason = "" if device is None else device.host_messages
    own = _ON_HOST if device is None or reason else device.identity
    digest, places = verify_and_hear(carrier, description, own, name)
    reason = reason or _why_on_host(places)
    if device is not None and carrier.size > 1:
        _say(f"messages of {device} travel {f'through pinned host memory: {reason}' if reason else 'from its memory'}")
    return digest, not reason and carrier.size > 1


def _why_on_host(places: Sequence[bytes]) -> str:
    absent = [rank for rank, place in enumerate(places) if place == _ON_HOST]
    if absent:
        return f"those of {format_ranks(absent)} have to"
    ranks_of = {place: [rank for rank, other in enumerate(places) if other == place] for place in places}
    shared = next((ranks for ranks in ranks_of.values() if len(ranks) > 1), None)
    return f"{format_ranks(shared)} have the same GPU" if shared else ""


@functools.cache
def _say(text: str) -> None:
    logger.info("%s", text)
