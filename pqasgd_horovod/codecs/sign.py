r"""One bit for each number, 1 where it is below zero: ``signsgd``, ``onebit``.

Biased: what the signs leave out does not average out over ranks or steps. Train with error feedback.
"""

from __future__ import annotations

import abc
import dataclasses

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from . import packing
from .base import FLOAT32, UINT8, UINT32, BlockCodec, EncodedBlocks, check_flag, register, sum64
from .uniform import check_block_size

_BLOCK_SIZE = 1024


@dataclasses.dataclass(frozen=True)
class Sign(BlockCodec):
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
class SignSgd(Sign):
    r"""The sign of each number, times the mean magnitude of its block; or the signs alone.

    .. math:: Q(v)_k = \frac{\|v\|_1}{d} \operatorname{sign}(v_k), \qquad
              \|Q(v) - v\|^2 = \|v\|^2 - \|v\|_1^2 / d

    for blocks of d numbers; sign(0) = 1. ``scaled=False`` leaves the factor out: what is decoded is +-1, for gradients
    only, with a learning rate that fits. Then take ``small_tensor_threshold=0``, or small tensors move by their mean
    and all others by 1. Gaussian numbers: q = 0.36.

    One bit for each number, and 32 for each block of ``block_size``, a multiple of 64 from 64 to 8192, if it is scaled.
    With a scale it is a contraction with :math:`\delta \ge 1/d`, meant for error feedback (EF-signSGD).

    ``majority_vote=True`` is signSGD with majority vote: signs go to the owner of a shard, who counts them, its own
    too, and sends the sign of their sum to all, which is what is decoded; a tie is +. It makes ``scaled`` False and the
    exchange the two-phase one. With ``scaled=False`` alone the mean of the signs is what every rank gets. A rank that
    trains alone codes nothing.

    Raises ArgumentError for other arguments, NonFiniteError from ``encode`` if the magnitudes in a block sum up to more
    than float32 holds.

    Source: Bernstein, Wang, Azizzadenesheli, Anandkumar, "signSGD: compressed optimisation for non-convex problems",
    ICML 2018; Bernstein, Zhao, Azizzadenesheli, Anandkumar, "signSGD with majority vote is communication efficient and
    fault tolerant", ICLR 2019; Karimireddy, Rebjock, Stich, Jaggi, "Error feedback fixes SignSGD and other gradient
    compression schemes", ICML 2019.

    >>> import numpy as np
    >>> from pqasgd_horovod import codecs
    >>> v = np.array([3.0, 0.0, -2.0, 1.0], np.float32)
    >>> for codec in (codecs.signsgd(), codecs.signsgd(majority_vote=True)):
    ...     codec.reference_decode(codec.reference_encode(v), 4)
    array([ 1.5,  1.5, -1.5,  1.5], dtype=float32)
    array([ 1.,  1., -1.,  1.], dtype=float32)
    """

    id = "signsgd"

    block_size: int = _BLOCK_SIZE
    scaled: bool | None = None  # None: unless votes are counted
    majority_vote: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("majority_vote", self.majority_vote)
        if self.scaled is None:
            object.__setattr__(self, "scaled", not self.majority_vote)
        check_flag("scaled", self.scaled)
        if self.scaled and self.majority_vote:
            raise ArgumentError("scaled is True with majority_vote=True; votes have no scale: leave scaled out")

    @property
    def scales_per_block(self) -> int:
        """One if it is scaled."""
        return 1 if self.scaled else 0

    @property
    def contractive(self) -> bool:
        """True with a scale."""
        return bool(self.scaled)

    @property
    def keeps_scale(self) -> bool:
        """True with a scale."""
        return bool(self.scaled)

    @property
    def exchange_method(self) -> str | None:
        """Two-phase for votes; allgather for the mean of signs, which phase two would make a vote of."""
        if self.scaled:
            return None
        return "two_phase" if self.majority_vote else "allgather"

    @property
    def exchange_reason(self) -> str:
        """What phase two makes of signs."""
        if self.majority_vote:
            return "the owner of a shard counts the votes, and sends the result as a vote"
        return "it cannot code the mean of what it decodes to, except as a vote (majority_vote=True)"

    @property
    def native_flags(self) -> int:
        """Whether there is no scale."""
        from .. import native

        return 0 if self.scaled else native.FLAG_UNSCALED

    def own_part(self, values: FLOAT32, shared_key: int = 0) -> FLOAT32:
        """The signs, unless it is scaled; NaN for what is not finite."""
        if self.scaled:
            return values
        with np.errstate(invalid="ignore"):
            signs: FLOAT32 = np.where(values < 0, np.float32(-1), np.float32(1)) + (values - values)
        return signs

    def scales(self, values: FLOAT32, negative: NDArray[np.bool_]) -> tuple[FLOAT32 | None, bool]:
        """The mean magnitude."""
        if not self.scaled:
            return None, True
        means = mean_of(np.abs(values), np.full(len(values), values.shape[-1]))
        return means, bool(np.isfinite(means).all())

    def levels(self, scales: FLOAT32 | None, num_blocks: int) -> tuple[FLOAT32, FLOAT32]:
        """The scale, or 1, for both signs."""
        both = np.ones(num_blocks, np.float32) if scales is None else scales
        return both, both


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
