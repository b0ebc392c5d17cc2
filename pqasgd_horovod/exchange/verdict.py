"""What went wrong in a round, told the same way on every rank.

Problems are collected bucket by bucket, from bytes that every rank has received alike, and raised together when
nothing is in flight any more.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from ..errors import DesynchronizedError, NonFiniteError, PqasgdError, WireFormatError
from . import wire


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


# What a flag in the header of the last phase means, the most fundamental first.
_FLAGGED = (
    (
        wire.FLAG_DESYNCHRONIZED,
        Kind.DESYNCHRONIZED,
        "received a message of another step, round, bucket or configuration",
    ),
    (wire.FLAG_MALFORMED, Kind.MALFORMED, "received something malformed"),
    (wire.FLAG_NON_FINITE, Kind.NON_FINITE, "had NaN, Inf or a number beyond the codec's range"),
    (wire.FLAG_MEAN_OVERFLOW, Kind.NON_FINITE, "made a mean beyond the range of the second codec"),
)


def flagged_problem(bucket: int, headers: Sequence[wire.Header], cause: PqasgdError | None) -> Problem | None:
    """Return what the flags of a bucket's last headers say is wrong."""
    for flag, kind, text in _FLAGGED:
        ranks = [header.rank for header in headers if header.flags & flag]
        if ranks:
            return Problem(kind, bucket, f"{wire.format_ranks(ranks)} {text} in bucket {bucket}", cause)
    return None


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
