"""Codecs as Horovod compressors."""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as horovod
from horovod.tensorflow.compression import Compressor

from .. import codecs, compression
from ..codecs.base import Codec, Scheme
from ..compression import CompressionMethods


class CodecCompressor(compression.CodecCompressor, Compressor):
    """A codec in the place of a Horovod compressor; equal and hashable by its configuration.

    A codec that commutes with a sum works in stock Horovod too. Any other raises ArgumentError there, at the first
    gradient, since Horovod would add up codes: give it to :func:`pqasgd_horovod.tensorflow.DistributedOptimizer` or
    :func:`pqasgd_horovod.tensorflow.compressed_allreduce`.

    >>> import pqasgd_horovod.tensorflow as hvd
    >>> hvd.Compression.quantize(bits=2) == hvd.Compression.eden(bits=2)
    True
    """

    _horovod = horovod.Compression
    _front_end = "pqasgd_horovod.tensorflow"


class Compression(CompressionMethods[CodecCompressor], horovod.Compression):
    """What bytes stand for the numbers on the wire: pass one as ``compression=``.

    Attributes:
        none: float32 as it is.
        fp16: half precision; commutes with a sum, so period 1 is Horovod's own fp16 allreduce.
        bf16: bfloat16: half the bytes of float32, with its range.

    >>> import pqasgd_horovod.tensorflow as hvd
    >>> hvd.Compression.quantize(bits=4)
    Compression.eden(bits=4, block_size=1024, rounding='nearest')
    """

    _compressor = CodecCompressor

    none = CodecCompressor(codecs.none())
    fp16 = CodecCompressor(codecs.fp16())
    bf16 = CodecCompressor(codecs.bf16())


def codec_of(value: Any, argument: str = "compression") -> Scheme | None:
    """Return the codec of a ``compression=``; see :func:`pqasgd_horovod.compression.codec_of`."""
    return compression.codec_of(value, argument, Compression)


def vector_codec_of(value: Any, argument: str = "compression") -> Codec | None:
    """Return that of a flat vector; see :func:`pqasgd_horovod.compression.vector_codec_of`."""
    return compression.vector_codec_of(value, argument, Compression)
