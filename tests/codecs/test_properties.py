"""Properties of any codec on any input, with Hypothesis choosing both."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pqasgd_horovod import codecs, native
from pqasgd_horovod.codecs.base import BlockCodec
from pqasgd_horovod.errors import NonFiniteError
from pqasgd_horovod.keys import Keys

from ..strategies import all_codecs, float32_vectors, keys, sizes
from .cases import NATIVE_SINGLE, REFERENCE, decoded, name, outcome

# The same examples in every run: what fails here must fail again on the next machine.
quick = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@quick
@given(codec=all_codecs(), values=float32_vectors(), key=keys(), weight=st.floats(-4, 4, width=32))
def test_native_agrees_with_the_specification(codec, values, key, weight):
    expected = outcome(codec.reference_encode, values, key)
    for implementation in NATIVE_SINGLE:
        assert outcome(implementation.encode, codec, values, key) == expected
    if expected is NonFiniteError:
        return
    payload = np.frombuffer(expected, np.uint8)
    destinations = [np.linspace(-1, 1, values.size, dtype=np.float32) for _ in range(1 + len(NATIVE_SINGLE))]
    with np.errstate(all="ignore"):
        for implementation, destination in zip([REFERENCE, *NATIVE_SINGLE], destinations, strict=True):
            implementation.decode_add(codec, payload, destination, key, weight)
    for destination in destinations[1:]:
        assert outcome(np.asarray, destination) == outcome(np.asarray, destinations[0])


@quick
@given(codec=all_codecs(), size=sizes(), key=keys(), seed=st.integers(0, 2**32 - 1))
def test_any_bytes_get_the_same_verdict(codec, size, key, seed):
    payload = np.random.default_rng(seed).integers(0, 256, codec.payload_nbytes(size)).astype(np.uint8)
    if isinstance(codec, BlockCodec) and seed % 2:  # let the codes be looked at
        payload[: 4 * codec.scales_per_block * -(-size // codec.block_size)].view("<f4")[:] = 1.5
    expected = outcome(decoded, REFERENCE, codec, payload, size, key)
    for implementation in NATIVE_SINGLE:
        assert outcome(decoded, implementation, codec, payload, size, key) == expected


@quick
@given(codec=all_codecs(), values=float32_vectors(), key=keys(), cuts=st.lists(st.integers(0, 2600), max_size=5))
def test_segments_are_one_vector(codec, values, key, cuts):
    expected = outcome(codec.reference_encode, values, key)
    assume(isinstance(expected, bytes))
    segments = [segment.copy() for segment in np.split(values, sorted(min(cut, values.size) for cut in cuts))]
    source = native.Source.from_arrays(segments)
    out = np.empty(len(expected), np.uint8)
    assert native.encode(codec.native_spec, source, 0, values.size, Keys(key), out)
    assert out.tobytes() == expected


@quick
@given(
    codec=all_codecs(),
    values=float32_vectors(),
    key=keys(),
    position=st.integers(0, 2599),
    bad=st.sampled_from([np.nan, np.inf, -np.inf]),
)
def test_not_finite_is_refused(codec, values, key, position, bad):
    assume(values.size)
    values[position % values.size] = bad
    for implementation in (REFERENCE, *NATIVE_SINGLE):
        assert outcome(implementation.encode, codec, values, key) is NonFiniteError


@quick
@given(codec=all_codecs())
def test_config_round_trip(codec):
    assert codecs.from_config(json.loads(json.dumps(codec.config()))) == codec
    assert name(codec)


@quick
@given(codec=all_codecs(), size=st.integers(0, 1 << 32))
def test_payload_size_is_that_of_the_native_core(codec, size):
    assert codec.payload_nbytes(size) == native.payload_nbytes(codec.native_spec, size)


@quick
@given(
    codec=all_codecs().filter(lambda codec: codec.id in ("maxscale", "qsgd", "terngrad")),
    values=float32_vectors(),
    key=keys(),
)
def test_stochastic_rounding_goes_to_a_neighbouring_level(codec, values, key):
    expected = outcome(codec.reference_encode, values, key)
    assume(isinstance(expected, bytes))
    payload = np.frombuffer(expected, np.uint8)
    blocks = -(-values.size // codec.block_size)
    steps = payload[: 4 * blocks].view("<f4").astype(np.float64) / (2 ** (codec.bits - 1) - 1)
    error = np.abs(codec.reference_decode(payload, values.size, key).astype(np.float64) - values)
    step = steps.repeat(codec.block_size)[: values.size]
    # One level, and what float32 leaves of it; a block that counts as zero has a norm below 2^-50.
    assert (error <= np.where(step > 0, step * (1 + 2.0**-14), 2.0**-50)).all()
