"""Codecs in the place of Horovod compressors; each front end adds its framework's Horovod to these."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, Literal, TypeVar

from . import codecs
from .codecs.base import Codec, Scheme
from .errors import ArgumentError

Self = TypeVar("Self", bound="CodecCompressor")
Made = TypeVar("Made", bound="CodecCompressor")


class CodecCompressor:
    """A codec in the place of a Horovod compressor; equal and hashable by its configuration.

    A codec that commutes with a sum works in stock Horovod too. Any other raises ArgumentError there, at the first
    gradient, since Horovod would add up codes: give it to the ``DistributedOptimizer`` or the ``compressed_allreduce``
    of this package.
    """

    _horovod: ClassVar[Any]  # Horovod's own Compression
    _front_end: ClassVar[str]  # the module that users import

    def __init__(self, codec: Scheme) -> None:
        self.codec = codec

    def compress(self, tensor: Any) -> tuple[Any, Any]:
        """Return what Horovod's allreduce adds up, and what :meth:`decompress` needs to know."""
        if not self.codec.commutes_with_sum:
            raise ArgumentError(
                f"compression={self!r} does not commute with a sum, so Horovod's own allreduce cannot use it: wrap the "
                f"optimizer with {self._front_end}.DistributedOptimizer(optimizer, ..., compression=...), or call "
                f"{self._front_end}.compressed_allreduce"
            )
        result: tuple[Any, Any] = self._stock.compress(tensor)
        return result

    def decompress(self, tensor: Any, ctx: Any) -> Any:
        """Return the tensor in its own type again."""
        return self._stock.decompress(tensor, ctx)

    @property
    def _stock(self) -> Any:
        return self._horovod.fp16 if self.codec.id == "fp16" else self._horovod.none

    def config(self) -> dict[str, Any]:
        """Return the codec's configuration as a dict that JSON can hold."""
        return self.codec.config()

    @classmethod
    def from_config(cls: type[Self], config: Mapping[str, Any]) -> Self:
        """Return the compressor that ``config`` describes."""
        return cls(codecs.from_config(config))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CodecCompressor) and self.codec == other.codec

    def __hash__(self) -> int:
        return hash((CodecCompressor, self.codec))

    def __repr__(self) -> str:
        fields = {field.name: getattr(self.codec, field.name) for field in dataclasses.fields(self.codec)}
        arguments = ", ".join(
            f"{key}={type(self)(value) if isinstance(value, Scheme) else value!r}" for key, value in fields.items()
        )
        is_method = hasattr(CompressionMethods, self.codec.id)  # the casts are attributes
        return f"Compression.{self.codec.id}({arguments})" if is_method else f"Compression.{self.codec.id}"


class CompressionMethods(Generic[Made]):
    """What every front end's ``Compression`` offers: a compressor for each codec."""

    _compressor: type[Made]

    @classmethod
    def quantize(cls, bits: int = 4) -> Made:
        """Return the quantizer with the least noise at 1 to 8 bits; see :func:`pqasgd_horovod.codecs.quantize`."""
        return cls._compressor(codecs.quantize(bits))

    @classmethod
    def maxscale(cls, bits: int = 4, block_size: int = 512) -> Made:
        """Stochastic uniform quantizer scaled by the largest magnitude of each block; see ``codecs.maxscale``."""
        return cls._compressor(codecs.maxscale(bits=bits, block_size=block_size))

    @classmethod
    def qsgd(cls, bits: int = 4, block_size: int = 512) -> Made:
        """Stochastic uniform quantizer scaled by the L2 norm of each block (QSGD); see ``codecs.qsgd``."""
        return cls._compressor(codecs.qsgd(bits=bits, block_size=block_size))

    @classmethod
    def terngrad(cls, block_size: int = 512) -> Made:
        """Three levels, five numbers to a byte; see ``codecs.terngrad``."""
        return cls._compressor(codecs.terngrad(block_size=block_size))

    @classmethod
    def eden(
        cls, bits: int = 4, block_size: int = 1024, rounding: Literal["nearest", "stochastic"] = "nearest"
    ) -> Made:
        """Randomly rotated blocks on the Lloyd-Max levels of the normal law; see ``codecs.eden``."""
        return cls._compressor(codecs.eden(bits=bits, block_size=block_size, rounding=rounding))

    @classmethod
    def signsgd(cls, block_size: int = 1024, scaled: bool | None = None, majority_vote: bool = False) -> Made:
        """Signs, with a mean magnitude for each block, or alone, or as votes (signSGD); see ``codecs.signsgd``."""
        return cls._compressor(codecs.signsgd(block_size=block_size, scaled=scaled, majority_vote=majority_vote))

    @classmethod
    def onebit(cls, block_size: int = 1024) -> Made:
        """The sign, and a mean of the numbers of each sign in a block (1-bit SGD); see ``codecs.onebit``."""
        return cls._compressor(codecs.onebit(block_size=block_size))

    @classmethod
    def natural(cls) -> Made:
        """Stochastic rounding to a power of two (natural compression); see ``codecs.natural``."""
        return cls._compressor(codecs.natural())

    @classmethod
    def topk(cls, density: float = 0.01, values: CodecCompressor | None = None, block_size: int = 8192) -> Made:
        """The largest numbers of each block; ``values`` compresses those. See ``codecs.topk``.

        With error feedback: ``feedback=hvd.Feedback()``.
        """
        return cls._compressor(codecs.topk(density=density, values=cls._values(values), block_size=block_size))

    @classmethod
    def threshold(
        cls, value: float, density: float = 0.05, values: CodecCompressor | None = None, block_size: int = 8192
    ) -> Made:
        """Numbers of at least a magnitude, up to a density; ``values`` compresses those. See ``codecs.threshold``.

        With error feedback: ``feedback=hvd.Feedback()``.
        """
        codec = codecs.threshold(value, density=density, values=cls._values(values), block_size=block_size)
        return cls._compressor(codec)

    @classmethod
    def randomk(
        cls,
        density: float = 0.01,
        values: CodecCompressor | None = None,
        scaled: bool = False,
        block_size: int = 8192,
    ) -> Made:
        """Numbers drawn at random, the same on every rank; ``values`` compresses those. See ``codecs.randomk``.

        With error feedback, ``feedback=hvd.Feedback()``, or unbiased with ``scaled=True``.
        """
        codec = codecs.randomk(density=density, values=cls._values(values), scaled=scaled, block_size=block_size)
        return cls._compressor(codec)

    @classmethod
    def powersgd(cls, approximation_rank: int = 2) -> Made:
        """Matrices as two factors of low rank (PowerSGD); see ``codecs.powersgd``.

        With error feedback: ``feedback=hvd.Feedback()``.
        """
        return cls._compressor(codecs.powersgd(approximation_rank=approximation_rank))

    @classmethod
    def chain(cls, sparsifier: CodecCompressor, quantizer: CodecCompressor) -> Made:
        """The sparsifier, with the numbers that it keeps compressed by the quantizer; see ``codecs.chain``.

        ``chain(topk(0.01), eden(4))`` is ``topk(0.01, values=eden(4))``.
        """
        return cls._compressor(codecs.chain(cls._codec("sparsifier", sparsifier), cls._codec("quantizer", quantizer)))

    @classmethod
    def _values(cls, values: CodecCompressor | None) -> Codec:
        return codecs.none() if values is None else cls._codec("values", values)

    @classmethod
    def _codec(cls, argument: str, compressor: Any) -> Codec:
        codec = codec_of(compressor, argument, cls)
        if not isinstance(codec, Codec):
            raise ArgumentError(f"{argument} is {compressor!r}; it must be one of Compression, such as eden(bits=4)")
        return codec


def codec_of(compression: Any, argument: str, methods: type[CompressionMethods[Any]]) -> Scheme | None:
    """Return the codec, or other scheme, that a ``compression=`` stands for; None for a compressor of the user's own.

    Horovod's ``Compression.none`` and ``fp16`` and a bare codec are understood. Raises ArgumentError for what is no
    compressor at all.
    """
    compressor = methods._compressor
    if isinstance(compression, CodecCompressor):
        return compression.codec
    if isinstance(compression, Scheme):
        return compression
    if compression is compressor._horovod.none:
        return codecs.none()
    if compression is compressor._horovod.fp16:
        return codecs.fp16()
    if callable(getattr(compression, "compress", None)) and callable(getattr(compression, "decompress", None)):
        return None
    raise ArgumentError(
        f"{argument} is {compression!r}; it must be one of {compressor._front_end}.Compression, such as "
        "Compression.quantize(bits=4) or Compression.none"
    )


def vector_codec_of(compression: Any, argument: str, methods: type[CompressionMethods[Any]]) -> Codec | None:
    """Return the same, or raise ArgumentError for what is no codec of a flat vector."""
    scheme = codec_of(compression, argument, methods)
    if scheme is None or isinstance(scheme, Codec):
        return scheme
    raise ArgumentError(
        f"{argument} is {compression!r}, which codes the matrices of a model, step by step: it is for the compression "
        "of a DistributedOptimizer; here take a codec of flat vectors, such as Compression.eden(bits=4)"
    )
