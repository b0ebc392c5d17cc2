"""Every message begins with a header: a rank that is out of step is then an error, not a wrong mean.

64 bytes, little-endian:

====== ===== ==================================================================
offset bytes field
====== ===== ==================================================================
0      4     magic ``PQA1``
4      2     flags
6      2     version
8      8     digest of what the ranks agreed on (:mod:`.handshake`)
16     8     round
24     8     step
32     4     bucket
36     4     rank of the sender
40     8     payload bytes after the header
48     8     elements of the bucket
56     4     phase (0: the ranks' values, 1: the owners' means)
60     4     CRC-32 of the 60 bytes before
====== ===== ==================================================================

The checksum covers the header, on which the ranks' common verdict rests; the payload's integrity is the transport's
business.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ..errors import DesynchronizedError, WireFormatError
from .carriers import Bytes

MAGIC = b"PQA1"
VERSION = 1
HEADER_NBYTES = 64

FLAG_NON_FINITE = 1  # the sender's own values in this bucket hold NaN, Inf or a number beyond the codec's range
FLAG_MEAN_OVERFLOW = 2  # the mean that the sender made is beyond the range of the second codec
FLAG_DESYNCHRONIZED = 4  # in phase one the sender received a message of another step, round, bucket or configuration
FLAG_MALFORMED = 8  # in phase one the sender received something that is no message, or no payload
ALL_FLAGS = 15

_FIELDS = struct.Struct("<4sHHQQQIIQQI")
_CHECKSUM = struct.Struct("<I")


class Header(NamedTuple):
    """What a message says about itself."""

    flags: int
    digest: int
    round: int
    step: int
    bucket: int
    rank: int
    payload_nbytes: int
    num_elements: int
    phase: int


class Message(NamedTuple):
    """A header and the payload that follows it, a view of the bytes received."""

    header: Header
    payload: Bytes


def pack_into(buffer: Bytes, header: Header) -> None:
    """Write ``header`` to the first 64 bytes of ``buffer``, a contiguous uint8 array."""
    flags, *rest = header
    view = buffer.data
    _FIELDS.pack_into(view, 0, MAGIC, flags, VERSION, *rest)
    _CHECKSUM.pack_into(view, _FIELDS.size, zlib.crc32(view[: _FIELDS.size]))


def unpack(buffer: Bytes) -> Header:
    """Read the header at the beginning of ``buffer``; raise WireFormatError if there is none.

    >>> import numpy as np
    >>> buffer = np.zeros(64, np.uint8)
    >>> header = Header(0, digest=1, round=2, step=16, bucket=3, rank=0, payload_nbytes=0, num_elements=5, phase=0)
    >>> pack_into(buffer, header)
    >>> unpack(buffer) == header
    True
    """
    if buffer.size < HEADER_NBYTES:
        raise WireFormatError(f"a message has a header of {HEADER_NBYTES} bytes, only {buffer.size} bytes are left")
    view = buffer.data[:HEADER_NBYTES]
    magic, flags, version, *rest = _FIELDS.unpack_from(view)
    if magic != MAGIC:
        raise WireFormatError(f"a message begins with {MAGIC!r}, got {magic!r}")
    if version != VERSION:
        raise WireFormatError(
            f"the message has version {version}, this is version {VERSION}: install the same release on every rank"
        )
    (checksum,) = _CHECKSUM.unpack_from(view, _FIELDS.size)
    if checksum != zlib.crc32(view[: _FIELDS.size]):
        raise WireFormatError("the header's checksum does not fit its contents: it was corrupted on the way")
    if flags & ~ALL_FLAGS:
        raise WireFormatError(f"the header has unknown flags {flags:#06x}")
    return Header(flags, *rest)


def split_messages(received: Bytes, senders: Sequence[int]) -> list[Message]:
    """Cut the concatenated messages of ``senders`` apart, by the sizes in their headers.

    Raises :class:`~pqasgd_horovod.errors.WireFormatError` unless ``received`` is exactly one whole message of each
    sender, in this order.
    """
    messages = []
    offset = 0
    for rank in senders:
        try:
            header = unpack(received[offset:])
        except WireFormatError as error:
            raise WireFormatError(f"message of rank {rank}: {error}") from None
        start = offset + HEADER_NBYTES
        offset = start + header.payload_nbytes
        if header.rank != rank:
            raise WireFormatError(f"message of rank {rank}: its header says that it is of rank {header.rank}")
        if offset > received.size:
            raise WireFormatError(
                f"message of rank {rank}: its header announces {header.payload_nbytes} bytes of payload, "
                f"only {received.size - start} bytes are left"
            )
        messages.append(Message(header, received[start:offset]))
    if offset != received.size:
        raise WireFormatError(f"{received.size - offset} bytes follow the last message")
    return messages


def format_by_rank(values: Iterable[tuple[int, object]]) -> str:
    """Say which ranks have which value, in the order of the lowest rank that has it.

    >>> format_by_rank([(0, 7), (1, 8), (2, 7)])
    '7 on ranks 0, 2; 8 on rank 1'
    """
    groups: dict[str, list[int]] = {}
    for rank, value in values:
        groups.setdefault(str(value), []).append(rank)
    return "; ".join(f"{value} on {format_ranks(ranks)}" for value, ranks in groups.items())


def format_ranks(ranks: Sequence[int]) -> str:
    """Name ranks in a sentence: ``rank 3``, or ``ranks 0, 2``."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


_COMPARED: tuple[tuple[str, Callable[[Header], object], str], ...] = (
    ("digest", lambda header: f"{header.digest:#018x}", "the ranks do not run the same configuration"),
    ("round", lambda header: header.round, "some ranks have averaged more often than others"),
    ("step", lambda header: header.step, "some ranks have made more steps than others"),
    ("bucket", lambda header: header.bucket, "the ranks do not send their buckets under the same names"),
    ("num_elements", lambda header: header.num_elements, "the ranks do not cut the model into the same buckets"),
    ("phase", lambda header: header.phase, "the ranks are not in the same phase of the exchange"),
)


def check(headers: Sequence[Header], expected: Header) -> None:
    """Raise DesynchronizedError unless all ``headers`` have the digest, round, step, bucket and phase of ``expected``.

    The text depends on ``headers`` only, which every rank has seen, so it is the same on every rank.
    """
    for field, value_of, meaning in _COMPARED:
        values = [(header.rank, value_of(header)) for header in headers]
        if any(value != value_of(expected) for _, value in values):
            raise DesynchronizedError(
                f"bucket {headers[0].bucket}: the ranks are out of step: {field} is {format_by_rank(values)}; {meaning}"
            )
