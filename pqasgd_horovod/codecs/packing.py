"""Codes to bytes and back: fixed-width bit fields, and five ternary digits to a byte."""

from __future__ import annotations

import numpy as np

from .base import UINT8, UINT32

_POWERS_OF_3 = np.array([1, 3, 9, 27, 81], np.uint32)
_DIGITS_PER_BYTE = 5
LARGEST_TERNARY_BYTE = 242


def packed_nbytes(num_codes: int, bits: int) -> int:
    """Return the bytes that ``num_codes`` fields of ``bits`` bits take."""
    return -(-num_codes * bits // 8)


def pack(codes: UINT32, bits: int) -> UINT8:
    """Pack codes (blocks, n) to bytes (blocks, ceil(n bits / 8)), one after the other from the lowest bit on.

    >>> import numpy as np
    >>> pack(np.array([[1, 2, 7]], np.uint32), 3)  # 0b111_010_001
    array([[209,   1]], dtype=uint8)
    """
    fields = (codes[..., None] >> np.arange(bits, dtype=np.uint32)) & np.uint32(1)
    return np.packbits(fields.astype(np.uint8).reshape(len(codes), -1), axis=-1, bitorder="little")


def unpack(packed: UINT8, bits: int, num_codes: int) -> UINT32:
    """Return the codes (blocks, num_codes) that :func:`pack` packed; bits after the last code are not looked at.

    >>> import numpy as np
    >>> unpack(np.array([[209, 1]], np.uint8), 3, 3)
    array([[1, 2, 7]], dtype=uint32)
    """
    fields = np.unpackbits(packed, axis=-1, count=num_codes * bits, bitorder="little").astype(np.uint32)
    weights = np.uint32(1) << np.arange(bits, dtype=np.uint32)
    codes: UINT32 = (fields.reshape(len(packed), num_codes, bits) * weights).sum(axis=-1, dtype=np.uint32)
    return codes


def ternary_nbytes(num_codes: int) -> int:
    """Return the bytes that ``num_codes`` ternary digits take."""
    return -(-num_codes // _DIGITS_PER_BYTE)


def pack_ternary(codes: UINT32) -> UINT8:
    """Pack digits 0, 1, 2 (blocks, n) to bytes (blocks, L = ceil(n / 5)).

    Byte j is the sum over k of 3^k digit[j + k L]. Digits a distance L apart share a byte, so that neighbours stay
    neighbours: a vector unit needs no shuffle.

    >>> import numpy as np
    >>> pack_ternary(np.array([[1, 2, 0, 1, 2, 2]], np.uint32))  # L = 2: digits 1 0 2 and 2 1 2
    array([[19, 23]], dtype=uint8)
    """
    length = ternary_nbytes(codes.shape[-1])
    padded = np.pad(codes, [(0, 0), (0, _DIGITS_PER_BYTE * length - codes.shape[-1])])
    digits = padded.reshape(len(codes), _DIGITS_PER_BYTE, length)
    packed: UINT8 = (digits * _POWERS_OF_3[:, None]).sum(axis=1).astype(np.uint8)
    return packed


def unpack_ternary(packed: UINT8, num_codes: int) -> UINT32:
    """Return the digits (blocks, num_codes) that :func:`pack_ternary` packed; bytes are at most 242.

    >>> import numpy as np
    >>> unpack_ternary(np.array([[19, 23]], np.uint8), 6)
    array([[1, 2, 0, 1, 2, 2]], dtype=uint32)
    """
    digits = packed[:, None, :].astype(np.uint32) // _POWERS_OF_3[:, None] % np.uint32(3)
    codes: UINT32 = digits.reshape(len(packed), -1)[:, :num_codes]
    return codes
