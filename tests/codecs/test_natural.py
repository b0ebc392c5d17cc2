"""Natural compression: powers of two, the probabilities of the two neighbours, and the ends of float32's range."""

from __future__ import annotations

import numpy as np
import pytest

from pqasgd_horovod import codecs, keys
from pqasgd_horovod.errors import NonFiniteError, WireFormatError

from .cases import NATIVE_SINGLE, REFERENCE

CODEC = codecs.natural()
every_implementation = pytest.mark.parametrize("implementation", [REFERENCE, *NATIVE_SINGLE], ids=str)


def round_trip(implementation, values: np.ndarray, key: int) -> np.ndarray:
    return implementation.decode(CODEC, implementation.encode(CODEC, values, key), values.size, key)


@every_implementation
def test_bytes_are_signs_then_exponents(implementation):
    values = np.array([1, -1, 0, 2, -0.5, -(2.0**127), 2.0**-126, 1, -4, -0.0], np.float32)
    exponents = [127, 127, 0, 128, 126, 254, 1, 127, 129, 0]
    payload = implementation.encode(CODEC, values, 5)
    assert payload.tolist() == [0b00110010, 0b11, *exponents]
    np.testing.assert_array_equal(implementation.decode(CODEC, payload, values.size, 5), values)


@every_implementation
def test_a_power_of_two_stays_what_it_is(implementation):
    powers = np.exp2(np.arange(-126, 128)).astype(np.float32)
    values = np.concatenate([powers, -powers])
    for key in range(20):
        assert round_trip(implementation, values, key).tobytes() == values.tobytes()


@every_implementation
@pytest.mark.parametrize("exponent", [-126, -10, 0, 40, 126])
def test_each_of_the_two_neighbours_has_its_probability(implementation, exponent):
    fractions = np.array([0, 1e-6, 0.1, 1 / 3, 0.5, 0.9, 1 - 2.0**-23])
    values = np.repeat(np.ldexp(1 + fractions, exponent), 1 << 12).astype(np.float32)
    values[::2] *= -1
    result = np.ldexp(round_trip(implementation, values, 7).astype(np.float64), -exponent)
    np.testing.assert_array_equal(np.signbit(result), np.signbit(values))
    assert set(np.abs(result)) == {1, 2}
    share = (np.abs(result) == 2).reshape(fractions.size, -1).mean(axis=1)
    assert np.abs(share - fractions).max() < 5 * 0.5 / 2**6
    assert share[0] == 0
    assert share[-1] == 1  # less than 2^-17 from the power above


def test_the_probability_is_the_fraction_rounded_to_16_bits(monkeypatch):
    """A number 1 + f goes up for those of the 65536 random numbers r that t + r >= 65536, t = f 2^16 rounded."""
    for fraction, rounded in (
        (0, 0),
        (63, 0),
        (64, 1),
        (191, 1),
        (192, 2),
        (1 << 22, 1 << 15),
        ((1 << 23) - 1, 1 << 16),
    ):
        values = np.full(64, 1 + fraction * 2.0**-23, np.float32)
        for r in {0, (1 << 16) - 1 - rounded, (1 << 16) - rounded, (1 << 16) - 1} & set(range(1 << 16)):
            drawn = np.full((1, 64), r, np.uint32)
            monkeypatch.setattr(keys, "uniform16", lambda key, index, size, drawn=drawn: drawn)
            assert (round_trip(REFERENCE, values, 0) == 2).all() == (r + rounded >= 1 << 16), (fraction, r)


@every_implementation
def test_below_the_smallest_exponent(implementation):
    """Subnormal numbers become 0 or 2^-126, on average what they are."""
    fractions = np.array([2.0**-23, 0.01, 0.25, 0.5, 0.99])
    values = np.repeat(np.ldexp(fractions, -126), 1 << 12).astype(np.float32)
    result = np.ldexp(round_trip(implementation, values, 3).astype(np.float64), 126)
    assert set(result) == {0, 1}
    share = result.reshape(fractions.size, -1).mean(axis=1)
    assert np.abs(share - fractions).max() < 5 * 0.5 / 2**6
    negative = round_trip(implementation, -values, 3)
    np.testing.assert_array_equal(negative, -np.ldexp(result, -126))


@every_implementation
def test_what_could_round_up_to_infinity_is_refused_whatever_the_key(implementation):
    for key in range(20):
        for size in (1, 63, 64, 1030):
            values = np.zeros(size, np.float32)
            values[-1] = -np.nextafter(np.float32(2.0**127), np.float32(np.inf))
            with pytest.raises(NonFiniteError, match=r"the largest magnitude is 1\.70141e"):
                implementation.encode(CODEC, values, key)
            values[-1] = -(2.0**127)
            implementation.encode(CODEC, values, key)


@every_implementation
def test_the_exponent_that_no_encoder_writes(implementation):
    size = 1024 + 77
    payload = CODEC.reference_encode(np.ones(size, np.float32))
    codes = [*range(128, 128 + 1024), *range(payload.size - 77, payload.size)]
    for position in (*codes[::97], codes[1023], codes[-1]):
        wrong = payload.copy()
        wrong[position] = 255
        with pytest.raises(WireFormatError, match=r"code|exponent"):
            implementation.decode(CODEC, wrong, size, 0)
        wrong[position] = 254
        implementation.decode(CODEC, wrong, size, 0)


def test_the_error_is_relative():
    """At most 1/8 for every vector, and 1/8 for a number a third of the way up."""
    rng = np.random.default_rng(0)
    heavy = rng.standard_normal(1 << 16) ** 7 * np.exp2(rng.integers(-40, 60, 1 << 16))
    spike = np.where(np.arange(1 << 16) == 5, 1e30, 1e-30)
    third = np.full(1 << 16, 4 / 3)
    q = []
    for vector in (heavy, spike * 1.3, third):
        values = vector.astype(np.float32)
        errors = np.stack([CODEC.decode(CODEC.encode(values, key), values.size, key) for key in range(30)])
        errors = errors.astype(np.float64) - values
        relative = (errors**2).mean(axis=0) / values.astype(np.float64) ** 2
        q.append(relative.mean())
    assert max(q) < 0.126
    assert q[-1] == pytest.approx(1 / 8, rel=0.01)
