"""NumPy arrays in the place of a framework's tensors."""

from __future__ import annotations

import numpy as np

from pqasgd_horovod import native
from pqasgd_horovod.averaging import ExchangeConfig
from pqasgd_horovod.errors import ArgumentError

DTYPES = {
    np.dtype(np.float32): native.DTYPE_F32,
    np.dtype(np.float64): native.DTYPE_F64,
    np.dtype(np.float16): native.DTYPE_F16,
}


class ArrayView:
    """An array as an averager sees it; assign ``array`` to move it."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name = name
        self.array = array
        self.dtype = DTYPES[array.dtype]
        self.numel = array.size
        self.description = f"{array.dtype} {array.shape}"

    def pointer(self) -> int:
        if f"{self.array.dtype} {self.array.shape}" != self.description:
            raise ArgumentError(f"{self.name} was {self.description} and is another array now")
        return self.array.ctypes.data


def make_views(shapes: dict[str, tuple[int, str]], seed: int) -> list[ArrayView]:
    """Return arrays of ``(size, dtype)`` by name, filled from ``seed``."""
    generator = np.random.default_rng(seed)
    return [ArrayView(name, generator.standard_normal(size).astype(dtype)) for name, (size, dtype) in shapes.items()]


def decoded_mean(
    values: list[np.ndarray], anchor: np.ndarray | None, config: ExchangeConfig, keys: list[int]
) -> np.ndarray:
    """Return the mean that the allgather exchange has to bring for one bucket, by the NumPy specification."""
    mean = np.zeros(values[0].size, np.float32)
    for array, key in zip(values, keys, strict=True):
        payload = config.codec.reference_encode(array, key, anchor=anchor)
        config.codec.reference_decode_add(payload, mean, key, weight=1.0 / len(values))
    return mean
