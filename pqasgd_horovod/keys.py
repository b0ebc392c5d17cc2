"""Counter-based randomness: the NumPy specification.

No generator has state and no global one is touched: a random number is a function of a 64-bit key and a counter, so
the same bytes come out on every rank, thread, instruction set and framework. The function is Threefry-2x32 (Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011); 13 rounds is the smallest number they found to pass
BigCrush.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

UINT32 = NDArray[np.uint32]

SHARED_RANK = 0xFFFFFF
"""The rank in shared keys: no rank has it."""
KEY_ROUNDS = 20
STREAM_ROUNDS = 13
_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = 0x1BD11BDA
_SIGN_COUNTER = 0x80000000
_WORD_COUNTER = 0x40000000
_MASK32 = 0xFFFFFFFF


class Keys(NamedTuple):
    """The keys of one payload: the sender's own, and one that is the same on every rank and in every phase."""

    own: int
    shared: int = 0


def threefry2x32(key: int, c0: UINT32 | int, c1: UINT32 | int, rounds: int) -> tuple[UINT32, UINT32]:
    """Return the two words Threefry-2x32 makes of the counter ``(c0, c1)`` under a 64-bit key.

    Shapes: ``c0`` and ``c1`` broadcast; the results are uint32 of the broadcast shape.

    >>> [hex(int(word)) for word in threefry2x32(0, 0, 0, 20)]  # known answer of Random123
    ['0x6b200159', '0x99ba4efe']
    """
    k0, k1 = np.uint32(key & _MASK32), np.uint32((key >> 32) & _MASK32)
    schedule = (k0, k1, np.uint32(int(k0) ^ int(k1) ^ _PARITY))
    with np.errstate(over="ignore"):
        x0 = np.asarray(c0, np.uint32) + schedule[0]
        x1 = np.asarray(c1, np.uint32) + schedule[1]
        x0, x1 = np.broadcast_arrays(x0, x1)
        for r in range(rounds):
            rotation = np.uint32(_ROTATIONS[r % 8])
            x0 = x0 + x1
            x1 = ((x1 << rotation) | (x1 >> (np.uint32(32) - rotation))) ^ x0
            if r % 4 == 3:
                injection = r // 4 + 1
                x0 = x0 + schedule[injection % 3]
                x1 = x1 + schedule[(injection + 1) % 3] + np.uint32(injection)
    return x0, x1


def derive_key(seed: int, rank: int, step: int, tensor: int, phase: int) -> int:
    """Return the 64-bit key of one payload; different arguments give independent streams.

    ``a = T(key=seed, counter=step)``, ``key = T(key=a, counter=(tensor, rank | phase << 24))``, T = Threefry-2x32 with
    20 rounds.

    >>> derive_key(0, 0, 0, 0, 0) == derive_key(0, 1, 0, 0, 0)
    False
    """
    a0, a1 = threefry2x32(seed, step & _MASK32, (step >> 32) & _MASK32, KEY_ROUNDS)
    b0, b1 = threefry2x32(int(a0) | int(a1) << 32, tensor & _MASK32, rank | phase << 24, KEY_ROUNDS)
    return int(b0) | int(b1) << 32


def derive_shared_key(seed: int, step: int, tensor: int) -> int:
    """Return the 64-bit key that all ranks share, in both phases of an exchange: of random numbers to be drawn alike.

    >>> derive_shared_key(1, 2, 3) == derive_key(1, SHARED_RANK, 2, 3, phase=0)
    True
    """
    return derive_key(seed, SHARED_RANK, step, tensor, 0)


def uniform16(key: int, block_index: UINT32 | int, num_elements: int) -> UINT32:
    """Return uniform integers in [0, 65536), one per element of a block.

    ``block_index`` may be an array: the result then has its shape with ``num_elements`` appended.
    """
    groups = -(-num_elements // 64)
    blocks = np.asarray(block_index, np.uint32)[..., None, None]
    counter = np.arange(groups * 16, dtype=np.uint32).reshape(groups, 16)
    w0, w1 = threefry2x32(key, counter, blocks, STREAM_ROUNDS)
    low = np.uint32(0xFFFF)
    halves = np.stack([w0 & low, w0 >> np.uint32(16), w1 & low, w1 >> np.uint32(16)], axis=-2)
    return halves.reshape(*halves.shape[:-3], groups * 64)[..., :num_elements]


def random_words(key: int, block_index: UINT32 | int, num_words: int) -> UINT32:
    """Return uniform integers in [0, 2^32), ``num_words`` for each block.

    ``block_index`` may be an array, as in :func:`uniform16`.
    """
    groups = -(-num_words // 32)
    blocks = np.asarray(block_index, np.uint32)[..., None, None]
    counter = np.uint32(_WORD_COUNTER) + np.arange(groups * 16, dtype=np.uint32).reshape(groups, 16)
    words = np.stack(threefry2x32(key, counter, blocks, STREAM_ROUNDS), axis=-2)
    return words.reshape(*words.shape[:-3], groups * 32)[..., :num_words]


def random_signs(key: int, block_index: UINT32 | int, num_elements: int) -> NDArray[np.bool_]:
    """Return random signs, one per element of a block; True stands for minus.

    ``num_elements`` is a multiple of 16. ``block_index`` may be an array, as in :func:`uniform16`.
    """
    vectors = num_elements // 16
    pairs = -(-vectors // 64)
    blocks = np.asarray(block_index, np.uint32)[..., None, None]
    counter = np.uint32(_SIGN_COUNTER) + np.arange(pairs * 16, dtype=np.uint32).reshape(pairs, 16)
    w0, w1 = threefry2x32(key, counter, blocks, STREAM_ROUNDS)
    words = np.stack([w0, w1], axis=-2)[..., None, :]
    bits = (words >> np.arange(32, dtype=np.uint32)[:, None]) & np.uint32(1)
    return bits.astype(bool).reshape(*bits.shape[:-4], pairs * 1024)[..., :num_elements]
