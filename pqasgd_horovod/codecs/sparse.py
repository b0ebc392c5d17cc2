r"""Some numbers of each block, and nothing of the others: ``topk``, ``threshold``, ``randomk``.

A vector is cut into blocks; of a block of n numbers :math:`k = \max(1, \lfloor density \cdot n + 1/2 \rfloor)` are
kept. The numbers that are kept of all blocks are one vector, which another codec codes, ``values``: first what to send,
then in how many bits.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import keys as random
from ..errors import ArgumentError
from ..keys import Keys
from .base import FLOAT32, UINT8, UINT32, BlockCodec, Codec, check_count, check_flag, is_number, register
from .cast import NoCompression
from .positions import INT64, pack_positions, positions_nbytes, unpack_positions
from .uniform import check_block_size

if TYPE_CHECKING:
    from ..native import CodecSpec

_AS_THEY_ARE = NoCompression()
_BLOCK_SIZE = 8192
_DENSITY_UNIT = 1 << 30  # so that every implementation computes k in integers
_LARGEST = np.float32(2.0**126)
_MAGNITUDE = np.uint32(0x7FFFFFFF)


def magnitudes(values: FLOAT32) -> UINT32:
    """Return integers in the order of the magnitudes; 0.0 and -0.0 are alike."""
    return np.ascontiguousarray(values).view(np.uint32) & _MAGNITUDE


def largest(values: FLOAT32, kept: int) -> INT64:
    """Return where the ``kept`` largest magnitudes of each block are, rising; of equal ones the first.

    >>> import numpy as np
    >>> largest(np.array([[1.0, -3.0, 3.0, 0.0, 2.0]], np.float32), 2)
    array([[1, 2]])
    """
    order = np.argsort(-magnitudes(values).astype(np.int64), axis=-1, kind="stable")
    return np.sort(order[:, :kept], axis=-1)


def drawn(elements: int, kept: int, shared_key: int, index: UINT32) -> INT64:
    """Return the positions (blocks, kept), rising, that are drawn for blocks of ``elements`` numbers.

    Cell j of ``kept`` cells goes from floor(j n/k) to floor((j + 1) n/k); one position is drawn from each, and all of
    them are turned together, past the end to the beginning, by a random number below n. So any position is one of
    them with probability k/n, up to 2^-19 of it.
    """
    words = random.random_words(shared_key, index, 1 + kept).astype(np.uint64)
    edges = np.arange(kept + 1, dtype=np.uint64) * np.uint64(elements) // np.uint64(kept)
    bits = np.uint64(32)
    turn = words[:, :1] * np.uint64(elements) >> bits
    in_cells = edges[:-1] + (words[:, 1:] * np.diff(edges) >> bits)
    return np.sort((in_cells + turn) % np.uint64(elements), axis=-1).astype(np.int64)


class Sparse(Codec):
    """Base of the sparse codecs: which numbers, and how their positions travel."""

    density: float
    values: Codec

    def __post_init__(self) -> None:
        if not is_number(self.density) or not 0 < self.density <= 1:
            raise ArgumentError(f"density is {self.density!r}; it must be a number above 0, at most 1")
        object.__setattr__(self, "density", float(self.density))
        object.__setattr__(self, "block_size", check_block_size(self.block_size))
        if not isinstance(self.values, BlockCodec) or not self.values.keeps_scale:
            raise ArgumentError(
                f"values is {self.values!r}; it must be the codec of the numbers that are kept, such as none(), fp16() "
                "or eden(bits=4): not a sparse one, nor one that leaves their scale out"
            )

    @property
    def bits(self) -> int:
        """Bits of a number that is kept, without its position."""
        return self.values.bits

    @property
    def unbiased(self) -> bool:
        """False: what is left out is missing."""
        return False

    @property
    def contractive(self) -> bool:
        r"""True if ``values`` is: :math:`\delta \ge \delta_{values} k/n`, as the numbers kept have k/n of the norm."""
        return self.values.contractive

    @property
    def selects(self) -> bool:
        """True."""
        return True

    def at_least(self, density: float) -> Codec:
        """Return the codec that keeps at least this part.

        >>> from pqasgd_horovod import codecs
        >>> codecs.topk(density=0.01).at_least(0.25).density, codecs.topk(density=0.5).at_least(0.25).density
        (0.25, 0.5)
        """
        changed: dict[str, Any] = {"density": max(self.density, density)}
        return dataclasses.replace(self, **changed)

    @property
    def density_units(self) -> int:
        """The density in units of 2^-30."""
        return round(self.density * _DENSITY_UNIT)

    @property
    def native_spec(self) -> CodecSpec:
        """The kind, what is kept, and the codec of that."""
        own = super().native_spec
        values = self.values.native_spec
        return own._replace(
            density=self.density_units,
            values_kind=values.kind,
            values_bits=values.bits,
            values_block_size=values.block_size,
            values_flags=values.flags,
        )

    def kept(self, elements: int) -> int:
        """Return k, how many numbers of a block of ``elements`` are kept.

        >>> from pqasgd_horovod import codecs
        >>> [codecs.topk(density=0.01).kept(n) for n in (8192, 151, 149, 1)]
        [82, 2, 1, 1]
        """
        return max(1, (elements * self.density_units + _DENSITY_UNIT // 2) // _DENSITY_UNIT)

    def num_kept(self, num_elements: int) -> int:
        """Return how many numbers of a whole vector are kept."""
        full, rest = divmod(num_elements, self.block_size)
        return full * self.kept(self.block_size) + (self.kept(rest) if rest else 0)

    def positions_nbytes(self, elements: int) -> int:
        """Return the bytes that the positions in a block of ``elements`` numbers take."""
        return positions_nbytes(elements, self.kept(elements))

    @abc.abstractmethod
    def select(self, values: FLOAT32, shared_key: int, index: UINT32) -> INT64:
        """Return the positions (blocks, k) of the numbers that are kept of ``values`` (blocks, elements), rising."""

    def sent(self, kept: FLOAT32, elements: int) -> FLOAT32 | None:
        """Return what is sent of the numbers (blocks, k) that are kept; None if one is beyond the codec's range."""
        return kept

    def pack(self, positions: INT64, elements: int) -> UINT8:
        """Positions to bytes (blocks, positions_nbytes)."""
        return pack_positions(positions, elements)

    def unpack(self, packed: UINT8, elements: int, shared_key: int, index: UINT32) -> INT64:
        """The inverse of :meth:`pack`; raises WireFormatError for what it does not write."""
        return unpack_positions(packed, elements, self.kept(elements))

    def factor(self, elements: int) -> np.float32:
        """Return what decoded numbers of a block of ``elements`` are multiplied by."""
        return np.float32(1)

    def payload_nbytes(self, num_elements: int) -> int:
        """Return the exact number of bytes that ``num_elements`` numbers become."""
        full, rest = divmod(check_count(num_elements), self.block_size)
        positions = full * self.positions_nbytes(self.block_size) + (self.positions_nbytes(rest) if rest else 0)
        return self.values.payload_nbytes(self.num_kept(num_elements)) + positions

    def encode_vector(self, values: FLOAT32, keys: Keys) -> UINT8 | None:
        """The payload of the numbers that are kept, then the positions of each block."""
        kept, positions = [np.empty(0, np.float32)], [np.empty(0, np.uint8)]
        for part in self.split(values.size):
            blocks = values[part.start : part.stop].reshape(-1, part.elements)
            where = self.select(blocks, keys.shared, part.indices)
            sent = self.sent(np.take_along_axis(blocks, where, axis=-1), part.elements)
            if sent is None:
                return None
            kept.append(sent.reshape(-1))
            positions.append(self.pack(where, part.elements).reshape(-1))
        payload = self.values.encode_vector(np.concatenate(kept), keys)
        return None if payload is None else np.concatenate([payload, *positions])

    def add_decoded(self, payload: UINT8, destination: FLOAT32, keys: Keys, weight: np.float32) -> None:
        """Decode the numbers, and add each of them at its place; no other place is touched."""
        numbers = np.zeros(self.num_kept(destination.size), np.float32)
        at = self.values.payload_nbytes(numbers.size)
        self.values.add_decoded(payload[:at], numbers, keys, weight)
        done = 0
        for part in self.split(destination.size):
            blocks, kept, nbytes = len(part.indices), self.kept(part.elements), self.positions_nbytes(part.elements)
            packed = payload[at : at + blocks * nbytes].reshape(blocks, nbytes)
            where = self.unpack(packed, part.elements, keys.shared, part.indices)
            decoded = numbers[done : done + blocks * kept].reshape(blocks, kept)
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                rows = destination[part.start : part.stop].reshape(blocks, part.elements)
                rows[np.arange(blocks)[:, None], where] += decoded * self.factor(part.elements)
            at, done = at + packed.size, done + decoded.size


@register
@dataclasses.dataclass(frozen=True)
class TopK(Sparse):
    r"""The k numbers of largest magnitude of each block; of equal ones the first.

    .. math:: \|Q(v) - v\|^2 \le (1 - k/n) \|v\|^2, \qquad k = \max(1, \lfloor density \cdot n + 1/2 \rfloor)

    for blocks of n numbers and ``values=none()``. Biased: train with error feedback (``feedback=hvd.Feedback()``), in
    the two-phase exchange above all, where of the mean, too, only the largest numbers are sent.

    Selection is by blocks of ``block_size``, a multiple of 64 from 64 to 8192, not in the vector as a whole: so the
    work is spread over threads. Where large numbers are in few blocks that sends smaller ones elsewhere; with feedback
    what is left out comes next. ``density`` is the kept part, above 0 and at most 1.
    ``values`` is the codec of the numbers that are kept: any but the sparse ones, and those without a scale. Positions
    take about 8.6 bits for each number that is kept at a density of 0.01, 5.3 at 0.1. Gaussian numbers, density 0.01:
    q = 0.92 in 0.41 bits for each number of the vector, or 0.13 with ``values=eden(bits=4)``.

    Raises ArgumentError for other arguments, NonFiniteError from ``encode`` if any number is NaN or Inf, kept or not,
    or one that is kept is beyond the range of ``values``.

    Source: Stich, Cordonnier, Jaggi, "Sparsified SGD with memory", NeurIPS 2018; Aji, Heafield, "Sparse communication
    for distributed gradient descent", EMNLP 2017. Positions: Elias, JACM 1974; Fano, 1971.

    >>> import numpy as np
    >>> from pqasgd_horovod import codecs
    >>> codec = codecs.topk(density=0.4)
    >>> v = np.array([1.0, -3.0, 0.5, 2.0, -0.1], np.float32)
    >>> codec.reference_decode(codec.reference_encode(v), 5)
    array([ 0., -3.,  0.,  2.,  0.], dtype=float32)
    """

    id = "topk"

    density: float = 0.01
    values: Codec = _AS_THEY_ARE
    block_size: int = _BLOCK_SIZE

    def select(self, values: FLOAT32, shared_key: int, index: UINT32) -> INT64:
        """The largest."""
        return largest(values, self.kept(values.shape[-1]))


@register
@dataclasses.dataclass(frozen=True)
class Threshold(Sparse):
    r"""The numbers whose magnitude is at least ``value``, but at most the k largest of each block.

    .. math:: \|Q(v) - v\|^2 \le (1 - k/n) \|v\|^2 + n \, value^2

    for blocks of n numbers and ``values=none()``. A payload has a fixed size: where fewer numbers reach ``value`` the
    largest of the others are sent as zeros. So no byte is saved over ``topk``; noise is. It is a contraction up to a
    constant: with error feedback the residual stays bounded, by ``value`` for each number in blocks where no more than
    k reach it.

    ``value`` is a float32 number above 0; ``density``, ``values`` and ``block_size`` are those of ``topk``. With the
    two-phase exchange the means have to reach ``value`` too: give it a ``second_compression``, or use allgather.

    Raises as ``topk``.

    Source: Strom, "Scalable distributed DNN training using commodity GPU cloud computing", Interspeech 2015; its error
    feedback: Sahu, Dutta, Abdelmoniem, Banerjee, Canini, Kalnis, "Rethinking gradient sparsification as total error
    minimization", NeurIPS 2021.

    >>> import numpy as np
    >>> from pqasgd_horovod import codecs
    >>> codec = codecs.threshold(1.0, density=0.4)
    >>> v = np.array([0.5, -3.0, 0.5, 0.2, -0.1], np.float32)
    >>> codec.reference_decode(codec.reference_encode(v), 5)
    array([ 0., -3.,  0.,  0.,  0.], dtype=float32)
    """

    id = "threshold"

    value: float
    density: float = 0.05
    values: Codec = _AS_THEY_ARE
    block_size: int = _BLOCK_SIZE

    def __post_init__(self) -> None:
        super().__post_init__()
        with np.errstate(over="ignore"):
            if not is_number(self.value) or not 0 < np.float32(self.value) < np.inf:
                raise ArgumentError(f"value is {self.value!r}; it must be a float32 number above 0")
        object.__setattr__(self, "value", float(self.value))

    @property
    def native_spec(self) -> CodecSpec:
        """As for all, and the threshold."""
        return super().native_spec._replace(threshold=int(magnitudes(np.array([self.value], np.float32))[0]))

    def select(self, values: FLOAT32, shared_key: int, index: UINT32) -> INT64:
        """The largest."""
        return largest(values, self.kept(values.shape[-1]))

    def sent(self, kept: FLOAT32, elements: int) -> FLOAT32 | None:
        """Zeros in the place of those below the threshold."""
        return np.where(np.abs(kept) >= np.float32(self.value), kept, np.float32(0))


@register
@dataclasses.dataclass(frozen=True)
class RandomK(Sparse):
    r"""k numbers of each block, drawn at random, the same ones on every rank: no positions travel.

    .. math:: E\|Q(v) - v\|^2 = (1 - k/n) \|v\|^2, \qquad \text{or } (n/k - 1) \|v\|^2 \text{ if scaled},

    for blocks of n numbers and ``values=none()``: any number is kept with probability k/n. ``scaled=True`` multiplies
    what is decoded by n/k: unbiased if ``values`` is, at a great error. Without, it is a contraction, for error
    feedback.

    Positions come from the shared key, so that the sum of all ranks' numbers has the same positions: a mean is again
    such a vector. The two-phase exchange draws once: the owner of a shard adds of its own part what the others send of
    theirs, and phase two sends the mean at these positions, as it is (``scaled=False``), so that with
    ``values=none()`` nothing is lost there. It does not commute with a sum inside Horovod's own allreduce, which has no
    step to draw by.

    ``density``, ``values`` and ``block_size`` are those of ``topk``. Drawing is from k cells of n/k neighbours, one of
    each.

    Raises as ``topk``, and NonFiniteError from ``encode`` if a number, scaled, is beyond 2^126, 8.5e37.

    Source: Stich, Cordonnier, Jaggi, "Sparsified SGD with memory", NeurIPS 2018; Konecny, McMahan, Yu, Richtarik,
    Suresh, Bacon, "Federated learning: strategies for improving communication efficiency", 2016.

    >>> import numpy as np
    >>> from pqasgd_horovod import codecs
    >>> codec = codecs.randomk(density=0.5)
    >>> payload = codec.reference_encode(np.ones(6, np.float32), shared_key=2)
    >>> codec.reference_decode(payload, 6, shared_key=2)
    array([1., 1., 0., 0., 1., 0.], dtype=float32)
    """

    id = "randomk"

    density: float = 0.01
    values: Codec = _AS_THEY_ARE
    scaled: bool = False
    block_size: int = _BLOCK_SIZE

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("scaled", self.scaled)

    @property
    def unbiased(self) -> bool:
        """True if scaled, and if ``values`` is."""
        return self.scaled and self.values.unbiased

    @property
    def contractive(self) -> bool:
        r"""True without a scale if ``values`` is: :math:`\delta \ge \delta_{values} k/n`."""
        return not self.scaled and super().contractive

    @property
    def shared_selection(self) -> tuple[int, int]:
        """The density and the size of a block: what decides, besides keys, which numbers are kept."""
        return self.density_units, self.block_size

    @property
    def for_means(self) -> Codec:
        """The same without a factor: a mean has the numbers that were kept, and no others."""
        return dataclasses.replace(self, scaled=False)

    @property
    def native_flags(self) -> int:
        """Whether there is a factor."""
        from .. import native

        return native.FLAG_SCALED if self.scaled else 0

    def select(self, values: FLOAT32, shared_key: int, index: UINT32) -> INT64:
        """Those that are drawn."""
        elements = values.shape[-1]
        return drawn(elements, self.kept(elements), shared_key, index)

    def sent(self, kept: FLOAT32, elements: int) -> FLOAT32 | None:
        """All of them; with a factor they must leave room for it, and for what rounding adds."""
        with np.errstate(over="ignore"):
            too_large = self.scaled and (np.abs(kept * self.factor(elements)) > _LARGEST).any()
        return None if too_large else kept

    def positions_nbytes(self, elements: int) -> int:
        """None: every rank draws them."""
        return 0

    def pack(self, positions: INT64, elements: int) -> UINT8:
        """Nothing."""
        return np.empty((len(positions), 0), np.uint8)

    def unpack(self, packed: UINT8, elements: int, shared_key: int, index: UINT32) -> INT64:
        """Draw them again."""
        return drawn(elements, self.kept(elements), shared_key, index)

    def factor(self, elements: int) -> np.float32:
        """n/k if scaled, else 1."""
        return np.float32(elements) / np.float32(self.kept(elements)) if self.scaled else np.float32(1)

    def own_part(self, values: FLOAT32, shared_key: int = 0) -> FLOAT32:
        """Of the owner's numbers, too, those that are drawn, times the factor; NaN where they are not finite."""
        with np.errstate(invalid="ignore"):
            own: FLOAT32 = values - values
        for part in self.split(values.size):
            blocks, rows = (v[part.start : part.stop].reshape(-1, part.elements) for v in (values, own))
            where = self.select(blocks, shared_key, part.indices)
            kept = np.take_along_axis(blocks, where, axis=-1) * self.factor(part.elements)
            np.put_along_axis(rows, where, kept, axis=-1)
        return own


def chain(sparsifier: Codec, quantizer: Codec) -> Codec:
    """Return ``sparsifier`` with the numbers that it keeps coded by ``quantizer``; the same as its ``values=``.

    Raises ArgumentError unless the first is a sparse codec with ``values=none()``, and the second is not sparse.

    >>> from pqasgd_horovod import codecs
    >>> chain(codecs.topk(density=0.1), codecs.fp16())
    TopK(density=0.1, values=Fp16(), block_size=8192)
    """
    if not isinstance(sparsifier, Sparse) or sparsifier.values != _AS_THEY_ARE:
        raise ArgumentError(
            f"sparsifier is {sparsifier!r}; it must be topk, threshold or randomk, with nothing else for values yet"
        )
    changed: dict[str, Any] = {"values": quantizer}
    return dataclasses.replace(sparsifier, **changed)
