r"""One bit for each number, 1 where it is below zero: ``onebit``.

Biased: what the signs leave out does not average out over ranks or steps. Train with error feedback.
"""

from __future__ import annotations

import abc
import dataclasses

import numpy as np
from numpy.typing import NDArray

from . import packing
from .base import FLOAT32, UINT8, UINT32, Codec, EncodedBlocks, register, sum64
from .uniform import check_block_size

_BLOCK_SIZE = 1024


@dataclasses.dataclass(frozen=True)
class Sign(Codec):
    """Base of the sign codecs: the bits, and what they stand for; zero, -0.0 too, has the sign +."""

    bits = 1
    unbiased = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_size", check_block_size(self.block_size))

    @abc.abstractmethod
    def scales(self, values: FLOAT32, negative: NDArray[np.bool_]) -> tuple[FLOAT32 | None, bool]:
        """Return the scales of ``values`` (blocks, elements), and whether all of them are finite."""

    @abc.abstractmethod
    def levels(self, scales: FLOAT32 | None, num_blocks: int) -> tuple[FLOAT32, FLOAT32]:
        """Return the number (blocks,) that bit 0 stands for, and that of bit 1, without their signs."""

    def code_nbytes(self, elements: int) -> int:
        """Eight numbers to a byte."""
        return packing.packed_nbytes(elements, 1)

    def encode_blocks(self, values: FLOAT32, key: int, index: UINT32) -> EncodedBlocks:
        """Take the signs; the key is not used."""
        negative = values < 0
        scales, in_range = self.scales(values, negative)
        return EncodedBlocks(packing.pack(negative.astype(np.uint32), 1), scales, in_range)

    def decode_blocks(
        self, scales: FLOAT32 | None, codes: UINT8, elements: int, key: int, index: UINT32
    ) -> tuple[FLOAT32, FLOAT32]:
        """One of two numbers; the step is 1."""
        above, below = self.levels(scales, len(codes))
        negative = packing.unpack(codes, 1, elements).astype(np.bool_)
        return np.where(negative, -below[:, None], above[:, None]), np.ones(len(codes), np.float32)


def mean_of(values: FLOAT32, count: NDArray[np.integer]) -> FLOAT32:
    """Return the sum of each block over ``count`` (blocks,), and 0 where that is 0; both float32."""
    mean: FLOAT32 = sum64(values) / np.maximum(count, 1).astype(np.float32)
    return mean


@register
@dataclasses.dataclass(frozen=True)
class OneBit(Sign):
    r"""1-bit SGD: a number becomes the mean of those in its block that have its sign.

    .. math:: Q(v)_k = \begin{cases} \operatorname{mean}\{v_j : v_j \ge 0\} & v_k \ge 0 \\
              \operatorname{mean}\{v_j : v_j < 0\} & v_k < 0 \end{cases}

    The best that two numbers can do for this division of the block. Biased: a contraction with :math:`\delta \ge 1/d`
    for blocks of d numbers, meant for error feedback. One bit for each number and 64 for each block of ``block_size``,
    a multiple of 64 from 64 to 8192. Gaussian numbers: q = 0.36.

    Raises ArgumentError for another ``block_size``, NonFiniteError from ``encode`` if the numbers of one sign in a
    block sum up to more than float32 holds.

    Source: Seide, Fu, Droppo, Li, Yu, "1-bit stochastic gradient descent and its application to data-parallel
    distributed training of speech DNNs", Interspeech 2014.

    >>> import numpy as np
    >>> from pqasgd_horovod import codecs
    >>> codec = codecs.onebit()
    >>> v = np.array([3.0, 0.0, -2.0, 1.5], np.float32)
    >>> codec.reference_decode(codec.reference_encode(v), 4)
    array([ 1.5,  1.5, -2. ,  1.5], dtype=float32)
    """

    id = "onebit"
    scales_per_block = 2
    contractive = True

    block_size: int = _BLOCK_SIZE

    def scales(self, values: FLOAT32, negative: NDArray[np.bool_]) -> tuple[FLOAT32 | None, bool]:
        """Mean magnitude of the numbers at and above zero, then of those below."""
        scales = np.stack(
            [
                mean_of(np.where(negative, np.float32(0), values), (~negative).sum(axis=-1)),
                mean_of(np.where(negative, -values, np.float32(0)), negative.sum(axis=-1)),
            ],
            axis=-1,
        )
        return scales, bool(np.isfinite(scales).all())

    def levels(self, scales: FLOAT32 | None, num_blocks: int) -> tuple[FLOAT32, FLOAT32]:
        """The two scales."""
        assert scales is not None
        return scales[:, 0], scales[:, 1]
