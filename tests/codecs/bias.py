"""Is a codec unbiased?  Two z-scores, pooled over draws and blocks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Decoder = Callable[[np.ndarray, int], np.ndarray]
"""Encode and decode a vector with a key."""


def z_scores(run: Decoder, values: np.ndarray, *, draws: int, block: int, first_key: int = 1) -> tuple[float, float]:
    """Return the z-scores of the mean error and of the mean of error x sign(value), over ``draws`` keys.

    The second sees what is symmetric about zero: shrinkage, and rounding that prefers zero. The errors within a block
    may depend on each other (a rotation mixes them), so that one sample is the sum over a block; blocks and draws are
    independent. Rounding of float32 arithmetic is not random: half a unit of the last place is added to the spread, so
    that it is not taken for bias where a codec happens to have no noise.
    """
    signs = np.sign(values)
    unit = 2.0**-24 * np.abs(values).astype(np.float64).sum() / (values.size // block)
    sums: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for key in range(first_key, first_key + draws):
        error = run(values, key).astype(np.float64) - values
        for samples, weighted in zip(sums, (error, error * signs), strict=True):
            samples.append(weighted.reshape(-1, block).sum(axis=1))
    scores = []
    for samples in sums:
        pooled = np.concatenate(samples)
        scores.append(float(pooled.mean() / np.hypot(pooled.std() / np.sqrt(pooled.size), unit)))
    return scores[0], scores[1]


def is_biased(run: Decoder, values: np.ndarray, *, draws: int, block: int) -> bool:
    """True if either score is beyond 5; by chance that happens once in a million runs."""
    return max(map(abs, z_scores(run, values, draws=draws, block=block))) > 5
