"""What went wrong in a round, told the same way on every rank.

Problems are collected bucket by bucket, from bytes that every rank has received alike, and raised together when
nothing is in flight any more.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import numpy as np

from .. import native
from ..errors import DesynchronizedError, NonFiniteError, PqasgdError, WireFormatError
from . import wire
from .carriers import Messages


class Kind(enum.IntEnum):
    """Kinds of problem; the lowest one of a round is raised, for the others may follow from it."""

    DESYNCHRONIZED = 0
    MALFORMED = 1
    NON_FINITE = 2


class Problem(NamedTuple):
    """What is wrong with one bucket; ``cause`` is what this rank alone knows about it."""

    kind: Kind
    bucket: int
    text: str
    cause: PqasgdError | None = None


class Names(NamedTuple):
    """What the user calls the ranks and the buckets of an exchange that is a part of another one."""

    ranks: Sequence[int]
    buckets: Sequence[int]
    of_nodes: bool = False  # each rank speaks for its node

    def apply(self, header: wire.Header) -> wire.Header:
        """Return the header with the numbers that the user knows."""
        bucket = self.buckets[header.bucket] if header.bucket < len(self.buckets) else header.bucket
        return header._replace(rank=self.ranks[header.rank], bucket=bucket)


# What a flag in the header of the last phase means, the most fundamental first.
FLAGGED = (
    (
        wire.FLAG_DESYNCHRONIZED,
        Kind.DESYNCHRONIZED,
        "received a message of another step, round, bucket or configuration",
    ),
    (wire.FLAG_MALFORMED, Kind.MALFORMED, "received something malformed"),
    (wire.FLAG_NON_FINITE, Kind.NON_FINITE, "had NaN, Inf or a number beyond the codec's range"),
    (wire.FLAG_MEAN_OVERFLOW, Kind.NON_FINITE, "made a mean beyond the range of the second codec"),
)


def flagged_problem(
    bucket: int, headers: Sequence[wire.Header], cause: PqasgdError | None, names: Names | None = None
) -> Problem | None:
    """Return what the flags of a bucket's last headers say is wrong."""
    of = "the node of " if names is not None and names.of_nodes else ""
    for flag, kind, text in FLAGGED:
        ranks = [header.rank for header in headers if header.flags & flag]
        if ranks:
            return Problem(kind, bucket, f"{of}{wire.format_ranks(ranks)} {text} in bucket {bucket}", cause)
    return None


def read_headers(
    flags: int,
    received: Messages,
    own: wire.Header,
    senders: Sequence[int],
    payload_nbytes: Sequence[int] | Callable[[int], int],
    names: Names | None = None,
) -> list[wire.Header]:
    """Return the headers of the messages that one phase has brought, or raise what the core found wrong with them.

    Args:
        flags: what the core found; see ``pq_flags`` in ``native/include/pqasgd.h``.
        received: the messages of ``senders``, end to end.
        own: the header of this rank's own message.
        senders: ranks, rising.
        payload_nbytes: bytes that the payload of each of them has to have; where each has as many elements as it likes,
            a function of that number.
        names: what the user calls the ranks and buckets, if not by their numbers here.

    Raises DesynchronizedError or WireFormatError.
    """
    messages = wire.split_messages(received if isinstance(received, np.ndarray) else received.to_host(), senders)
    if names is not None:
        messages = [message._replace(header=names.apply(message.header)) for message in messages]
        own, senders = names.apply(own), [names.ranks[sender] for sender in senders]
    headers = [message.header for message in messages]
    if callable(payload_nbytes):
        expected = [payload_nbytes(header.num_elements) for header in headers]
        compared, own = [header._replace(num_elements=0) for header in headers], own._replace(num_elements=0)
    else:
        expected, compared = list(payload_nbytes), headers
    if own.rank not in senders:
        compared = sorted([*compared, own], key=lambda header: header.rank)
    wire.check(compared, own)
    if any(message.payload.size != nbytes for message, nbytes in zip(messages, expected, strict=True)):
        listing = wire.format_by_rank((message.header.rank, f"{message.payload.size} bytes") for message in messages)
        raise WireFormatError(f"the payloads are not of the size that the codec gives them: {listing}")
    native.check_status(-(flags >> 8), "decode")
    return headers


def explain(
    flags: int,
    received: Messages,
    own: wire.Header,
    senders: Sequence[int],
    payload_nbytes: Sequence[int] | Callable[[int], int],
    cause: PqasgdError | None = None,
    names: Names | None = None,
) -> Problem:
    """Say in words what is wrong with a bucket, by what its last phase has brought; arguments as above.

    ``cause`` is what this rank alone knows about it from an earlier phase.
    """
    bucket = own.bucket if names is None else names.apply(own).bucket
    try:
        headers = read_headers(flags, received, own, senders, payload_nbytes, names)
        problem = flagged_problem(bucket, headers, cause, names)
    except DesynchronizedError as error:
        return Problem(Kind.DESYNCHRONIZED, bucket, str(error), cause)
    except WireFormatError as error:
        return Problem(Kind.MALFORMED, bucket, f"bucket {bucket}: {error}", cause)
    assert problem is not None, f"the core found flags {flags:#x} in bucket {bucket}, but the headers tell of nothing"
    return problem


def raise_verdict(name: str, problems: Sequence[Problem]) -> NoReturn:
    """Raise the error of a round with ``problems``."""
    worst = min(problems)
    text = f"exchange {name!r}: {worst.text}"
    if worst.kind is Kind.DESYNCHRONIZED:
        raise DesynchronizedError(text) from worst.cause
    if worst.kind is Kind.MALFORMED:
        raise WireFormatError(text) from worst.cause
    listing = "; ".join(problem.text for problem in sorted(problems))
    raise NonFiniteError(f"exchange {name!r}: {listing}. Nothing was averaged.")
