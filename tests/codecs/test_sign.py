"""The sign codecs: which bit a number gets, what the bits stand for, and what they lose."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings

from pqasgd_horovod import codecs
from pqasgd_horovod.errors import NonFiniteError

from ..strategies import float32_vectors
from .cases import NATIVE_SINGLE, REFERENCE, name

CODECS = [codecs.signsgd(), codecs.signsgd(scaled=False), codecs.signsgd(majority_vote=True), codecs.onebit()]
every_implementation = pytest.mark.parametrize("implementation", [REFERENCE, *NATIVE_SINGLE], ids=str)
quick = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)


def exact_means(block: np.ndarray) -> tuple[float, float]:
    """Mean magnitude of the numbers at and above zero, and of those below, 0 where there are none; in float64."""
    above, below = block[block >= 0], block[block < 0]
    return above.mean() if above.size else 0.0, -below.mean() if below.size else 0.0


@every_implementation
@pytest.mark.parametrize("codec", CODECS, ids=name)
def test_bits(codec, implementation):
    """1 below zero only: the zeros count as +, -0.0 too; the first number has the lowest bit."""
    values = np.array([-1, 1, 0.0, -0.0, -1e-45, 1e-45, -3e38, 2, -1], np.float32)
    payload = implementation.encode(codec, values, 0)
    assert payload[4 * codec.scales_per_block :].tolist() == [0b01010001, 0b1]


@every_implementation
def test_signs_alone_are_plus_and_minus_one(implementation):
    values = np.array([-1e-45, 1e-45, 0.0, -0.0, 3e38, -3e38, 3e38], np.float32)
    for codec in CODECS[1:3]:
        payload = implementation.encode(codec, values, 0)
        assert payload.size == 1
        assert implementation.decode(codec, payload, 7, 0).tolist() == [-1, 1, 1, 1, 1, -1, 1]


def test_a_vote_is_a_sign_without_scale():
    votes = codecs.signsgd(majority_vote=True)
    assert not votes.scaled
    assert votes != codecs.signsgd(scaled=False)
    assert votes == codecs.signsgd(scaled=False, majority_vote=True) == codecs.from_config(votes.config())
    assert codecs.signsgd().scaled


@quick
@given(values=float32_vectors())
def test_signsgd_sends_the_mean_magnitude_and_the_error_is_what_it_leaves(values):
    codec = codecs.signsgd(block_size=192)
    try:
        decoded = codec.reference_decode(codec.reference_encode(values), values.size)
    except NonFiniteError:
        assume(False)
    for start in range(0, values.size, 192):
        block, got = values[start : start + 192].astype(np.float64), decoded[start : start + 192]
        mean = np.abs(block).mean()
        np.testing.assert_allclose(got, np.where(block < 0, -mean, mean), rtol=1e-5, atol=1e-44)
        norm2 = np.square(block).sum()
        left = norm2 - np.abs(block).sum() ** 2 / block.size
        assert np.square(got - block).sum() == pytest.approx(left, abs=1e-5 * norm2 + 1e-87)


@every_implementation
@pytest.mark.parametrize("sign", [1, -1])
def test_onebit_of_one_sign_only(implementation, sign):
    """The side without numbers has the scale 0."""
    values = np.float32(sign) * np.arange(1, 101, dtype=np.float32)
    payload = implementation.encode(codecs.onebit(), values, 0)
    assert payload[:8].view("<f4").tolist() == ([50.5, 0] if sign > 0 else [0, 50.5])
    assert (implementation.decode(codecs.onebit(), payload, 100, 0) == sign * 50.5).all()


@quick
@given(values=float32_vectors())
def test_onebit_sends_the_means_and_the_error_is_what_they_leave(values):
    codec = codecs.onebit(block_size=192)
    try:
        decoded = codec.reference_decode(codec.reference_encode(values), values.size)
    except NonFiniteError:
        assume(False)
    for start in range(0, values.size, 192):
        block, got = values[start : start + 192].astype(np.float64), decoded[start : start + 192]
        above, below = exact_means(block)
        wanted = np.where(block < 0, -below, above)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-44)
        # The means are the projection on what two numbers can say; a rounding below the smallest number aside.
        left = np.square(block).sum() - np.square(wanted).sum()
        assert np.square(got - block).sum() == pytest.approx(left, abs=1e-5 * np.square(block).sum() + 1e-87)


@every_implementation
@pytest.mark.parametrize("codec", [codecs.signsgd(), codecs.onebit()], ids=name)
def test_sums_beyond_float32_are_refused(codec, implementation):
    values = np.zeros(1024, np.float32)
    for pair in ([3e38, 3e38], [-3e38, -3e38], [3e38, -3e38]):
        values[:2] = pair
        if codec.id == "onebit" and sum(pair) == 0:
            implementation.encode(codec, values, 0)
            continue
        with pytest.raises(NonFiniteError, match=r"the largest magnitude is 3e\+38, so that codes or sums overflow"):
            implementation.encode(codec, values, 0)
