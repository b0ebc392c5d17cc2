r"""Uniform levels with stochastic rounding: ``maxscale``, ``qsgd``, ``terngrad``.

All three send one scale S for each block and round :math:`s v / S` to one of the neighbouring integers, up with a
probability equal to the fraction, so that the mean over all keys is v:

.. math:: Q(v)_k = \frac{S}{s} \lfloor s v_k / S + u_k \rfloor, \qquad u_k \sim U[0, 1).
"""

from __future__ import annotations

import abc
import dataclasses

import numpy as np

from .. import keys
from ..errors import ArgumentError, WireFormatError
from . import packing
from .base import FLOAT32, UINT8, UINT32, BlockCodec, EncodedBlocks, check_integer, register, sum64

_BLOCK_SIZE = 512
_LARGEST = np.float32(2.0**127)  # s times the step, rounded, could exceed float32 for a larger maximum
_SMALLEST = np.float32(2.0**-100)  # a smaller maximum, or sum of squares, counts as zero


def check_block_size(block_size: int) -> int:
    """Return ``block_size`` as an int, or raise ArgumentError unless it is a multiple of 64 from 64 to 8192."""
    number = check_integer("block_size", block_size, 64, 8192)
    if number % 64:
        raise ArgumentError(f"block_size is {block_size!r}; it must be a multiple of 64 from 64 to 8192")
    return number


def stochastic_codes(scaled: FLOAT32, key: int, index: UINT32, offset: int, fraction_bits: int) -> UINT32:
    """Return floor(scaled / 2^F + offset / 2^F + u) in fixed point with F = ``fraction_bits``; u is uniform in [0, 1).

    ``scaled`` (blocks, elements) is rounded to integers t first; E[code] = (t + offset) / 2^F exactly.
    """
    t = np.rint(scaled).astype(np.int64)
    uniform = keys.uniform16(key, index, scaled.shape[-1]) >> np.uint32(16 - fraction_bits)
    codes: UINT32 = ((t + uniform.astype(np.int64) + offset) >> fraction_bits).astype(np.uint32)
    return codes


def fraction_bits(bits: int) -> int:
    """Bits after the point in stochastic rounding: as many as float32 resolves at the outermost level."""
    return 15 if bits == 8 else 16


@dataclasses.dataclass(frozen=True)
class Uniform(BlockCodec):
    """Base of the uniform codecs: 2 s + 1 levels, evenly spaced from -S to S; the code of all ones is not used."""

    unbiased = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", check_integer("bits", self.bits, 2, 8))
        object.__setattr__(self, "block_size", check_block_size(self.block_size))

    @property
    def num_steps(self) -> int:
        """s: the number of levels above zero."""
        return (1 << (self.bits - 1)) - 1

    @property
    def contractive(self) -> bool:
        r"""True if :math:`d / 4s^2 < 1`, d = ``block_size``: the error of a number is at most :math:`(M/2s)^2`."""
        return self.block_size < 4 * self.num_steps**2

    @abc.abstractmethod
    def scales(self, values: FLOAT32) -> tuple[FLOAT32, FLOAT32]:
        """Return the scale S (blocks,) of ``values`` (blocks, elements), and the number that is compared to 2^-100."""

    def code_nbytes(self, elements: int) -> int:
        """``bits`` for each number, up to a whole byte."""
        return packing.packed_nbytes(elements, self.bits)

    def pack(self, codes: UINT32) -> UINT8:
        """Codes (blocks, elements), each from 0 to 2 s, to bytes (blocks, code_nbytes)."""
        return packing.pack(codes, self.bits)

    def unpack(self, packed: UINT8, elements: int) -> UINT32:
        """The inverse of :meth:`pack`; raises WireFormatError for what it does not write."""
        codes = packing.unpack(packed, self.bits, elements)
        if (codes > 2 * self.num_steps).any():
            raise WireFormatError(f"payload of {self}: a code is above the largest, {2 * self.num_steps}")
        return codes

    def encode_blocks(self, values: FLOAT32, key: int, index: UINT32) -> EncodedBlocks:
        """Scale each block to integers with a fraction, and round them at random."""
        scales, size = self.scales(values)
        if not (scales <= _LARGEST).all():
            return EncodedBlocks(np.empty((len(values), 0), np.uint8), scales, in_range=False)
        is_zero = size < _SMALLEST
        fraction = fraction_bits(self.bits)
        one = 1 << fraction
        limit = np.float32(self.num_steps * one)
        inverse = limit / np.where(is_zero, np.float32(1), scales)
        scaled: FLOAT32 = values * inverse[:, None]
        np.clip(
            scaled, -limit, limit, out=scaled
        )  # qsgd: rounding can leave the norm below the one number that makes it up
        scaled[is_zero] = 0
        codes = stochastic_codes(scaled, key, index, self.num_steps * one, fraction)
        return EncodedBlocks(self.pack(codes), np.where(is_zero, np.float32(0), scales))

    def decode_blocks(
        self, scales: FLOAT32 | None, codes: UINT8, elements: int, key: int, index: UINT32
    ) -> tuple[FLOAT32, FLOAT32]:
        """Levels from -s to s, and the distance between them."""
        assert scales is not None
        levels = self.unpack(codes, elements).astype(np.int32) - self.num_steps
        return levels.astype(np.float32), scales / np.float32(self.num_steps)


def largest_magnitude(values: FLOAT32) -> tuple[FLOAT32, FLOAT32]:
    """Return max |v| of each block, twice: as the scale and as its size."""
    largest = np.abs(values).max(axis=-1)
    return largest, largest


@register
@dataclasses.dataclass(frozen=True)
class MaxScale(Uniform):
    r"""Stochastic rounding to :math:`2^b - 1` even levels between -M and M, M = max abs v of the block.

    .. math:: Q(v)_k = \frac{M}{s} \lfloor s v_k / M + u_k \rfloor, \qquad s = 2^{b-1} - 1.

    Unbiased. ``bits`` from 2 to 8 for each number and 32 for each block of ``block_size``, a multiple of 64 from 64 to
    8192. Smaller blocks: smaller error, more bytes. Gaussian numbers in blocks of 512: q = 1.6, 0.20, 0.037 at 2, 3, 4
    bits, 1.1e-4 at 8.

    Raises ArgumentError for other ``bits`` or ``block_size``, NonFiniteError from ``encode`` for a number beyond 2^127,
    1.7e38, whose decoded value could round to infinity.

    Source: the quantizer of Alistarh et al., "QSGD", NeurIPS 2017, with the maximum norm in place of the 2-norm.

    >>> import numpy as np
    >>> from pqasgd_horovod import codecs
    >>> codec = codecs.maxscale(bits=4)
    >>> v = np.array([7.0, -3.0, 0.5], np.float32)
    >>> sorted({float(codec.reference_decode(codec.reference_encode(v, key), 3, key)[2]) for key in range(20)})
    [0.0, 1.0]
    """

    id = "maxscale"

    bits: int = 4
    block_size: int = _BLOCK_SIZE

    def scales(self, values: FLOAT32) -> tuple[FLOAT32, FLOAT32]:
        """The largest magnitude."""
        return largest_magnitude(values)


@register
@dataclasses.dataclass(frozen=True)
class Qsgd(Uniform):
    r"""QSGD: stochastic rounding to :math:`2^b - 1` even levels between -L and L, L = :math:`\|v\|_2` of the block.

    .. math:: Q_s(v)_k = \frac{\|v\|_2}{s} \operatorname{sign}(v_k) (l + \mathrm{Bernoulli}(a - l)),
              \quad a = s |v_k| / \|v\|_2, \; l = \lfloor a \rfloor.

    Unbiased, :math:`q \le \min(d/s^2, \sqrt d/s)` for blocks of d numbers, s = 2^(b-1) - 1. ``bits`` and ``block_size``
    as in :class:`MaxScale`, which has a smaller error at the same size; this one is here because the literature's
    bounds are about it. Gaussian numbers in blocks of 512: q = 17, 5.0, 1.6 at 2, 3, 4 bits, 0.005 at 8.

    Raises ArgumentError for other ``bits`` or ``block_size``, NonFiniteError from ``encode`` if the sum of squares of a
    block overflows float32, beyond a norm of 1.8e19.

    Source: Alistarh, Grubic, Li, Tomioka, Vojnovic, "QSGD: communication-efficient SGD via gradient quantization and
    encoding", NeurIPS 2017.

    >>> import numpy as np
    >>> from pqasgd_horovod import codecs
    >>> codec = codecs.qsgd(bits=2)
    >>> v = np.array([3.0, 4.0], np.float32)
    >>> sorted({float(codec.reference_decode(codec.reference_encode(v, key), 2, key)[1]) for key in range(20)})
    [0.0, 5.0]
    """

    id = "qsgd"

    bits: int = 4
    block_size: int = _BLOCK_SIZE

    @property
    def contractive(self) -> bool:
        r"""True if the bound :math:`\min(d/4s^2, \sqrt d/s)` on q is below 1, d = ``block_size``."""
        return super().contractive or self.block_size < self.num_steps**2

    def scales(self, values: FLOAT32) -> tuple[FLOAT32, FLOAT32]:
        """The 2-norm; its square is what may be too small."""
        squares = sum64(values * values)
        return np.sqrt(squares), squares


@register
@dataclasses.dataclass(frozen=True)
class TernGrad(Uniform):
    r"""TernGrad: each number becomes -M, 0 or M, M = max abs v of the block; five to a byte, 1.6 bits each.

    .. math:: Q(v)_k = M \operatorname{sign}(v_k) \, \mathrm{Bernoulli}(|v_k| / M).

    Unbiased. 32 bits more for each block of ``block_size``, a multiple of 64 from 64 to 8192. Gaussian numbers in
    blocks of 512: q = 1.6. The numbers are those of ``maxscale(bits=2)``, in four fifths of the bytes.

    Raises ArgumentError for another ``block_size``, NonFiniteError from ``encode`` for a number beyond 2^127.

    Source: Wen et al., "TernGrad: ternary gradients to reduce communication in distributed deep learning", NeurIPS
    2017.

    >>> import numpy as np
    >>> from pqasgd_horovod import codecs
    >>> codec = codecs.terngrad()
    >>> codec.reference_decode(codec.reference_encode(np.array([2.0, -2.0, 0.0], np.float32)), 3)
    array([ 2., -2.,  0.], dtype=float32)
    >>> round(codec.payload_bits_per_element(1 << 20), 3)
    1.672
    """

    id = "terngrad"
    bits = 2

    block_size: int = _BLOCK_SIZE

    def scales(self, values: FLOAT32) -> tuple[FLOAT32, FLOAT32]:
        """The largest magnitude."""
        return largest_magnitude(values)

    def code_nbytes(self, elements: int) -> int:
        """Five numbers to a byte."""
        return packing.ternary_nbytes(elements)

    def pack(self, codes: UINT32) -> UINT8:
        """Five codes to a byte."""
        return packing.pack_ternary(codes)

    def unpack(self, packed: UINT8, elements: int) -> UINT32:
        """The inverse of :meth:`pack`; raises WireFormatError for a byte that is not five ternary digits."""
        if (packed > packing.LARGEST_TERNARY_BYTE).any():
            raise WireFormatError(
                f"payload of {self}: a byte is {packed.max()}; the largest is {packing.LARGEST_TERNARY_BYTE}"
            )
        return packing.unpack_ternary(packed, elements)
