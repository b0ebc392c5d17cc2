"""Where the numbers are that a sparse codec keeps, in the fewest bits: a bitmap, or Elias-Fano."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import WireFormatError
from .base import UINT8

INT64 = NDArray[np.int64]
_LOW_BITS = range(1, 14)


def low_bits(elements: int, kept: int) -> int:
    """Return how many bits of each position Elias-Fano writes as they are; 0 if a bitmap takes no more.

    With l of them ``kept`` positions below ``elements`` take ``kept l + kept + floor((elements - 1) / 2^l)`` bits.

    >>> low_bits(8192, 82), low_bits(8192, 2000)
    (6, 2)
    >>> low_bits(8192, 4096)
    0
    """
    costs = {low: kept * (low + 1) + ((elements - 1) >> low) for low in _LOW_BITS}
    best = min(_LOW_BITS, key=lambda low: costs[low])
    return best if costs[best] < elements else 0


def positions_nbytes(elements: int, kept: int) -> int:
    """Return the bytes that ``kept`` positions below ``elements`` take.

    >>> positions_nbytes(8192, 82)  # 8.6 bits each; 13 bits would be 134 bytes
    88
    """
    low = low_bits(elements, kept)
    bits = kept * (low + 1) + ((elements - 1) >> low) if low else elements
    return -(-bits // 8)


def pack_positions(positions: INT64, elements: int) -> UINT8:
    """Pack positions (blocks, kept), rising and below ``elements``, to bytes (blocks, positions_nbytes).

    A bitmap has ones at the positions. Elias-Fano writes the l low bits of each position, one after the other; then a
    bit field with a one at ``(position >> l) + i`` for the i-th. Bits count from the lowest of the first byte.

    >>> import numpy as np
    >>> pack_positions(np.array([[0, 5, 15]]), 16)  # 00 01 11 are the low bits, 0 1 3 the high ones
    array([[116,   9]], dtype=uint8)
    """
    blocks, kept = positions.shape
    low = low_bits(elements, kept)
    fields = np.zeros((blocks, 8 * positions_nbytes(elements, kept)), np.uint8)
    rows = np.arange(blocks)[:, None]
    if low:
        fields[:, : kept * low] = ((positions[..., None] >> np.arange(low)) & 1).reshape(blocks, -1)
    fields[rows, kept * low + (positions >> low) + (np.arange(kept) if low else 0)] = 1
    return np.packbits(fields, axis=-1, bitorder="little")


def unpack_positions(packed: UINT8, elements: int, kept: int) -> INT64:
    """Return the positions (blocks, kept) that :func:`pack_positions` packed.

    Raises WireFormatError for what it does not write: another number of ones, positions that do not rise, or one that
    is ``elements`` or more.

    >>> import numpy as np
    >>> unpack_positions(np.array([[116, 9]], np.uint8), 16, 3)
    array([[ 0,  5, 15]])
    """
    blocks = len(packed)
    low = low_bits(elements, kept)
    fields = np.unpackbits(packed, axis=-1, bitorder="little")
    ones = fields[:, kept * low :]
    counts = ones.sum(axis=-1, dtype=np.int64)
    if (counts != kept).any():
        raise WireFormatError(f"the positions of a block have {int(counts[counts != kept][0])} ones; {kept} are kept")
    positions = np.nonzero(ones)[1].reshape(blocks, kept)
    if low:
        lowest = fields[:, : kept * low].reshape(blocks, kept, low).astype(np.int64)
        positions = (positions - np.arange(kept) << low) + (lowest << np.arange(low)).sum(axis=-1)
    if (np.diff(positions, axis=-1) <= 0).any() or (positions >= elements).any():
        raise WireFormatError(f"the positions of a block do not rise, or are not below {elements}")
    return positions
