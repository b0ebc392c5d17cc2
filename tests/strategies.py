"""Hypothesis strategies that more than one suite uses."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

from pqasgd_horovod import codecs

# Both sides of a vector register, of the 64 running sums, of both default block sizes; and several blocks.
SIZES = (0, 1, 2, 15, 16, 63, 64, 65, 511, 512, 513, 1023, 1024, 1025, 5000)

_FLOAT32_MAX = float(np.finfo(np.float32).max)


def keys() -> st.SearchStrategy[int]:
    """Any 64-bit key."""
    return st.integers(0, 2**64 - 1)


def sizes(most: int = 2600) -> st.SearchStrategy[int]:
    """Lengths of vectors, the edges of blocks more often than others."""
    return st.sampled_from([size for size in SIZES if size <= most]) | st.integers(0, most)


def all_codecs() -> st.SearchStrategy[codecs.Codec]:
    """Any codec with any allowed configuration."""
    return block_codecs() | sparse_codecs()


def sparse_codecs() -> st.SearchStrategy[codecs.Codec]:
    """Any sparse codec."""
    fields = {
        "density": st.floats(0, 1, exclude_min=True),
        "values": block_codecs().filter(lambda codec: codec.keeps_scale),
        "block_size": st.integers(1, 128).map(lambda n: 64 * n),
    }
    return st.one_of(
        st.builds(codecs.topk, **fields),
        st.builds(codecs.threshold, st.floats(1e-30, 1e30), **fields),
        st.builds(codecs.randomk, scaled=st.booleans(), **fields),
    )


def block_codecs() -> st.SearchStrategy[codecs.Codec]:
    """Any codec that codes block by block."""
    uniform_block = st.integers(1, 128).map(lambda n: 64 * n)
    return st.one_of(
        st.builds(codecs.none),
        st.builds(codecs.fp16),
        st.builds(codecs.bf16),
        st.builds(codecs.maxscale, bits=st.integers(2, 8), block_size=uniform_block),
        st.builds(codecs.qsgd, bits=st.integers(2, 8), block_size=uniform_block),
        st.builds(codecs.terngrad, block_size=uniform_block),
        st.builds(
            codecs.eden,
            bits=st.integers(1, 8),
            block_size=st.sampled_from([64, 128, 256, 512, 1024, 2048, 4096, 8192]),
            rounding=st.sampled_from(["nearest", "stochastic"]),
        ),
        st.builds(codecs.natural),
        st.builds(codecs.onebit, block_size=uniform_block),
        st.builds(codecs.signsgd, block_size=uniform_block, scaled=st.booleans()),
        st.builds(codecs.signsgd, block_size=uniform_block, majority_vote=st.booleans()),
    )


@st.composite
def float32_vectors(draw: st.DrawFn, most: int = 2600) -> np.ndarray:
    """Vectors of finite float32: noise at any scale, subnormal to huge, with a few numbers that Hypothesis chose."""
    size = draw(sizes(most))
    exponent = draw(st.sampled_from([-149, -101, -52, -50, -45, -40, -20, -3, 0, 3, 20, 60, 63, 100, 124]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = np.ldexp(rng.uniform(-1, 1, size), exponent).astype(np.float32)
    if size:
        chosen = draw(st_np.arrays(np.float32, st.integers(0, 8), elements=finite_float32()))
        values[rng.integers(0, size, chosen.size)] = chosen
    return values


def finite_float32() -> st.SearchStrategy[float]:
    """Any finite float32, subnormal and huge ones too."""
    return st.floats(-_FLOAT32_MAX, _FLOAT32_MAX, width=32, allow_subnormal=True)
