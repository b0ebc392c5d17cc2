"""Error feedback: what a payload does not stand for is kept, and which codecs it is fit for."""

from __future__ import annotations

import numpy as np
import pytest

from pqasgd_horovod import codecs
from pqasgd_horovod.codecs.sparse import Sparse
from pqasgd_horovod.errors import ArgumentError, NonFiniteError

from .cases import ALL_CODECS, NATIVE, name

SIZE = 5001
ANCHORS = (None, np.float32, np.float64)


def vectors(dtype: type = np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return values, a residual and an anchor."""
    rng = np.random.default_rng(3)
    return rng.standard_normal(SIZE).astype(dtype), *(rng.standard_normal((2, SIZE)).astype(np.float32) * 0.1)


@pytest.mark.parametrize("codec", ALL_CODECS, ids=name)
@pytest.mark.parametrize("anchor_dtype", ANCHORS, ids=["plain", "anchor32", "anchor64"])
def test_every_implementation_gives_the_bits_of_the_specification(codec, anchor_dtype):
    values, residual, anchor = vectors()
    anchor = None if anchor_dtype is None else anchor.astype(anchor_dtype)
    payload, rest = codec.reference_encode_with_feedback(values, residual, 9, anchor=anchor)
    for implementation in NATIVE:
        with implementation.active():
            native_payload, native_rest = codec.encode_with_feedback(values, residual, 9, anchor=anchor)
        assert native_payload.tobytes() == payload.tobytes(), implementation
        assert native_rest.tobytes() == rest.tobytes(), implementation


@pytest.mark.parametrize("codec", ALL_CODECS, ids=name)
def test_what_is_sent_and_what_is_kept_are_what_there_was(codec):
    """``input + old residual == sent + new residual``: to the last bit of the larger of the numbers that are added."""
    values, residual, _ = vectors()
    payload, rest = codec.encode_with_feedback(values, residual, 9)
    total, sent = values + residual, codec.decode(payload, SIZE, 9)
    np.testing.assert_array_equal(rest, total - sent)
    ulp = np.spacing(np.maximum(np.maximum(abs(sent), abs(rest)), abs(total)))
    assert (abs(sent.astype(np.float64) + rest - total) <= ulp / 2).all()
    if codec.lossless or codec.id in ("fp16", "bf16"):  # sent is within a factor of 2: no rounding at all
        assert (sent + rest).tobytes() == total.tobytes()


def test_the_identity_would_notice_a_residual_that_is_not_added():
    codec = codecs.eden(bits=2)
    values, residual, _ = vectors()
    payload, rest = codec.encode_with_feedback(values, np.zeros_like(residual), 9)
    assert not np.allclose(codec.decode(payload, SIZE, 9) + rest, values + residual, atol=1e-3)


@pytest.mark.parametrize("codec", [codecs.maxscale(bits=4), codecs.none()], ids=name)
def test_what_is_not_finite_is_an_error_as_without_feedback(codec):
    values, residual, _ = vectors()
    residual[100] = np.inf
    for encode in (codec.encode_with_feedback, codec.reference_encode_with_feedback):
        with pytest.raises(NonFiniteError, match="number 100 is inf"):
            encode(values, residual)


def test_arguments_are_checked():
    values, residual, _ = vectors()
    with pytest.raises(ArgumentError, match="residual has 3 elements and values has 5001"):
        codecs.none().encode_with_feedback(values, residual[:3])
    with pytest.raises(ArgumentError, match="residual has dtype float64; it must be float32"):
        codecs.none().encode_with_feedback(values, residual.astype(np.float64))


def hard_vectors(block_size: int) -> dict[str, np.ndarray]:
    """Vectors on which quantizers do badly: a few numbers hold the norm, and the rest lies between levels."""
    rng = np.random.default_rng(4)
    spike = np.zeros(block_size, np.float32)
    spike[7] = 1
    pair = spike.copy()
    pair[8] = 1
    found = {
        "noise": rng.standard_normal(block_size).astype(np.float32),
        "cubed noise": (rng.standard_normal(block_size) ** 3).astype(np.float32),
        "one number": spike,
        "two equal numbers": pair,
        "three equal numbers": np.where(np.arange(block_size) < 3, np.float32(1), np.float32(0)),
        "constant": np.ones(block_size, np.float32),
    }
    for steps in (1, 3, 7, 15, 31, 63, 127):
        between = np.full(block_size, 0.5 / steps, np.float32)
        between[0] = 1
        found[f"half a step of {steps}"] = between
        found[f"half a step of {steps} of the norm"] = np.full(block_size, 0.5 / steps, np.float32)
    return found


def worst_error(codec: codecs.Codec) -> tuple[float, str]:
    """Return the largest (E|Q(v) - v|^2 - c) / |v|^2 over the hard vectors, and which it is; c is 0, or threshold's."""
    constant = codec.block_size * codec.value**2 if codec.id == "threshold" else 0

    def error(vector: np.ndarray) -> float:
        errors = [codec.decode(codec.encode(vector, key), vector.size, key) - vector for key in range(100)]
        return float((np.mean([e @ e for e in errors]) - constant) / (vector @ vector))

    return max((error(vector), what) for what, vector in hard_vectors(codec.block_size).items())


def contraction(codec: codecs.Codec) -> float:
    """Return some of the delta that a contractive codec has."""
    if isinstance(codec, Sparse):
        return contraction(codec.values) * codec.kept(codec.block_size) / codec.block_size
    if codec.lossless:
        return 0.9
    # A sign for each number leaves 1 - 1/d where one of d numbers holds the norm.
    return 0.9 / codec.block_size if codec.bits == 1 else 0.01


@pytest.mark.parametrize("codec", [codec for codec in ALL_CODECS if codec.id != "randomk"], ids=name)
def test_contractive_codecs_contract_whatever_they_are_given(codec):
    error, what = worst_error(codec)
    if codec.contractive:
        assert error < 1 - contraction(codec), what


@pytest.mark.parametrize(
    "codec",
    [
        codecs.maxscale(bits=3),
        codecs.terngrad(),
        codecs.qsgd(bits=3),
        codecs.eden(bits=1),
        codecs.signsgd(scaled=False),
        codecs.topk(density=1.0, values=codecs.qsgd(bits=3), block_size=512),
        codecs.randomk(density=0.5, scaled=True, block_size=512),
    ],
    ids=name,
)
def test_the_others_do_not(codec):
    assert not codec.contractive
    error, what = worst_error(codec)
    assert error > 0.99, what
