r"""``natural``: stochastic rounding to powers of two, a sign and an exponent for each number."""

from __future__ import annotations

import dataclasses

import numpy as np

from .. import keys
from ..errors import WireFormatError
from . import packing
from .base import FLOAT32, UINT8, UINT32, BlockCodec, EncodedBlocks, register

_BLOCK_SIZE = 1024  # nothing is shared inside a block; it only says how the work is cut
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_LARGEST = np.uint32(0x7F000000)  # 2^127: what is larger could round up to infinity
_INFINITE = 255


@register
@dataclasses.dataclass(frozen=True)
class Natural(BlockCodec):
    r"""Natural compression: each number becomes one of the two powers of two around it, at random.

    .. math:: Q(v)_k = \operatorname{sign}(v_k) \, 2^{e + B}, \qquad |v_k| = 2^e (1 + f), \quad
              B \sim \mathrm{Bernoulli}(f).

    Unbiased, and :math:`q \le 1/8` whatever v is: a relative error, so that there are no scales. 9 bits: a sign and the
    8-bit exponent of float32. The probability is f rounded to 16 bits, so that the mean is right to 2^-17 of the
    number. Below 2^-126, where float32 has no smaller exponent, numbers become 0 or 2^-126: unbiased too, to 2^-17 of
    2^-126, but with an error that is not relative. Gaussian numbers: q = 0.08.

    Raises NonFiniteError from ``encode`` also for numbers beyond 2^127, 1.7e38: they could round up to infinity.

    Source: Horvath, Ho, Horvath, Sahu, Canini, Richtarik, "Natural compression for distributed deep learning", 2019.

    >>> import numpy as np
    >>> from pqasgd_horovod import codecs
    >>> codec = codecs.natural()
    >>> v = np.array([5.0, -0.25], np.float32)
    >>> sorted({tuple(codec.reference_decode(codec.reference_encode(v, key), 2).tolist()) for key in range(20)})
    [(4.0, -0.25), (8.0, -0.25)]
    """

    id = "natural"
    bits = 9
    block_size = _BLOCK_SIZE
    scales_per_block = 0
    unbiased = True
    contractive = True

    def code_nbytes(self, elements: int) -> int:
        """The signs, eight to a byte, then a byte for each exponent."""
        return packing.packed_nbytes(elements, 1) + elements

    def encode_blocks(self, values: FLOAT32, key: int, index: UINT32) -> EncodedBlocks:
        """Take the bits of a number as one fixed-point number, exponent before the point; round that at random."""
        words = np.ascontiguousarray(values).view(np.uint32)
        magnitudes = words & _MAGNITUDE
        if (magnitudes > _LARGEST).any():
            return EncodedBlocks(np.empty((len(values), 0), np.uint8), in_range=False)
        fixed = (magnitudes + np.uint32(1 << 6)) >> np.uint32(7)  # 16 bits after the point
        exponents = (fixed + keys.uniform16(key, index, values.shape[-1])) >> np.uint32(16)
        signs = packing.pack(words >> np.uint32(31), 1)
        return EncodedBlocks(np.concatenate([signs, exponents.astype(np.uint8)], axis=-1))

    def decode_blocks(
        self, scales: FLOAT32 | None, codes: UINT8, elements: int, key: int, index: UINT32
    ) -> tuple[FLOAT32, FLOAT32]:
        """Powers of two; exponent 0 is the number 0, and the step is 1."""
        signs, exponents = np.split(codes, [packing.packed_nbytes(elements, 1)], axis=-1)
        if (exponents == _INFINITE).any():
            raise WireFormatError(f"payload of {self}: an exponent is {_INFINITE}, which stands for no number")
        words = exponents.astype(np.uint32) << np.uint32(23) | packing.unpack(signs, 1, elements) << np.uint32(31)
        return words.view(np.float32), np.ones(len(codes), np.float32)
