"""NumPy arrays in the place of a framework's tensors, and means by the specification."""

from __future__ import annotations

import numpy as np

from pqasgd_horovod.averaging import ArrayView, ExchangeConfig


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
