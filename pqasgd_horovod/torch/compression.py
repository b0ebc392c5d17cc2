"""Codecs as Horovod compressors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import horovod.torch as horovod
import torch
from horovod.torch.compression import Compressor

from .. import codecs
from ..codecs.base import Codec
from ..errors import ArgumentError


class CodecCompressor(Compressor):
    """A codec in the place of a Horovod compressor; equal and hashable by its configuration.

    A codec that commutes with a sum works in stock Horovod too. Any other raises ArgumentError there, at the first
    gradient, since Horovod would add up codes: give it to :func:`pqasgd_horovod.torch.DistributedOptimizer` or
    :func:`pqasgd_horovod.torch.compressed_allreduce`.

    >>> import pqasgd_horovod.torch as hvd
    >>> hvd.Compression.quantize(bits=2) == hvd.Compression.eden(bits=2)
    True
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Return what Horovod's allreduce adds up, and what :meth:`decompress` needs to know."""
        if not self.codec.commutes_with_sum:
            raise ArgumentError(
                f"compression={self!r} does not commute with a sum, so Horovod's own allreduce cannot use it: wrap the "
                "optimizer with "
                "pqasgd_horovod.torch.DistributedOptimizer(optimizer, ..., compression=...), or call "
                "pqasgd_horovod.torch.compressed_allreduce"
            )
        result: tuple[torch.Tensor, Any] = self._stock.compress(tensor)
        return result

    def decompress(self, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """Return the tensor in its own type again."""
        result: torch.Tensor = self._stock.decompress(tensor, ctx)
        return result

    @property
    def _stock(self) -> Any:
        return horovod.Compression.fp16 if self.codec.id == "fp16" else horovod.Compression.none

    def config(self) -> dict[str, Any]:
        """Return the codec's configuration as a dict that JSON can hold."""
        return self.codec.config()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CodecCompressor:
        """Return the compressor that ``config`` describes.

        >>> import pqasgd_horovod.torch as hvd
        >>> compression = hvd.Compression.maxscale(bits=4)
        >>> compression.from_config(compression.config()) == compression
        True
        """
        return cls(codecs.from_config(config))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CodecCompressor) and self.codec == other.codec

    def __hash__(self) -> int:
        return hash((CodecCompressor, self.codec))

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.config().items() if key != "id")
        return f"Compression.{self.codec.id}({arguments})" if arguments else f"Compression.{self.codec.id}"


class Compression(horovod.Compression):
    """What bytes stand for the numbers on the wire: pass one as ``compression=``.

    Attributes:
        none: float32 as it is.
        fp16: half precision; commutes with a sum, so period 1 is Horovod's own fp16 allreduce.
        bf16: bfloat16: half the bytes of float32, with its range.

    >>> import pqasgd_horovod.torch as hvd
    >>> hvd.Compression.quantize(bits=4)
    Compression.eden(bits=4, block_size=1024, rounding='nearest')
    """

    none = CodecCompressor(codecs.none())
    fp16 = CodecCompressor(codecs.fp16())
    bf16 = CodecCompressor(codecs.bf16())

    @staticmethod
    def quantize(bits: int = 4) -> CodecCompressor:
        """Return the quantizer with the least noise at 1 to 8 bits; see :func:`pqasgd_horovod.codecs.quantize`."""
        return CodecCompressor(codecs.quantize(bits))

    @staticmethod
    def maxscale(bits: int = 4, block_size: int = 512) -> CodecCompressor:
        """Stochastic uniform quantizer scaled by the largest magnitude of each block; see ``codecs.maxscale``."""
        return CodecCompressor(codecs.maxscale(bits=bits, block_size=block_size))

    @staticmethod
    def qsgd(bits: int = 4, block_size: int = 512) -> CodecCompressor:
        """Stochastic uniform quantizer scaled by the L2 norm of each block (QSGD); see ``codecs.qsgd``."""
        return CodecCompressor(codecs.qsgd(bits=bits, block_size=block_size))

    @staticmethod
    def terngrad(block_size: int = 512) -> CodecCompressor:
        """Three levels, five numbers to a byte; see ``codecs.terngrad``."""
        return CodecCompressor(codecs.terngrad(block_size=block_size))

    @staticmethod
    def eden(
        bits: int = 4, block_size: int = 1024, rounding: Literal["nearest", "stochastic"] = "nearest"
    ) -> CodecCompressor:
        """Randomly rotated blocks on the Lloyd-Max levels of the normal law; see ``codecs.eden``."""
        return CodecCompressor(codecs.eden(bits=bits, block_size=block_size, rounding=rounding))


def codec_of(compression: Any, argument: str = "compression") -> Codec | None:
    """Return the codec that a ``compression=`` stands for; None for a compressor of the user's own.

    Horovod's ``Compression.none`` and ``fp16`` and a bare codec are understood. Raises ArgumentError for what is no
    compressor at all.
    """
    if isinstance(compression, CodecCompressor):
        return compression.codec
    if isinstance(compression, Codec):
        return compression
    if compression is horovod.Compression.none:
        return codecs.none()
    if compression is horovod.Compression.fp16:
        return codecs.fp16()
    if callable(getattr(compression, "compress", None)) and callable(getattr(compression, "decompress", None)):
        return None
    raise ArgumentError(
        f"{argument} is {compression!r}; it must be one of pqasgd_horovod.torch.Compression, such as "
        "Compression.quantize(bits=4) or Compression.none"
    )
