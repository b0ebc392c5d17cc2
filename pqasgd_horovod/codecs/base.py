"""What a codec is: the contract, the registry, and all that does not depend on the codec.

A codec turns a flat vector into bytes and back, block by block. Two implementations stand behind one object: the native
core (:meth:`Codec.encode`, :meth:`Codec.decode_add`) and the NumPy specification (:meth:`Codec.reference_encode`,
:meth:`Codec.reference_decode_add`), which give the same bytes and the same floats. ``docs/architecture.md`` has the
format.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import numbers
import operator
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeGuard, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ArgumentError, NonFiniteError, WireFormatError
from ..keys import Keys

if TYPE_CHECKING:
    from ..native import CodecSpec

FLOAT32 = NDArray[np.float32]
UINT8 = NDArray[np.uint8]
UINT32 = NDArray[np.uint32]

SCALE_NBYTES = 4
_SCALE_DTYPE = np.dtype("<f4")
_VALUE_DTYPES = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))
_ANCHOR_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))

schemes: dict[str, type[Scheme]] = {}
"""Every scheme by its id; filled by :func:`register`."""
registry: dict[str, type[Codec]] = {}
"""Those of them that are codecs."""

SchemeClass = TypeVar("SchemeClass", bound="type[Scheme]")


def register(cls: SchemeClass) -> SchemeClass:
    """Class decorator: enter a scheme into :data:`schemes` under its ``id``, and a codec into :data:`registry` too."""
    if cls.id in schemes:
        raise ArgumentError(
            f"codec id {cls.id!r} is taken by {schemes[cls.id].__name__}; give {cls.__name__} another id"
        )
    schemes[cls.id] = cls
    if issubclass(cls, Codec):
        registry[cls.id] = cls
    return cls


def from_config(config: Mapping[str, Any]) -> Scheme:
    """Return the scheme, most often a codec, that a ``config()`` describes; the inverse of :meth:`Scheme.config`.

    Raises ArgumentError if the id is not registered, or a field is unknown or has a value that is not allowed.

    >>> from pqasgd_horovod import codecs
    >>> codecs.from_config({"id": "maxscale", "bits": 4})
    MaxScale(bits=4, block_size=512)
    """
    arguments = dict(config)
    codec_id = arguments.pop("id", None)
    if not isinstance(codec_id, str) or codec_id not in schemes:
        raise ArgumentError(f"config['id'] is {codec_id!r}; registered codecs are {', '.join(sorted(schemes))}")
    cls = schemes[codec_id]
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise ArgumentError(f"config of codec {codec_id!r} has unknown fields {unknown}; it takes {known or 'none'}")
    inner = {name: from_config(value) for name, value in arguments.items() if isinstance(value, Mapping)}
    return cls(**{**arguments, **inner})


class Blocks(NamedTuple):
    """Neighbouring blocks of one size; ``indices`` are their positions in the payload, 0 for the first."""

    indices: UINT32
    elements: int
    start: int  # position of the first element in the vector

    @property
    def stop(self) -> int:
        """Position after the last element."""
        return self.start + len(self.indices) * self.elements


class EncodedBlocks(NamedTuple):
    """Blocks of one size, encoded: code bytes (blocks, code_nbytes), scales, and if all was in range.

    Scales are (blocks,) where a block has one, (blocks, scales_per_block) where it has more, None where it has none.
    """

    codes: UINT8
    scales: FLOAT32 | None = None
    in_range: bool = True


@dataclasses.dataclass(frozen=True)
class Scheme(abc.ABC):
    r"""What ``compression=`` stands for: the facts that averaging relies on; the base of every codec.

    Subclasses are frozen dataclasses: hashable, and equal if and only if their configurations are equal. Nearly all are
    a :class:`Codec`, of one flat vector. One that has to know the tensors' shapes is not: it decides which tensors it
    fits, and what travels of them.
    """

    id: ClassVar[str]
    """The name in configurations and in :data:`schemes`."""
    commutes_with_sum: ClassVar[bool] = False
    """True if a sum of encoded vectors is a sensible code of the sum, in a dtype that Horovod's allreduce adds."""
    lossless: ClassVar[bool] = False
    """True if decoding gives back every float32 number."""
    needs_feedback: ClassVar[bool] = False
    """True if there is no sense in it without error feedback."""

    @property
    @abc.abstractmethod
    def unbiased(self) -> bool:
        """True if what is decoded is right on average over all keys, up to the resolution of the random numbers."""

    @property
    def contractive(self) -> bool:
        r"""True if :math:`E\|Q(v) - v\|^2 \le (1 - \delta) \|v\|^2 + c` for every v, with one :math:`\delta > 0`.

        Error feedback needs it: elsewhere what was not sent can grow from round to round. The constant c is 0, except
        for ``threshold``.
        """
        return False

    @property
    def keeps_scale(self) -> bool:
        """False if what is decoded has a size of its own, whatever was encoded: fit for gradients only."""
        return True

    @property
    def selects(self) -> bool:
        """True if some numbers are sent and nothing of the others."""
        return False

    def at_least(self, density: float) -> Scheme:
        """Return the scheme that sends at least this part of the numbers."""
        return self

    @property
    @abc.abstractmethod
    def message_codec(self) -> Codec:
        """What codes the vectors that are exchanged."""

    def fits(self, matrix: tuple[int, int]) -> bool:
        """Return whether a tensor, seen as a matrix of (rows, columns), is compressed, and not sent as it is."""
        return True

    def kept_numel(self, matrix: tuple[int, int]) -> int:
        """Return how many numbers, alike on all ranks, are kept of such a tensor from one round to the next."""
        return 0

    def config(self) -> dict[str, Any]:
        """Return the configuration as a dict that JSON can hold; :func:`from_config` takes it back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        inner = {name: value.config() for name, value in values.items() if isinstance(value, Scheme)}
        return {"id": self.id, **values, **inner}


@dataclasses.dataclass(frozen=True)
class Codec(Scheme):
    r"""What bytes stand for these numbers, a flat vector.

    For a vector :math:`v` the decoded vector :math:`Q(v)` has the error :math:`E\|Q(v) - v\|^2 \le q \|v\|^2`.
    Subclasses define what a vector becomes: :class:`BlockCodec` for codes of independent blocks, of which nearly all
    codecs are.
    """

    @property
    def message_codec(self) -> Codec:
        """Itself."""
        return self

    @property
    @abc.abstractmethod
    def bits(self) -> int:
        """Bits of one code, before what packing may save."""

    @property
    @abc.abstractmethod
    def block_size(self) -> int:
        """Elements that are coded together: the literature's bucket. Vectors are best cut at its multiples."""

    @property
    def exchange_method(self) -> str | None:
        """The only exchange that this codec is fit for if both phases are coded by it; None: any."""
        return None

    @property
    def exchange_reason(self) -> str:
        """Why it is fit for no other, to be told to the user."""
        return ""

    @property
    def shared_selection(self) -> tuple[int, ...] | None:
        """What decides, besides keys, which numbers are sent, where all ranks send the same ones; elsewhere None."""
        return None

    @property
    def for_means(self) -> Codec:
        """The codec of the means in the two-phase exchange, unless another one is asked for."""
        return self

    @property
    def native_flags(self) -> int:
        """Flags for the native core."""
        return 0

    @property
    def native_spec(self) -> CodecSpec:
        """What the native core needs to know; the kind is its constant ``KIND_<ID>``."""
        from .. import native

        return native.CodecSpec(
            getattr(native, f"KIND_{self.id.upper()}"), self.bits, self.block_size, self.native_flags
        )

    @abc.abstractmethod
    def payload_nbytes(self, num_elements: int) -> int:
        """Return the exact number of bytes that ``num_elements`` numbers become.

        >>> from pqasgd_horovod import codecs
        >>> codecs.eden(bits=2).payload_nbytes(1024)  # 4 for the scale, 256 for the codes
        260
        """

    @abc.abstractmethod
    def encode_vector(self, values: FLOAT32, keys: Keys) -> UINT8 | None:
        """Return the payload of a vector of finite numbers; None if one is beyond the codec's range."""

    @abc.abstractmethod
    def add_decoded(self, payload: UINT8, destination: FLOAT32, keys: Keys, weight: np.float32) -> None:
        """Add ``weight`` times the decoded vector; ``payload`` has the right length.

        Raises WireFormatError for what no encoder writes.
        """

    def own_part(self, values: FLOAT32, shared_key: int = 0) -> FLOAT32:
        """Return what the numbers of a shard's owner, who does not code them, count as in the two-phase exchange."""
        return values

    def payload_bits_per_element(self, num_elements: int) -> float:
        """Return bits on the wire for each number, scales and padding included; 0 for an empty vector.

        >>> from pqasgd_horovod import codecs
        >>> codecs.maxscale(bits=4, block_size=512).payload_bits_per_element(1 << 20)
        4.0625
        """
        num_elements = check_count(num_elements)
        return 8 * self.payload_nbytes(num_elements) / num_elements if num_elements else 0.0

    def split(self, num_elements: int) -> Iterator[Blocks]:
        """Cut a vector into all full blocks, then the last shorter one; a part that would be empty is left out."""
        full, rest = divmod(num_elements, self.block_size)
        if full:
            yield Blocks(np.arange(full, dtype=np.uint32), self.block_size, 0)
        if rest:
            yield Blocks(np.array([full], np.uint32), rest, full * self.block_size)

    def encode(
        self,
        values: np.ndarray,
        key: int = 0,
        *,
        shared_key: int = 0,
        anchor: np.ndarray | None = None,
        out: UINT8 | None = None,
    ) -> UINT8:
        """Return the payload of ``values - anchor``, made by the native core.

        Args:
            values: contiguous vector, float16, float32 or float64. Numbers beyond float32 count as not finite.
            key: 64-bit key of all random numbers; see :func:`pqasgd_horovod.keys.derive_key`.
            shared_key: 64-bit key of what all ranks draw alike; only ``randomk`` does.
            anchor: None, or a contiguous float32 or float64 vector of the same length. The difference is taken in its
                dtype, then rounded to float32.
            out: None, or a contiguous uint8 vector of ``payload_nbytes(len(values))`` to write to.

        Returns:
            The payload, uint8; ``out`` if it was given.

        Raises ArgumentError for arguments other than these, NonFiniteError if a number is NaN, infinite or too large
        for the codec.

        >>> import numpy as np
        >>> from pqasgd_horovod import codecs
        >>> payload = codecs.fp16().encode(np.array([1.0, -2.0], np.float32))
        >>> payload.tobytes().hex()
        '003c00c0'
        """
        from .. import native

        check_values(values, anchor)
        keys = check_keys(key, shared_key)
        expected = self.payload_nbytes(values.size)
        if out is None:
            out = np.empty(expected, np.uint8)
        else:
            check_vector("out", out, (np.dtype(np.uint8),), writeable=True)
            if out.size != expected:
                raise ArgumentError(f"out has {out.size} bytes; {self} makes {expected} bytes of {values.size} numbers")
        source = native.Source.from_arrays([values], anchor)
        if not native.encode(self.native_spec, source, 0, values.size, keys, out):
            raise self.non_finite_error(values, anchor)
        return out

    def decode(self, payload: UINT8, num_elements: int, key: int = 0, *, shared_key: int = 0) -> FLOAT32:
        """Return the ``num_elements`` float32 numbers that ``payload`` stands for; see :meth:`decode_add`.

        >>> import numpy as np
        >>> from pqasgd_horovod import codecs
        >>> codec = codecs.maxscale(bits=3)
        >>> codec.decode(codec.encode(np.array([3.0, -1.0, 0.0], np.float32)), 3)
        array([ 3., -1.,  0.], dtype=float32)
        """
        destination = np.zeros(check_count(num_elements), np.float32)
        self.decode_add(payload, destination, key, shared_key=shared_key)
        return destination

    def decode_add(
        self, payload: UINT8, destination: FLOAT32, key: int = 0, weight: float = 1.0, *, shared_key: int = 0
    ) -> None:
        """Add ``weight`` times the decoded vector to ``destination`` with the native core.

        Args:
            payload: contiguous uint8 vector from :meth:`encode` with the same keys.
            destination: contiguous float32 vector, as long as the payload has numbers. Unspecified after an error.
            key: the 64-bit key of the payload.
            weight: finite number, rounded to float32.
            shared_key: the 64-bit key that all ranks share.

        Raises ArgumentError for arguments other than these, WireFormatError if the payload is truncated or corrupted.

        >>> import numpy as np
        >>> from pqasgd_horovod import codecs
        >>> total = np.ones(2, np.float32)
        >>> codecs.none().decode_add(codecs.none().encode(np.array([2.0, 4.0], np.float32)), total, weight=0.5)
        >>> total
        array([2., 3.], dtype=float32)
        """
        from .. import native

        weight32 = self._check_decode(payload, destination, weight)
        keys = check_keys(key, shared_key)
        native.decode_add(self.native_spec, payload, destination.size, keys, float(weight32), destination)

    def encode_with_feedback(
        self,
        values: np.ndarray,
        residual: FLOAT32,
        key: int = 0,
        *,
        shared_key: int = 0,
        anchor: np.ndarray | None = None,
    ) -> tuple[UINT8, FLOAT32]:
        r"""Return the payload of :math:`u = (v - a) + r`, and what it leaves to the next round, :math:`u - Q(u)`.

        By the native core. ``values``, the keys and ``anchor`` are as for :meth:`encode`; ``residual`` is a contiguous
        float32 vector as long as ``values``, as is the second result. Each operation is rounded to float32.

        Raises as :meth:`encode`.

        >>> import numpy as np
        >>> from pqasgd_horovod import codecs
        >>> values, residual = np.array([1.0, 0.1], np.float32), np.array([0.0, 0.5], np.float32)
        >>> payload, rest = codecs.bf16().encode_with_feedback(values, residual)
        >>> codecs.bf16().decode(payload, 2) + rest
        array([1. , 0.6], dtype=float32)
        """
        from .. import native

        check_feedback(values, anchor, residual)
        keys = check_keys(key, shared_key)
        payload, rest = np.empty(self.payload_nbytes(values.size), np.uint8), np.empty(values.size, np.float32)
        source = native.Source.from_arrays([values], anchor, (residual, rest))
        if not native.encode(self.native_spec, source, 0, values.size, keys, payload):
            raise self.non_finite_error(subtract_anchor(values, anchor) + residual)
        return payload, rest

    def reference_encode_with_feedback(
        self,
        values: np.ndarray,
        residual: FLOAT32,
        key: int = 0,
        *,
        shared_key: int = 0,
        anchor: np.ndarray | None = None,
    ) -> tuple[UINT8, FLOAT32]:
        """Do what :meth:`encode_with_feedback` does, by the NumPy specification.

        >>> import numpy as np
        >>> from pqasgd_horovod import codecs
        >>> values, residual = np.array([1.0, 0.1], np.float32), np.array([0.0, 0.5], np.float32)
        >>> codecs.none().reference_encode_with_feedback(values, residual)[1]
        array([0., 0.], dtype=float32)
        """
        check_feedback(values, anchor, residual)
        with np.errstate(over="ignore", invalid="ignore"):
            total: FLOAT32 = subtract_anchor(values, anchor) + residual
        payload = self.reference_encode(total, key, shared_key=shared_key)
        return payload, total - self.reference_decode(payload, values.size, key, shared_key=shared_key)

    def reference_encode(
        self, values: np.ndarray, key: int = 0, *, shared_key: int = 0, anchor: np.ndarray | None = None
    ) -> UINT8:
        """Return what :meth:`encode` returns, computed by the NumPy specification.

        >>> import numpy as np
        >>> from pqasgd_horovod import codecs
        >>> codecs.bf16().reference_encode(np.array([1.0], np.float32)).tobytes().hex()
        '803f'
        """
        check_values(values, anchor)
        keys = check_keys(key, shared_key)
        difference = subtract_anchor(values, anchor)
        payload = self.encode_vector(difference, keys) if np.isfinite(difference).all() else None
        if payload is None:
            raise self.non_finite_error(values, anchor)
        return payload

    def reference_decode(self, payload: UINT8, num_elements: int, key: int = 0, *, shared_key: int = 0) -> FLOAT32:
        """Return what :meth:`decode` returns, computed by the NumPy specification.

        >>> import numpy as np
        >>> from pqasgd_horovod import codecs
        >>> codec = codecs.terngrad()
        >>> codec.reference_decode(codec.reference_encode(np.array([2.0, 0.0, -2.0], np.float32)), 3)
        array([ 2.,  0., -2.], dtype=float32)
        """
        destination = np.zeros(check_count(num_elements), np.float32)
        self.reference_decode_add(payload, destination, key, shared_key=shared_key)
        return destination

    def reference_decode_add(
        self, payload: UINT8, destination: FLOAT32, key: int = 0, weight: float = 1.0, *, shared_key: int = 0
    ) -> None:
        """Do what :meth:`decode_add` does, by the NumPy specification.

        >>> import numpy as np
        >>> from pqasgd_horovod import codecs
        >>> total = np.ones(1, np.float32)
        >>> codecs.fp16().reference_decode_add(np.array([0x00, 0x3C], np.uint8), total, weight=2.0)
        >>> total
        array([3.], dtype=float32)
        """
        weight32 = self._check_decode(payload, destination, weight)
        self.add_decoded(payload, destination, check_keys(key, shared_key), weight32)

    def non_finite_error(self, values: np.ndarray, anchor: np.ndarray | None = None) -> NonFiniteError:
        """Return the error for numbers that this codec cannot send, naming the first that is not finite, if any."""
        bad = np.flatnonzero(~np.isfinite(subtract_anchor(values, anchor)))
        if bad.size:
            position = int(bad[0])
            less = "" if anchor is None else f" - {anchor[position]}"
            what = (
                f"number {position} is {values[position]}{less}; {bad.size} of {values.size} are not finite in float32"
            )
        else:
            largest = float(np.max(np.abs(subtract_anchor(values, anchor))))
            what = f"the largest magnitude is {largest:g}, so that codes or sums overflow"
        return NonFiniteError(
            f"{self} cannot encode values: {what}. Look for a diverging loss, or lower the learning rate"
        )

    def _check_decode(self, payload: UINT8, destination: FLOAT32, weight: float) -> np.float32:
        check_vector("payload", payload, (np.dtype(np.uint8),))
        check_vector("destination", destination, (np.dtype(np.float32),), writeable=True)
        expected = self.payload_nbytes(destination.size)
        if payload.size != expected:
            raise WireFormatError(
                f"payload has {payload.size} bytes; {self} makes {expected} bytes of {destination.size} numbers: "
                "it is truncated, or was made by another codec or for another length"
            )
        with np.errstate(over="ignore"):
            weight32: np.float32 = np.float32(weight)
        if not math.isfinite(weight32):
            raise ArgumentError(f"weight is {weight!r}; it must be a finite float32 number")
        return weight32


@dataclasses.dataclass(frozen=True)
class BlockCodec(Codec):
    """A codec of independent blocks: first the scales of all of them, then their codes.

    Subclasses define functions on a two-dimensional array of blocks.
    """

    @property
    def scales_per_block(self) -> int:
        """How many float32 numbers >= 0 of each block the payload starts with."""
        return 1

    @abc.abstractmethod
    def code_nbytes(self, elements: int) -> int:
        """Bytes that the codes of one block of ``elements`` numbers take, 1 <= elements <= block_size."""

    @abc.abstractmethod
    def encode_blocks(self, values: FLOAT32, key: int, index: UINT32) -> EncodedBlocks:
        """Encode blocks: ``values`` is (blocks, elements) and finite, ``index`` (blocks,) has their positions."""

    @abc.abstractmethod
    def decode_blocks(
        self, scales: FLOAT32 | None, codes: UINT8, elements: int, key: int, index: UINT32
    ) -> tuple[FLOAT32, FLOAT32]:
        """Decode blocks to ``x`` (blocks, elements) and ``step`` (blocks,); the numbers are their products.

        ``scales`` has the shape that :class:`EncodedBlocks` gives it.

        Raises WireFormatError for a code that no encoder writes.
        """

    def payload_nbytes(self, num_elements: int) -> int:
        """Return the exact number of bytes that ``num_elements`` numbers become."""
        full, rest = divmod(check_count(num_elements), self.block_size)
        scales = SCALE_NBYTES * self.scales_per_block
        nbytes = full * (scales + self.code_nbytes(self.block_size))
        return nbytes + scales + self.code_nbytes(rest) if rest else nbytes

    def encode_vector(self, values: FLOAT32, keys: Keys) -> UINT8 | None:
        """Encode all blocks."""
        all_scales, all_codes = [np.empty(0, _SCALE_DTYPE)], [np.empty(0, np.uint8)]
        for part in self.split(values.size):
            blocks = values[part.start : part.stop].reshape(-1, part.elements)
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                encoded = self.encode_blocks(blocks, keys.own, part.indices)
            if not encoded.in_range:
                return None
            if encoded.scales is not None:
                all_scales.append(encoded.scales.astype(_SCALE_DTYPE).reshape(-1))
            all_codes.append(encoded.codes.reshape(-1))
        return np.concatenate([np.concatenate(all_scales).view(np.uint8), *all_codes])

    def add_decoded(self, payload: UINT8, destination: FLOAT32, keys: Keys, weight: np.float32) -> None:
        """Decode all blocks, and add them."""
        parts = list(self.split(destination.size))
        num_scales = self.scales_per_block * sum(len(part.indices) for part in parts)
        all_scales = payload[: SCALE_NBYTES * num_scales].view(_SCALE_DTYPE).astype(np.float32)
        refused = np.flatnonzero(~((all_scales >= 0) & (all_scales < np.inf)))
        if refused.size:
            first = int(refused[0])
            raise WireFormatError(
                f"payload of {self}: a scale of block {first // self.scales_per_block} is {all_scales[first]}, "
                "not a finite number >= 0"
            )
        by_block = all_scales.reshape(-1, self.scales_per_block) if self.scales_per_block > 1 else all_scales
        at = SCALE_NBYTES * num_scales
        for part in parts:
            nbytes = self.code_nbytes(part.elements)
            codes = payload[at : at + len(part.indices) * nbytes].reshape(-1, nbytes)
            at += codes.size
            scales = by_block[part.indices] if self.scales_per_block else None
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                x, step = self.decode_blocks(scales, codes, part.elements, keys.own, part.indices)
                destination[part.start : part.stop] += (x * (step * weight)[:, None]).reshape(-1)


def subtract_anchor(values: np.ndarray, anchor: np.ndarray | None) -> FLOAT32:
    """Return ``values - anchor`` as float32; the difference is taken in the dtype of the anchor."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if anchor is None:
            return values.astype(np.float32)
        difference: FLOAT32 = (values.astype(anchor.dtype) - anchor).astype(np.float32)
        return difference


def sum64(x: NDArray[Any]) -> NDArray[Any]:
    """Return the sum over the last axis, in the type of ``x`` and the one order that every implementation keeps.

    64 running sums, element i going to sum i mod 64; then the upper half is added to the lower half until one is left.

    >>> import numpy as np
    >>> sum64(np.ones((2, 100), np.float32))
    array([100., 100.], dtype=float32)
    """
    padding = -x.shape[-1] % 64
    rows = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)]).reshape(*x.shape[:-1], -1, 64)
    sums = np.zeros((*x.shape[:-1], 64), x.dtype)
    for row in range(rows.shape[-2]):
        sums += rows[..., row, :]
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    total: NDArray[Any] = sums[..., 0]
    return total


def check_vector(name: str, array: ArrayLike, dtypes: tuple[np.dtype, ...], *, writeable: bool = False) -> None:
    """Raise ArgumentError unless ``array`` is a contiguous NumPy vector of one of ``dtypes``."""
    allowed = " or ".join(dtype.name for dtype in dtypes)
    if not isinstance(array, np.ndarray):
        raise ArgumentError(f"{name} is a {type(array).__name__}; it must be a NumPy vector of {allowed}")
    if array.dtype not in dtypes:
        raise ArgumentError(f"{name} has dtype {array.dtype}; it must be {allowed}")
    if array.ndim != 1 or not array.flags.c_contiguous:
        raise ArgumentError(
            f"{name} has shape {array.shape} and strides {array.strides}; it must be one contiguous vector: "
            "pass np.ascontiguousarray(x).reshape(-1)"
        )
    if writeable and not array.flags.writeable:
        raise ArgumentError(f"{name} is read-only; pass an array that can be written to")


def check_values(values: np.ndarray, anchor: np.ndarray | None) -> None:
    """Raise ArgumentError unless ``values`` and ``anchor`` can be encoded."""
    check_vector("values", values, _VALUE_DTYPES)
    if anchor is not None:
        check_vector("anchor", anchor, _ANCHOR_DTYPES)
        if anchor.size != values.size:
            raise ArgumentError(
                f"anchor has {anchor.size} elements and values has {values.size}; they must be as long as each other"
            )


def check_feedback(values: np.ndarray, anchor: np.ndarray | None, residual: np.ndarray) -> None:
    """Raise ArgumentError unless these can be encoded together."""
    check_values(values, anchor)
    check_vector("residual", residual, (np.dtype(np.float32),))
    if residual.size != values.size:
        raise ArgumentError(
            f"residual has {residual.size} elements and values has {values.size}; they must be as long as each other"
        )


def check_count(num_elements: int) -> int:
    """Return ``num_elements`` as an int, or raise ArgumentError unless it is a whole number >= 0."""
    return check_integer("num_elements", num_elements, 0, 2**48)


def check_key(key: int, name: str = "key") -> int:
    """Return ``key`` as an int, or raise ArgumentError unless it is a whole number of 64 bits."""
    return check_integer(name, key, 0, 2**64 - 1)


def check_keys(key: int, shared_key: int) -> Keys:
    """Return the keys, or raise ArgumentError unless they are whole numbers of 64 bits."""
    return Keys(check_key(key), check_key(shared_key, "shared_key"))


def check_integer(name: str, value: int, low: int, high: int) -> int:
    """Return ``value`` as an int, or raise ArgumentError unless it is a whole number from ``low`` to ``high``."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ArgumentError(f"{name} is {value!r}; it must be a whole number from {low} to {high}") from None
    if isinstance(value, bool) or not low <= number <= high:
        raise ArgumentError(f"{name} is {value!r}; it must be a whole number from {low} to {high}")
    return number


def check_flag(name: str, value: object) -> None:
    """Raise ArgumentError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ArgumentError(f"{name} is {value!r}; it must be True or False")


def is_number(value: object) -> TypeGuard[float]:
    """Return whether ``value`` is a number, NumPy's included, and not True or False."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
