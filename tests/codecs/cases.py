"""The codecs and implementations that the contract suite runs on."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from pqasgd_horovod import codecs, native
from pqasgd_horovod.codecs.base import BlockCodec
from pqasgd_horovod.errors import NonFiniteError, WireFormatError

CONFIGURATIONS: dict[str, list[codecs.Codec]] = {
    "none": [codecs.none()],
    "fp16": [codecs.fp16()],
    "bf16": [codecs.bf16()],
    "maxscale": [*(codecs.maxscale(bits=bits) for bits in range(2, 9)), codecs.maxscale(bits=3, block_size=64)],
    "qsgd": [*(codecs.qsgd(bits=bits) for bits in range(2, 9)), codecs.qsgd(bits=5, block_size=8192)],
    "terngrad": [codecs.terngrad(), codecs.terngrad(block_size=192)],
    "eden": [
        *(codecs.eden(bits=bits, rounding=rounding) for rounding in ("nearest", "stochastic") for bits in range(1, 9)),
        codecs.eden(bits=2, block_size=64),
        codecs.eden(bits=3, block_size=8192),
        codecs.eden(bits=7, block_size=128),
    ],
    "natural": [codecs.natural()],
    "signsgd": [
        codecs.signsgd(),
        codecs.signsgd(block_size=192),
        codecs.signsgd(scaled=False),
        codecs.signsgd(block_size=192, majority_vote=True),
    ],
    "onebit": [codecs.onebit(), codecs.onebit(block_size=192)],
    "topk": [
        codecs.topk(),
        codecs.topk(density=0.1, values=codecs.fp16(), block_size=1024),
        codecs.topk(density=0.25, values=codecs.eden(bits=4, block_size=64), block_size=256),
        codecs.topk(density=0.5, values=codecs.maxscale(bits=3, block_size=192), block_size=192),
    ],
    "randomk": [
        codecs.randomk(),
        codecs.randomk(density=0.1, values=codecs.bf16(), block_size=1024),
        codecs.randomk(density=0.05, scaled=True),
        codecs.randomk(density=0.25, values=codecs.maxscale(bits=4, block_size=64), scaled=True, block_size=256),
    ],
    "threshold": [
        codecs.threshold(0.5),
        codecs.threshold(2.0, density=0.1, values=codecs.natural(), block_size=512),
    ],
}
"""For every registered codec the configurations that the suites run; an id that is not here fails a test."""

ALL_CODECS = [codec for configurations in CONFIGURATIONS.values() for codec in configurations]


BLOCK_CODECS = [codec for codec in ALL_CODECS if isinstance(codec, BlockCodec)]
"""Those whose blocks are coded one by one."""


def name(codec: codecs.Codec) -> str:
    """Short name of a configuration, for test ids and file names."""
    parts = (name(value) if isinstance(value, codecs.Codec) else str(value) for value in vars(codec).values())
    return "-".join([codec.id, *parts])


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to run a codec: the NumPy specification, or the native core on one instruction set with some threads."""

    isa: str | None
    threads: int = 1

    def __str__(self) -> str:
        return f"{self.isa}-{self.threads}" if self.isa else "reference"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Put this instruction set and number of threads in force; the caller's settings come back."""
        if self.isa is None:
            yield
            return
        before = native.get_num_threads()
        native.force_isa(self.isa)
        native.set_num_threads(self.threads)
        try:
            yield
        finally:
            native.force_isa(None)
            native.set_num_threads(before)

    def encode(
        self,
        codec: codecs.Codec,
        values: np.ndarray,
        key: int,
        anchor: np.ndarray | None = None,
        shared_key: int = 0,
    ) -> np.ndarray:
        """Encode with this implementation."""
        with self.active():
            return (codec.encode if self.isa else codec.reference_encode)(
                values, key, shared_key=shared_key, anchor=anchor
            )

    def decode_add(
        self,
        codec: codecs.Codec,
        payload: np.ndarray,
        destination: np.ndarray,
        key: int,
        weight: float = 1.0,
        shared_key: int = 0,
    ) -> None:
        """Decode and add with this implementation."""
        with self.active():
            (codec.decode_add if self.isa else codec.reference_decode_add)(
                payload, destination, key, weight, shared_key=shared_key
            )

    def decode(
        self, codec: codecs.Codec, payload: np.ndarray, num_elements: int, key: int, shared_key: int = 0
    ) -> np.ndarray:
        """Decode with this implementation."""
        with self.active():
            return (codec.decode if self.isa else codec.reference_decode)(
                payload, num_elements, key, shared_key=shared_key
            )


REFERENCE = Implementation(None)
NATIVE = [Implementation(isa, threads) for isa in native.available_isas() for threads in (1, 2, 3)]
NATIVE_SINGLE = [implementation for implementation in NATIVE if implementation.threads == 1]


def outcome(call: Callable[..., np.ndarray], *arguments: object) -> bytes | type[Exception]:
    """What a call gives, in a form that implementations must agree on: the bytes of an array, or the type of an error.

    Every NaN counts as the same number: which bits it has is up to the processor.
    """
    try:
        result = call(*arguments)
    except (NonFiniteError, WireFormatError) as error:
        return type(error)
    if result.dtype == np.float32:
        result = np.where(np.isnan(result), np.float32(np.nan), result)
    return result.tobytes()


def decoded(
    implementation: Implementation, codec: codecs.Codec, payload: np.ndarray, size: int, key: int
) -> np.ndarray:
    """Decode with overflow allowed to give Inf or NaN, as a corrupted scale may."""
    with np.errstate(all="ignore"):
        return implementation.decode(codec, payload, size, key)
