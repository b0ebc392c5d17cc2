"""What every codec must do: on the specification, and on the native core with every instruction set."""

from __future__ import annotations

import itertools
import json
import math
import pickle

import numpy as np
import pytest

from pqasgd_horovod import codecs, keys, native
from pqasgd_horovod.codecs.lloyd_max import POSITIVE_CENTROIDS
from pqasgd_horovod.codecs.packing import unpack
from pqasgd_horovod.codecs.sparse import Sparse
from pqasgd_horovod.errors import ArgumentError, NonFiniteError

from ..strategies import SIZES
from .cases import ALL_CODECS, CONFIGURATIONS, NATIVE, NATIVE_SINGLE, REFERENCE, name, outcome

KEY = keys.derive_key(seed=1, rank=2, step=3, tensor=4, phase=0)
THREADED_SIZE = 3 * (1 << 18) + 12345  # the native core starts a thread for every 2^18 elements

every_codec = pytest.mark.parametrize("codec", ALL_CODECS, ids=name)
every_implementation = pytest.mark.parametrize("implementation", [REFERENCE, *NATIVE_SINGLE], ids=str)


def numbers(size: int, dtype: type = np.float32) -> np.ndarray:
    """Gaussian numbers at a scale of its own in every block of 512; the third block is zero, one number is large."""
    rng = np.random.default_rng(size)
    scale = np.exp2(rng.integers(-6, 6, size // 512 + 1)).repeat(512)[:size]
    values = rng.standard_normal(size) * scale
    values[1024:1536] = 0
    values[2100:2101] = 3e4
    return values.astype(dtype)


def error_bound(codec: codecs.Codec, block: np.ndarray) -> float:
    """Bound on the norm of the error of one block: of any block, or for plain eden of those that ``numbers`` makes.

    For sparse codecs: of a whole vector.
    """
    norm = np.linalg.norm(block)
    if isinstance(codec, Sparse):
        factor = max(
            float(codec.factor(n)) for n in (min(block.size, codec.block_size), block.size % codec.block_size or 1)
        )
        return factor * (norm + error_bound(codec.values, block))
    if codec.id in ("none", "bf16"):
        return {"none": 0.0, "bf16": 2.0**-8}[codec.id] * norm
    if codec.id == "fp16":
        return 2.0**-11 * norm + 2.0**-25 * np.sqrt(block.size)  # relative, and half of the smallest subnormal
    if codec.id == "natural":
        return norm
    if codec.id in ("signsgd", "onebit"):
        return norm * 1.0001 if codec.keeps_scale else norm + np.sqrt(block.size)
    if codec.id == "eden":
        padded = max(64, 2 ** int(np.ceil(np.log2(block.size))))
        relative = 3.5 / 2**codec.bits if codec.rounding == "nearest" else 2 * np.sqrt(padded) / (2**codec.bits - 1)
        return relative * norm
    scale = norm if codec.id == "qsgd" else np.abs(block).max()
    return np.sqrt(block.size) * scale / (2 ** (codec.bits - 1) - 1) * 1.0001


def test_every_registered_codec_is_tested_and_exported():
    assert set(CONFIGURATIONS) == set(codecs.registry)
    for codec_id, cls in codecs.registry.items():
        assert cls.id == codec_id
        assert getattr(codecs, codec_id) is cls
        assert codec_id in codecs.__all__
        assert CONFIGURATIONS[codec_id]
        assert all(type(codec) is cls for codec in CONFIGURATIONS[codec_id])


def test_an_id_is_registered_once():
    with pytest.raises(ArgumentError, match="'eden' is taken by Eden"):
        codecs.register(type("Another", (codecs.Codec,), {"id": "eden"}))


@every_codec
def test_config_survives_json(codec):
    config = json.loads(json.dumps(codec.config()))
    again = codecs.from_config(config)
    assert again == codec
    assert hash(again) == hash(codec)
    assert again.config() == config
    assert pickle.loads(pickle.dumps(codec)) == codec


def test_different_configurations_are_not_equal():
    assert len(set(ALL_CODECS)) == len(ALL_CODECS)
    assert codecs.maxscale(bits=4) != codecs.qsgd(bits=4)


@every_codec
def test_facts(codec):
    assert codec.lossless == (codec.id == "none")
    assert codec.commutes_with_sum == (codec.id in ("none", "fp16"))
    rounds_at_random = codec.id in ("maxscale", "qsgd", "terngrad", "natural")
    rounds_at_random |= codec.config().get("rounding") == "stochastic"
    rounds_at_random |= codec.id == "randomk" and codec.scaled and codec.values.unbiased
    signs_only = codec.id == "signsgd" and not codec.scaled
    assert codec.unbiased == (codec.id == "none" or rounds_at_random)
    assert codec.keeps_scale == (not signs_only)
    votes = codec.config().get("majority_vote") is True
    assert codec.exchange_method == ("two_phase" if votes else "allgather" if signs_only else None)
    assert codec.contractive or codec.id not in ("none", "fp16", "bf16", "natural", "onebit")
    if isinstance(codec, Sparse):
        assert codec.contractive == (codec.values.contractive and not codec.native_flags)
    assert (codec.shared_selection is not None) == (codec.id == "randomk")
    assert codec.for_means.native_spec == codec.native_spec._replace(
        flags=0 if codec.id == "randomk" else codec.native_flags
    )


@every_codec
def test_payload_size(codec):
    for size in (*SIZES, 100003):
        expected = native.payload_nbytes(codec.native_spec, size)
        assert codec.payload_nbytes(size) == expected
        if size < 10000:
            assert codec.reference_encode(numbers(size), KEY).size == expected
    assert codec.payload_nbytes(0) == 0
    assert codec.payload_bits_per_element(0) == 0
    if isinstance(codec, Sparse):
        return  # tests/codecs/test_sparse.py
    nominal = np.log2(243) / 5 if codec.id == "terngrad" else codec.bits
    scales = 32 * codec.scales_per_block / codec.block_size
    assert nominal + scales <= codec.payload_bits_per_element(1 << 24) <= nominal + scales + 0.05


@every_codec
@every_implementation
def test_round_trip(codec, implementation):
    for size in SIZES:
        values = numbers(size)
        result = implementation.decode(codec, implementation.encode(codec, values, KEY), size, KEY)
        assert result.dtype == np.float32
        assert result.shape == values.shape
        step = (
            max(1, size) if isinstance(codec, Sparse) else codec.block_size
        )  # one block's numbers may be coded with others
        for start in range(0, size, step):
            block = values[start : start + step].astype(np.float64)
            error = np.linalg.norm(result[start : start + step] - block)
            assert error <= error_bound(codec, block), (size, start)


@every_codec
@every_implementation
def test_decode_adds_with_weight(codec, implementation):
    size = 1500
    payload = codec.reference_encode(numbers(size), KEY)
    start = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    start[::7] = -0.0
    destination, expected = start.copy(), start.copy()
    implementation.decode_add(codec, payload, destination, KEY, 1 / 3)
    codec.reference_decode_add(payload, expected, KEY, 1 / 3)
    assert destination.tobytes() == expected.tobytes()
    once = codec.reference_decode(payload, size, KEY)
    np.testing.assert_allclose(destination, start + once / 3, rtol=1e-5, atol=1e-5 * np.abs(once).max())


@every_codec
def test_native_gives_the_bytes_and_floats_of_the_specification(codec):
    for size in (*SIZES, 100003):
        values = numbers(size)
        payload = codec.reference_encode(values, KEY)
        floats = codec.reference_decode(payload, size, KEY)
        for implementation in NATIVE_SINGLE:
            assert implementation.encode(codec, values, KEY).tobytes() == payload.tobytes(), (size, str(implementation))
            assert implementation.decode(codec, payload, size, KEY).tobytes() == floats.tobytes(), (
                size,
                str(implementation),
            )


@pytest.mark.parametrize("codec", [c for cs in CONFIGURATIONS.values() for c in (cs[0], cs[-1])], ids=name)
def test_threads_change_nothing(codec):
    values = numbers(THREADED_SIZE)
    payload = codec.encode(values, KEY)
    floats = codec.decode(payload, values.size, KEY)
    for implementation in NATIVE:
        assert implementation.encode(codec, values, KEY).tobytes() == payload.tobytes(), str(implementation)
        same = implementation.decode(codec, payload, values.size, KEY)
        assert same.tobytes() == floats.tobytes(), str(implementation)


@every_codec
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("anchor_dtype", [None, np.float32, np.float64])
def test_input_dtypes_and_anchors(codec, dtype, anchor_dtype):
    size = 2600
    values = numbers(size, dtype)
    anchor = None if anchor_dtype is None else numbers(size)[::-1].astype(anchor_dtype) * anchor_dtype(1.0001)
    if anchor is None:
        difference = values.astype(np.float32)
    else:
        difference = (values.astype(anchor_dtype) - anchor).astype(np.float32)
    expected = codec.reference_encode(difference, KEY).tobytes()
    for implementation in (REFERENCE, *NATIVE_SINGLE):
        assert implementation.encode(codec, values, KEY, anchor).tobytes() == expected, str(implementation)


@every_codec
@pytest.mark.parametrize("anchor_dtype", [None, np.float32, np.float64])
def test_bfloat16_input(codec, anchor_dtype):
    size = 1500
    words = (numbers(size).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    widened = (words.astype(np.uint32) << np.uint32(16)).view(np.float32)
    anchor = None if anchor_dtype is None else numbers(size)[::-1].astype(anchor_dtype)
    segments = [(words.ctypes.data, native.DTYPE_BF16, size)]
    codes = {np.float32: native.DTYPE_F32, np.float64: native.DTYPE_F64}
    pointer = None if anchor is None else (anchor.ctypes.data, codes[anchor_dtype])
    source = native.Source(segments, pointer, owner=(words, anchor))
    expected = codec.reference_encode(widened, KEY, anchor=anchor)
    for implementation in NATIVE_SINGLE:
        out = np.empty_like(expected)
        with implementation.active():
            assert native.encode(codec.native_spec, source, 0, size, keys.Keys(KEY), out)
        assert out.tobytes() == expected.tobytes(), str(implementation)


@every_codec
@every_implementation
def test_zeros_stay_zeros(codec, implementation):
    for size in (1, 64, 513, 1025):
        for zero in (0.0, -0.0):
            payload = implementation.encode(codec, np.full(size, zero, np.float32), KEY)
            assert payload.tobytes() == codec.reference_encode(np.full(size, zero, np.float32), KEY).tobytes()
            expected = np.full(size, 0 if codec.keeps_scale else 1, np.float32)
            assert implementation.decode(codec, payload, size, KEY).tobytes() == expected.tobytes()


@every_codec
def test_tiny_and_huge_numbers(codec):
    edges = [2.0**-100, 2.0**-50, 2.0**-45, 2.0**-40, 65504.0, 65520.0, 2.0**59, 2.0**64, 2.0**127]
    edges += [3.3895314e38, 3.3961775e38]
    magnitudes = [1e-45, 1e-38, 1e-30, 1e-15, 1e15, 1e18, 1e30, 3.4028235e38]
    for edge in map(np.float32, edges):
        magnitudes += [np.nextafter(edge, np.float32(0)), edge, np.nextafter(edge, np.float32(np.inf))]
    one_number, shape = np.zeros(700, np.float32), np.random.default_rng(5).uniform(-1, 1, 700).astype(np.float32)
    one_number[600] = 1
    shape[3] = 1
    for magnitude in map(np.float32, magnitudes):
        for values in (one_number * magnitude, shape * magnitude):
            expected = outcome(codec.reference_encode, values, KEY)
            for implementation in NATIVE_SINGLE:
                assert outcome(implementation.encode, codec, values, KEY) == expected, (
                    magnitude,
                    str(implementation),
                )
            if isinstance(expected, bytes):
                payload = np.frombuffer(expected, np.uint8)
                floats = codec.reference_decode(payload, values.size, KEY)
                assert np.isfinite(floats).all(), magnitude
                for implementation in NATIVE_SINGLE:
                    with np.errstate(all="ignore"):
                        same = implementation.decode(codec, payload, values.size, KEY)
                    assert same.tobytes() == floats.tobytes(), (magnitude, str(implementation))


@pytest.mark.parametrize(
    ("codec", "largest"),
    [
        (codecs.none(), 0x7F7FFFFF),
        (codecs.fp16(), 0x477FEFFF),  # the number before 65520, halfway from the largest half to the next power of two
        (codecs.bf16(), 0x7F7F7FFF),
        (codecs.maxscale(), 0x7F000000),  # 2^127
        (codecs.terngrad(), 0x7F000000),
        (codecs.qsgd(), 0x5F7FFFFF),  # the number before 2^64: its square is below 2^128
        (codecs.eden(), 0x5CFFFFFF),  # before 2^59: likewise 1024 times its square
        (codecs.natural(), 0x7F000000),
        (codecs.signsgd(), 0x7F7FFFFF),
        (codecs.signsgd(scaled=False), 0x7F7FFFFF),
        (codecs.onebit(), 0x7F7FFFFF),
        (codecs.topk(), 0x7F7FFFFF),
        (codecs.topk(values=codecs.fp16()), 0x477FEFFF),
        (codecs.threshold(1.0, values=codecs.maxscale()), 0x7F000000),
        (codecs.randomk(), 0x7F7FFFFF),
        (codecs.randomk(density=1.0, scaled=True), 0x7E800000),  # 2^126
    ],
    ids=lambda value: name(value) if isinstance(value, codecs.Codec) else hex(value),
)
@every_implementation
def test_range(codec, largest, implementation):
    values = np.zeros(1024, np.float32)
    values.view(np.uint32)[77] = largest
    implementation.encode(codec, values, KEY)
    values.view(np.uint32)[77] = largest + 1
    with pytest.raises(NonFiniteError):
        implementation.encode(codec, values, KEY)


@every_codec
@every_implementation
def test_not_finite_at_any_position_is_refused(codec, implementation):
    size = 1100
    clean = numbers(size)
    for position in (0, 1, 15, 16, 63, 64, 511, 512, 1023, 1024, 1039, 1040, size - 1):
        for bad in (np.nan, np.inf, -np.inf):
            values = clean.copy()
            values[position] = bad
            with pytest.raises(NonFiniteError, match=rf"number {position} is {bad}"):
                implementation.encode(codec, values, KEY)


@every_codec
@every_implementation
def test_not_finite_anchor_and_float64_beyond_float32_are_refused(codec, implementation):
    anchor = numbers(600)
    anchor[599] = np.nan
    with pytest.raises(NonFiniteError, match="number 599"):
        implementation.encode(codec, numbers(600), KEY, anchor)
    values = numbers(600, np.float64)
    values[3] = 1e39
    with pytest.raises(NonFiniteError, match="number 3 is 1e"):
        implementation.encode(codec, values, KEY)


@every_codec
@every_implementation
def test_key_decides_the_bytes(codec, implementation):
    values = numbers(900)
    first = implementation.encode(codec, values, KEY).tobytes()
    assert implementation.encode(codec, values, KEY).tobytes() == first
    coded = codec.values if isinstance(codec, Sparse) else codec
    depends_on_key = coded.id not in ("none", "fp16", "bf16", "signsgd", "onebit")
    for other in (KEY ^ 1, KEY ^ 1 << 63, keys.derive_key(1, 3, 3, 4, 0)):
        assert (implementation.encode(codec, values, other).tobytes() != first) == depends_on_key


@every_codec
@every_implementation
def test_the_shared_key_decides_what_is_drawn_alike(codec, implementation):
    values = numbers(900)
    payloads = {implementation.encode(codec, values, KEY, shared_key=shared).tobytes() for shared in (0, 1, 1 << 63)}
    assert len(payloads) == (3 if codec.id == "randomk" else 1)


@every_codec
@every_implementation
def test_a_prefix_of_blocks_does_not_depend_on_the_rest(codec, implementation):
    blocks = 1
    if isinstance(codec, Sparse):  # so many that what is kept of them is whole blocks of the codec that codes it
        kept = codec.kept(codec.block_size)
        blocks = math.lcm(kept, codec.values.block_size) // kept if codec.values.scales_per_block else 1
    values = numbers(3 * blocks * codec.block_size)
    cut = 2 * blocks * codec.block_size
    whole = implementation.decode(codec, implementation.encode(codec, values, KEY), values.size, KEY)
    part = implementation.decode(codec, implementation.encode(codec, values[:cut].copy(), KEY), cut, KEY)
    assert whole[:cut].tobytes() == part.tobytes()


def test_out_is_written_and_returned():
    codec = codecs.maxscale()
    values = numbers(700)
    out = np.empty(codec.payload_nbytes(700), np.uint8)
    assert codec.encode(values, KEY, out=out) is out
    assert out.tobytes() == codec.reference_encode(values, KEY).tobytes()


def test_inputs_are_left_alone():
    for codec in ALL_CODECS:
        values, anchor = numbers(700), numbers(700)[::-1].copy()
        for implementation in (REFERENCE, *NATIVE_SINGLE):
            payload = implementation.encode(codec, values, KEY, anchor)
            before = payload.copy()
            implementation.decode(codec, payload, 700, KEY)
            assert payload.tobytes() == before.tobytes()
        assert values.tobytes() == numbers(700).tobytes()
        assert anchor.tobytes() == numbers(700)[::-1].tobytes()


def test_none_keeps_every_float32():
    words = np.random.default_rng(1).integers(0, 2**32, 4096, dtype=np.uint32)
    values = words.view(np.float32)
    values = values[np.isfinite(values) & (values != 0)]
    codec = codecs.none()
    for implementation in (REFERENCE, *NATIVE_SINGLE):
        payload = implementation.encode(codec, values, KEY)
        assert implementation.decode(codec, payload, values.size, KEY).tobytes() == values.tobytes()


@every_implementation
def test_every_half_survives_fp16(implementation):
    halves = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    halves = halves[(halves & 0x7C00) != 0x7C00]
    values = halves.view(np.float16).astype(np.float32)
    payload = implementation.encode(codecs.fp16(), values, 0)
    assert payload.tobytes() == halves.tobytes()
    np.testing.assert_array_equal(implementation.decode(codecs.fp16(), payload, values.size, 0), values)


@every_implementation
@pytest.mark.parametrize("codec", [codecs.fp16(), codecs.bf16()], ids=name)
def test_casts_round_halfway_cases_to_even(codec, implementation):
    step = 2.0 ** -{"fp16": 10, "bf16": 7}[codec.id]
    last = 2.0**-23
    values = np.array(
        [1 + step / 2, 1 + 1.5 * step, -1 - step / 2, 1 + step / 2 + last, 1 + step / 2 - last], np.float32
    )
    result = implementation.decode(codec, implementation.encode(codec, values, 0), values.size, 0)
    assert result.tolist() == [1, 1 + 2 * step, -1, 1 + step, 1]


@pytest.mark.parametrize("bits", range(2, 9))
def test_eden_rounds_a_tie_up(bits):
    """A rotated number that is exactly at a threshold goes to the upper centroid."""
    codec = codecs.eden(bits=bits, block_size=64)
    centroids = np.array(POSITIVE_CENTROIDS[bits - 1], np.float32)
    thresholds = (centroids[:-1] + centroids[1:]) * np.float32(0.5)
    number = int(np.searchsorted(thresholds, 0.99)) - 1
    t = thresholds[number]
    # Two numbers a and b become 32 rotated numbers of magnitude a - b and 32 of a + b, so that sigma^2 = a^2 + b^2.
    # Look for ties near the b where a - b = t sigma.
    near = (1 - t * np.sqrt(2 - np.float64(t) ** 2)) / (1 - np.float64(t) ** 2)
    ties = 0
    for a, ulps in itertools.product(np.linspace(1, 1.9, 10, dtype=np.float32), range(-40, 40)):
        b = np.float32(a * near + ulps * 2.0**-25)
        low, high = a - b, a + b
        sigma = np.sqrt(np.float32(32) * (low * low + high * high) / np.float32(64))
        if low != t * sigma:
            continue
        ties += 1
        values = np.zeros(64, np.float32)
        values[[0, 9]] = a, b
        payload = codec.reference_encode(values, KEY)
        magnitudes = unpack(payload[None, 4:], bits, 64)[0] & np.uint32(2 ** (bits - 1) - 1)
        assert magnitudes.min() == number + 1, (a, b)
        for implementation in NATIVE_SINGLE:
            assert implementation.encode(codec, values, KEY).tobytes() == payload.tobytes(), str(implementation)
    assert ties
