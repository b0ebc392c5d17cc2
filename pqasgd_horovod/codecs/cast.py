"""Numbers rounded to a shorter format, one by one: ``none`` (float32), ``fp16``, ``bf16``."""

from __future__ import annotations

import abc
import dataclasses

import numpy as np
from numpy.typing import NDArray

from .base import FLOAT32, UINT8, UINT32, BlockCodec, EncodedBlocks, register

_BLOCK_SIZE = 1024  # nothing is shared inside a block; it only says how the work is cut


@dataclasses.dataclass(frozen=True)
class Cast(BlockCodec):
    """Base of the casts: a short format for each number, no scale, no random numbers.

    Numbers are rounded to the nearest, ties to even. Decoding adds to zero, so that -0.0 comes back as 0.0.
    """

    scales_per_block = 0
    block_size = _BLOCK_SIZE
    unbiased = False
    contractive = True

    @abc.abstractmethod
    def narrow(self, values: FLOAT32) -> tuple[NDArray[np.generic], bool]:
        """Return the numbers in the short format, little-endian, and whether none of them overflowed."""

    @abc.abstractmethod
    def widen(self, codes: UINT8) -> FLOAT32:
        """Return the float32 numbers of code bytes (blocks, code_nbytes)."""

    def code_nbytes(self, elements: int) -> int:
        """Whole bytes for each number."""
        return elements * self.bits // 8

    def encode_blocks(self, values: FLOAT32, key: int, index: UINT32) -> EncodedBlocks:
        """Round each number; the key is not used."""
        codes, in_range = self.narrow(values)
        return EncodedBlocks(np.ascontiguousarray(codes).view(np.uint8), None, in_range)

    def decode_blocks(
        self, scales: FLOAT32 | None, codes: UINT8, elements: int, key: int, index: UINT32
    ) -> tuple[FLOAT32, FLOAT32]:
        """Widen each number; the step is 1."""
        return self.widen(codes), np.ones(len(codes), np.float32)


@register
@dataclasses.dataclass(frozen=True)
class NoCompression(Cast):
    """Send float32 numbers as they are: 32 bits each, q = 0.

    Raises NonFiniteError from ``encode`` for NaN, Inf and float64 numbers beyond float32.

    >>> import numpy as np
    >>> from pqasgd_horovod import codecs
    >>> codec = codecs.none()
    >>> codec.reference_decode(codec.reference_encode(np.array([0.1, -2.5], np.float32)), 2)
    array([ 0.1, -2.5], dtype=float32)
    """

    id = "none"
    bits = 32
    commutes_with_sum = True
    lossless = True
    unbiased = True

    def narrow(self, values: FLOAT32) -> tuple[NDArray[np.generic], bool]:
        """Nothing is rounded."""
        return values.astype("<f4"), True

    def widen(self, codes: UINT8) -> FLOAT32:
        """The bytes are the numbers."""
        return codes.view("<f4").astype(np.float32)


@register
@dataclasses.dataclass(frozen=True)
class Fp16(Cast):
    """Round to IEEE half precision: 16 bits, relative error at most 2^-11 from 6.1e-5 to 65504, q about 4e-8.

    Raises NonFiniteError from ``encode`` also for numbers that round beyond 65504: scale the loss, or take ``bf16``.
    A sum of halves is a half, so this one works inside a stock allreduce too.

    Source: IEEE 754-2008, binary16.

    >>> import numpy as np
    >>> from pqasgd_horovod import codecs
    >>> codec = codecs.fp16()
    >>> codec.reference_decode(codec.reference_encode(np.array([0.1], np.float32)), 1)
    array([0.09997559], dtype=float32)
    """

    id = "fp16"
    bits = 16
    commutes_with_sum = True

    def narrow(self, values: FLOAT32) -> tuple[NDArray[np.generic], bool]:
        """Round to half precision; beyond 65504 that is Inf."""
        halves = values.astype("<f2")
        return halves, bool(np.isfinite(halves).all())

    def widen(self, codes: UINT8) -> FLOAT32:
        """Every half is a float32."""
        return codes.view("<f2").astype(np.float32)


@register
@dataclasses.dataclass(frozen=True)
class Bf16(Cast):
    """Round to bfloat16, the upper half of a float32: 16 bits, relative error at most 2^-8 at any magnitude.

    q is about 3e-6.

    Raises NonFiniteError from ``encode`` also for the few float32 numbers that round beyond the largest bfloat16,
    3.39e38. Horovod's allreduce adds no bfloat16, so this one does not commute with its sum.

    >>> import numpy as np
    >>> from pqasgd_horovod import codecs
    >>> codec = codecs.bf16()
    >>> codec.reference_decode(codec.reference_encode(np.array([0.1, 1e38], np.float32)), 2)
    array([1.00097656e-01, 9.96920997e+37], dtype=float32)
    """

    id = "bf16"
    bits = 16

    def narrow(self, values: FLOAT32) -> tuple[NDArray[np.generic], bool]:
        """Keep the upper half; adding 0x7fff, and 1 more if it is odd, rounds it to nearest with ties to even."""
        words = values.view(np.uint32)
        odd = (words >> np.uint32(16)) & np.uint32(1)
        rounded = (words + np.uint32(0x7FFF) + odd) >> np.uint32(16)
        exponent_all_ones = (rounded & np.uint32(0x7F80)) == 0x7F80
        return rounded.astype("<u2"), not bool(exponent_all_ones.any())

    def widen(self, codes: UINT8) -> FLOAT32:
        """The lower half is zero."""
        words: UINT32 = codes.view("<u2").astype(np.uint32) << np.uint32(16)
        return words.view(np.float32)
