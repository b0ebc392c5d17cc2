"""Before anything else the ranks make sure that they mean the same thing.

Every rank describes what has to agree - codec, schedule, layout, seed - as JSON, and 32 bytes of SHA-256 are
compared. Only when they differ the descriptions themselves travel, and every rank raises the same error, which says
what differs and how.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import ArgumentError, MismatchError, WireFormatError
from .carriers import Bytes, Carrier
from .wire import VERSION, format_by_rank

HANDSHAKE_TIMEOUT_SECONDS = 300.0

_DIGEST_NBYTES = 32
_LENGTH_NBYTES = 8
_LONGEST_VALUE = 200


def verify_same(
    carrier: Carrier, description: Mapping[str, Any], name: str, timeout: float | None = HANDSHAKE_TIMEOUT_SECONDS
) -> int:
    """Return a 64-bit digest of ``description`` if it is the same on every rank.

    ``description`` is JSON-able (nested dicts, lists, strings, finite numbers, booleans, None). Differing ones raise
    :class:`~pqasgd_horovod.errors.MismatchError` on every rank, with the same text: the first field that differs, and
    each rank's value. A rank that does not take part raises :class:`~pqasgd_horovod.errors.CollectiveTimeoutError`
    after ``timeout`` seconds.

    >>> from pqasgd_horovod.exchange.carriers.threads import run_ranks
    >>> def program(carrier):
    ...     return verify_same(carrier, {"codec": {"bits": 4 if carrier.rank else 2}}, name="example")
    >>> run_ranks(2, program)
    Traceback (most recent call last):
      ...
    pqasgd_horovod.errors.MismatchError: the ranks have to agree on codec.bits: it is 2 on rank 0; 4 on rank 1
    """
    return verify_and_hear(carrier, description, b"", name, timeout)[0]


def verify_and_hear(
    carrier: Carrier,
    description: Mapping[str, Any],
    beside: bytes,
    name: str,
    timeout: float | None = HANDSHAKE_TIMEOUT_SECONDS,
) -> tuple[int, list[bytes]]:
    """Do what :func:`verify_same` does; and return what each rank says ``beside``, as many bytes, which may differ."""
    compared = compare(carrier, description, name, timeout, beside)
    if compared.documents:
        raise MismatchError(describe_difference(compared.documents))
    return compared.digest, compared.beside


class Comparison(NamedTuple):
    """What came of it when ranks compared their descriptions."""

    digest: int
    documents: list[dict[str, Any]]  # of all ranks, if they differ
    beside: list[bytes]  # of all ranks


def compare(
    carrier: Carrier,
    description: Mapping[str, Any],
    name: str,
    timeout: float | None = HANDSHAKE_TIMEOUT_SECONDS,
    beside: bytes = b"",
) -> Comparison:
    """Compare ``description`` as :func:`verify_same` does, and raise nothing if the ranks' differ."""
    try:
        text = json.dumps({"wire_version": VERSION, **description}, allow_nan=False, separators=(",", ":"))
        canonical = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"description has to be JSON-able, with finite numbers only: {error}") from None
    own = hashlib.sha256(canonical.encode()).digest()
    received = carrier.allgather(f"{name}.handshake.digest", np.frombuffer(own + beside, np.uint8)).wait(timeout)
    nbytes = _DIGEST_NBYTES + len(beside)
    if received.size != carrier.size * nbytes:
        raise WireFormatError(
            f"handshake {name!r}: {carrier.size} digests of {nbytes} bytes expected, got {received.size} bytes"
        )
    told = [message.tobytes() for message in received.reshape(carrier.size, nbytes)]
    digest, documents = int.from_bytes(own[:8], "little"), []
    if any(message[:_DIGEST_NBYTES] != own for message in told):
        document = text.encode()
        message = np.frombuffer(len(document).to_bytes(_LENGTH_NBYTES, "little") + document, np.uint8)
        described = carrier.allgather(f"{name}.handshake.description", message).wait(timeout)
        digest, documents = 0, _split_documents(described, carrier.size)
    return Comparison(digest, documents, [message[_DIGEST_NBYTES:] for message in told])


def _split_documents(received: Bytes, size: int) -> list[dict[str, Any]]:
    """Cut the length-prefixed JSON documents of all ranks apart."""
    documents: list[dict[str, Any]] = []
    data = received.tobytes()
    offset = 0
    for rank in range(size):
        start = offset + _LENGTH_NBYTES
        offset = start + int.from_bytes(data[offset:start], "little")
        try:
            document = json.loads(data[start:offset])
        except ValueError as error:
            raise WireFormatError(f"handshake: the description of rank {rank} cannot be read: {error}") from None
        if not isinstance(document, dict):
            raise WireFormatError(f"handshake: the description of rank {rank} is not a JSON object")
        documents.append(document)
    return documents


def _fields(value: object, path: str) -> Iterator[tuple[str, str]]:
    """Yield (path, text of the value) for every leaf of a description."""
    if isinstance(value, dict) and value:
        for key, member in value.items():
            yield from _fields(member, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value:
        yield f"{path} (length)", str(len(value))
        for index, member in enumerate(value):
            yield from _fields(member, f"{path}[{index}]")
    else:
        yield path, json.dumps(value)


def describe_difference(descriptions: Sequence[Mapping[str, Any]]) -> str:
    """Name the first field in which the ranks' descriptions differ, in the order of the lowest rank that has it."""
    tables = [dict(_fields(description, "")) for description in descriptions]
    keys = dict.fromkeys(key for description in descriptions for key in description)
    # What only a higher rank has comes with its likes: which tensor is missing says more than how many there are.
    paths = dict.fromkeys(path for key in keys for d in descriptions if key in d for path, _ in _fields(d[key], key))
    for path in paths:
        values = [table.get(path, "absent") for table in tables]
        if len(set(values)) > 1:
            listing = format_by_rank(enumerate(values if path == "error" else map(_shorten, values)))
            return f"the ranks have to agree on {path}: it is {listing}"
    return "the ranks have to agree on their settings: these have the same fields, nested differently"


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
