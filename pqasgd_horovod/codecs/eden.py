r"""``eden``: random rotation, then the best quantizer of the normal law, and a scale that undoes its shrinkage."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .. import keys
from ..errors import ArgumentError
from . import packing
from .base import FLOAT32, UINT8, UINT32, BlockCodec, EncodedBlocks, check_integer, register, sum64
from .lloyd_max import POSITIVE_CENTROIDS
from .uniform import fraction_bits, stochastic_codes

_SMALLEST = np.float32(2.0**-80)  # a block whose rotated numbers have a smaller sum of squares counts as zero
_SMALLEST_PADDED = 64


def hadamard(x: FLOAT32) -> FLOAT32:
    """Return the fast Walsh-Hadamard transform (not normalised) over the last axis, a power of two long.

    Stages with strides 1, 2, 4, ..: (a, b) -> (a + b, a - b), each rounded to float32. Twice it is the length times the
    identity.

    >>> import numpy as np
    >>> hadamard(np.array([1.0, 2.0, 3.0, 4.0], np.float32))
    array([10., -2., -4.,  0.], dtype=float32)
    """
    length = x.shape[-1]
    stride = 1
    while stride < length:
        pairs = x.reshape(*x.shape[:-1], length // (2 * stride), 2, stride)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = np.stack([a + b, a - b], axis=-2).reshape(x.shape)
        stride *= 2
    return x


def flip_signs(x: FLOAT32, negative: NDArray[np.bool_]) -> FLOAT32:
    """Return x with the sign flipped where ``negative``."""
    return np.where(negative, -x, x)


@register
@dataclasses.dataclass(frozen=True)
class Eden(BlockCodec):
    r"""EDEN: random signs D, Walsh-Hadamard transform H, Lloyd-Max centroids of the normal law, and an unbiased scale.

    A coordinate of :math:`z = H D v` is nearly normal with variance :math:`\sigma^2 = \|z\|^2/P`, whatever v is, so
    that one table of centroids, the best for N(0, 1), serves every block. With y the centroids nearest to
    :math:`z/\sigma`,

    .. math:: Q(v) = g \, D H y, \qquad g = \frac{\|z\|^2 / P}{\langle z, y \rangle},

    and :math:`\langle v, Q(v) \rangle = \|v\|^2`: no shrinkage. For uniformly random rotations this is unbiased. For HD
    it nearly is: mean abs v of Gaussian numbers comes out short by 0.34/P at 1 bit, 0.14/P at 2, 0.013/P at 4 bits.
    Where a few coordinates of a block hold nearly all of its norm, z takes few values, and the mean of Q(v) is off, at
    right angles to v, by up to 0.6 of the norm at 1 bit, 0.25 at 2, 0.15 at 3, 0.06 at 4 bits (measured with two and
    three such coordinates). ``rounding="stochastic"`` is exactly unbiased for every v: it rounds z at random to
    :math:`2^b` even levels from -max abs z to max abs z, at a greater error.

    ``bits`` from 1 to 8 for each number and 32 for each block of ``block_size``, a power of two from 64 to 8192; the
    last block is padded to a power of two, at least 64. Larger blocks: fewer bytes, a more normal z, one more pass of
    the transform for each doubling. q is nearly the same for every input: 0.571, 0.133, 0.0357, 0.0096 at 1, 2, 3, 4
    bits.

    Raises ArgumentError for other arguments, NonFiniteError from ``encode`` if the sum of squares of the rotated block
    overflows float32: that is beyond a norm of 1.8e19 / sqrt(P), 5.8e17 for P = 1024. A block with a norm below
    9e-13 / sqrt(P) is sent as zeros.

    Source: Vargaftik, Ben Basat, Portnoy, Mendelson, Ben-Itzhak, Mitzenmacher, "EDEN: communication-efficient and
    robust distributed mean estimation for federated learning", ICML 2022; "DRIVE: one-bit distributed mean estimation",
    NeurIPS 2021.

    >>> import numpy as np
    >>> from pqasgd_horovod import codecs
    >>> codec = codecs.eden(bits=4)
    >>> v = np.sin(np.arange(1024.0)).astype(np.float32)
    >>> decoded = codec.reference_decode(codec.reference_encode(v, key=7), v.size, key=7)
    >>> bool(np.sum((decoded - v) ** 2) / np.sum(v**2) < 0.011)
    True
    """

    id = "eden"

    bits: int = 4
    block_size: int = 1024
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", check_integer("bits", self.bits, 1, 8))
        block_size = check_integer("block_size", self.block_size, 64, 8192)
        if block_size & (block_size - 1):
            raise ArgumentError(f"block_size is {self.block_size!r}; it must be a power of two from 64 to 8192")
        object.__setattr__(self, "block_size", block_size)
        if self.rounding not in ("nearest", "stochastic"):
            raise ArgumentError(f"rounding is {self.rounding!r}; it must be 'nearest' or 'stochastic'")

    @property
    def unbiased(self) -> bool:
        """True for stochastic rounding only."""
        return self.rounding == "stochastic"

    @property
    def contractive(self) -> bool:
        r"""Rounding to the nearest: True from 2 bits on. At 1 bit two equal numbers alone in a block make q = 1.

        Rounding at random: True if :math:`P / (2^b - 1)^2 < 1`, as the error of a coordinate is at most
        :math:`(M / (2^b - 1))^2`.
        """
        if self.rounding == "stochastic":
            return self.block_size < ((1 << self.bits) - 1) ** 2
        return self.bits >= 2

    @property
    def native_flags(self) -> int:
        """The way of rounding."""
        from .. import native

        return native.FLAG_STOCHASTIC if self.rounding == "stochastic" else 0

    def padded(self, elements: int) -> int:
        """P: the length to which a block of ``elements`` numbers is padded."""
        return max(_SMALLEST_PADDED, 1 << (elements - 1).bit_length())

    def code_nbytes(self, elements: int) -> int:
        """``bits`` for each number of the padded block."""
        return packing.packed_nbytes(self.padded(elements), self.bits)

    def encode_blocks(self, values: FLOAT32, key: int, index: UINT32) -> EncodedBlocks:
        """Rotate each block, and quantize what comes out."""
        length = self.padded(values.shape[-1])
        v = np.pad(values, [(0, 0), (0, length - values.shape[-1])])
        z = hadamard(flip_signs(v, keys.random_signs(key, index, length)))
        n2 = sum64(z * z)
        if not np.isfinite(n2).all():
            return EncodedBlocks(np.empty((len(values), 0), np.uint8), n2, in_range=False)
        is_zero = n2 < _SMALLEST
        z[is_zero] = 1  # any number will do, as long as nothing is divided by zero
        if self.rounding == "stochastic":
            codes, scales = self._round_stochastic(z, key, index)
        else:
            codes, scales = self._round_nearest(z, np.where(is_zero, np.float32(length), n2))
        codes[is_zero] = 0
        return EncodedBlocks(packing.pack(codes, self.bits), np.where(is_zero, np.float32(0), scales))

    def _round_nearest(self, z: FLOAT32, n2: FLOAT32) -> tuple[UINT32, FLOAT32]:
        centroids = self._centroids()
        variance = n2 / np.float32(z.shape[-1])
        sigma = np.sqrt(variance)
        magnitude = np.abs(z)
        number = np.zeros(z.shape, np.uint32)
        for threshold in (centroids[:-1] + centroids[1:]) * np.float32(0.5):
            number += magnitude >= (threshold * sigma)[:, None]
        scales = variance / sum64(magnitude * centroids[number])
        return number | np.signbit(z).astype(np.uint32) << np.uint32(self.bits - 1), scales

    def _round_stochastic(self, z: FLOAT32, key: int, index: UINT32) -> tuple[UINT32, FLOAT32]:
        intervals = (1 << self.bits) - 1
        fraction = fraction_bits(self.bits)
        half_range = intervals << (fraction - 1)
        largest = np.abs(z).max(axis=-1)
        inverse = np.float32(half_range) / largest
        codes = stochastic_codes(z * inverse[:, None], key, index, half_range, fraction)
        return codes, largest / np.float32(intervals * z.shape[-1])

    def _centroids(self) -> FLOAT32:
        return np.array(POSITIVE_CENTROIDS[self.bits - 1], np.float32)

    def decode_blocks(
        self, scales: FLOAT32 | None, codes: UINT8, elements: int, key: int, index: UINT32
    ) -> tuple[FLOAT32, FLOAT32]:
        """Centroids, or levels, rotated back; the step is the scale."""
        assert scales is not None
        length = self.padded(elements)
        unpacked = packing.unpack(codes, self.bits, length)
        if self.rounding == "stochastic":
            y = (2 * unpacked.astype(np.int32) - ((1 << self.bits) - 1)).astype(np.float32)
        else:
            half = 1 << (self.bits - 1)
            y = flip_signs(self._centroids()[unpacked & np.uint32(half - 1)], unpacked >= half)
        return flip_signs(hadamard(y), keys.random_signs(key, index, length))[:, :elements], scales
