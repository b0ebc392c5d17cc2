"""Sparse codecs: which numbers are kept, exactly, how their positions travel, and what a corrupted payload gets."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pqasgd_horovod import codecs, keys
from pqasgd_horovod.codecs.positions import low_bits, pack_positions, positions_nbytes, unpack_positions
from pqasgd_horovod.codecs.sparse import Sparse, drawn
from pqasgd_horovod.errors import ArgumentError, NonFiniteError, WireFormatError

from .cases import ALL_CODECS, NATIVE_SINGLE, REFERENCE, name, outcome
from .test_properties import quick

KEY, SHARED_KEY = 99, 77
SPARSE = [codec for codec in ALL_CODECS if isinstance(codec, Sparse)]
every_sparse_codec = pytest.mark.parametrize("codec", SPARSE, ids=name)
every_implementation = pytest.mark.parametrize("implementation", [REFERENCE, *NATIVE_SINGLE], ids=str)
IMPLEMENTATIONS = [REFERENCE, *NATIVE_SINGLE]


def hard_blocks(size: int) -> dict[str, np.ndarray]:
    """Vectors that a selection may stumble over: ties, zeros of both signs, neighbours, columns, few magnitudes."""
    rng = np.random.default_rng(size)
    noise = rng.standard_normal(size)
    index = np.arange(size)
    return {
        "noise": noise,
        "rounded": np.round(noise),
        "zeros": np.where(noise < 0, -0.0, 0.0),
        "few": np.where(rng.random(size) < 0.003, noise, np.where(noise < 0, -0.0, 0.0)),
        "constant": np.full(size, -2.5),
        "two magnitudes": np.where(rng.random(size) < 0.5, 1.0, -1.0000001),
        "a row": noise + np.where(index // 200 == 3, 100.0, 0.0),
        "a column": noise + np.where(index % 64 == 5, 100.0, 0.0),
        "rising": index + 1.0,
        "falling": size - index,
        "subnormal": noise * 1e-42,
        "any magnitude": noise * np.exp2(rng.integers(-120, 120, size)),
    }


def positions_by_sorting(values: np.ndarray, kept: int) -> list[int]:
    """The specification said once more, number by number: largest first, then the first of equals."""
    ranking = sorted(range(values.size), key=lambda i: (-abs(float(values[i])), i))
    return sorted(ranking[:kept])


@pytest.mark.parametrize("codec", ALL_CODECS, ids=name)
def test_what_selects_leaves_the_others_as_they_are(codec):
    """The fact that momentum factor masking relies on; and of a codec that selects nothing more cannot be asked for."""
    values = np.random.default_rng(5).standard_normal(4999).astype(np.float32)
    _, rest = codec.reference_encode_with_feedback(values, np.zeros_like(values), KEY, shared_key=SHARED_KEY)
    untouched, more = int(np.count_nonzero(rest == values)), codec.at_least(0.5)
    if codec.selects:
        assert untouched >= values.size - codec.num_kept(values.size)
        assert more == dataclasses.replace(codec, density=max(0.5, codec.density))
    else:
        assert more is codec
        assert untouched < values.size / 2 or codec.id in ("terngrad", "qsgd", "maxscale")  # zero is one of few levels


@pytest.mark.parametrize("density", [1e-5, 0.001, 0.01, 0.1, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("size", [1, 5, 64, 100, 1000, 8192])
def test_the_largest_are_kept_of_equal_ones_the_first(density, size):
    codec = codecs.topk(density=density)
    kept = codec.kept(size)
    for what, values in hard_blocks(size).items():
        values = values.astype(np.float32)
        expected = np.zeros(size, np.float32)
        where = positions_by_sorting(values, kept)
        expected[where] += values[where]
        for implementation in IMPLEMENTATIONS:
            payload = implementation.encode(codec, values, KEY)
            assert implementation.decode(codec, payload, size, KEY).tobytes() == expected.tobytes(), (
                what,
                str(implementation),
            )
            sent = payload[: 4 * kept].view("<f4")
            assert sent.tobytes() == values[where].tobytes(), (what, str(implementation))


@every_implementation
def test_each_block_has_its_own(implementation):
    codec = codecs.topk(density=0.1, block_size=64)
    values = np.random.default_rng(0).standard_normal(64 * 5 + 20).astype(np.float32)
    values[64:128] *= 1000
    decoded = implementation.decode(codec, implementation.encode(codec, values, KEY), values.size, KEY)
    assert [np.count_nonzero(decoded[start : start + 64]) for start in range(0, values.size, 64)] == [6] * 5 + [2]


def test_how_many_are_kept():
    codec = codecs.topk(density=0.25)
    assert [codec.kept(size) for size in (1, 2, 3, 4, 5, 6, 10, 8192)] == [1, 1, 1, 1, 1, 2, 3, 2048]
    assert codecs.topk(density=2.0**-30).kept(8192) == 1
    assert codecs.topk(density=1.0).kept(8191) == 8191
    assert codec.num_kept(0) == 0
    assert codec.num_kept(3 * 8192 + 10) == 3 * 2048 + 3


# ---- threshold ----


@every_implementation
def test_what_is_below_the_threshold_is_zero(implementation):
    codec = codecs.threshold(1.5, density=0.25, block_size=64)
    values = np.full(64, 0.1, np.float32)
    values[[3, 9, 40, 41]] = 1.5, -2.0, np.nextafter(np.float32(1.5), np.float32(0)), -1.5
    expected = np.where(np.abs(values) >= 1.5, values, np.float32(0))
    payload = implementation.encode(codec, values, KEY)
    assert implementation.decode(codec, payload, 64, KEY).tobytes() == expected.tobytes()
    assert payload.size == codec.payload_nbytes(64) == codecs.topk(density=0.25, block_size=64).payload_nbytes(64)


@every_implementation
def test_no_more_than_k_reach_the_threshold(implementation):
    values = np.random.default_rng(1).standard_normal(640).astype(np.float32)
    few, all_of_them = codecs.threshold(1e-30, density=0.1, block_size=64), codecs.topk(density=0.1, block_size=64)
    payload = implementation.encode(few, values, KEY)
    assert payload.tobytes() == implementation.encode(all_of_them, values, KEY).tobytes()


def test_with_feedback_the_residual_of_threshold_stays_bounded():
    """Not a contraction, but up to a constant; the control is a codec that is neither."""

    def largest_residual(codec: codecs.Codec) -> float:
        residual = np.zeros(4096, np.float32)
        for step in range(200):
            values = np.random.default_rng(step).standard_normal(4096).astype(np.float32) * 0.1
            _, residual = codec.encode_with_feedback(values, residual, step, shared_key=step)
        return float(np.abs(residual).max())

    assert largest_residual(codecs.threshold(0.5, density=0.2)) < 0.5
    assert largest_residual(codecs.randomk(density=0.1, scaled=True)) > 1e3


# ---- random k ----


@pytest.mark.parametrize(("elements", "kept"), [(64, 1), (64, 64), (64, 63), (100, 33), (1, 1), (7, 2), (8192, 82)])
def test_drawn_positions_rise_and_are_distinct(elements, kept):
    where = drawn(elements, kept, SHARED_KEY, np.arange(50, dtype=np.uint32))
    assert where.shape == (50, kept)
    assert where.min() >= 0
    assert where.max() < elements
    assert (np.diff(where, axis=-1) > 0).all()


@pytest.mark.parametrize(("elements", "kept"), [(64, 5), (64, 40), (100, 33), (7, 2), (192, 192)])
def test_every_position_is_drawn_equally_often(elements, kept, monkeypatch):
    """Exactly: over all turns, for any draw inside the cells, each position comes ``kept`` times."""
    turns = -(
        -(np.arange(elements, dtype=np.uint64) << np.uint64(32)) // np.uint64(elements)
    )  # of 0, 1, .., elements - 1
    cells = np.random.default_rng(0).integers(0, 2**32, kept, dtype=np.uint64)
    words = np.concatenate([turns[:, None], np.broadcast_to(cells, (elements, kept))], axis=1)
    monkeypatch.setattr(keys, "random_words", lambda key, index, count: words)
    counts = np.bincount(drawn(elements, kept, 0, np.arange(elements, dtype=np.uint32)).ravel(), minlength=elements)
    assert counts.tolist() == [kept] * elements


def test_every_position_is_drawn_equally_often_by_real_keys():
    elements, kept, blocks = 100, 33, 40000
    where = drawn(elements, kept, SHARED_KEY, np.arange(blocks, dtype=np.uint32))
    counts = np.bincount(where.ravel(), minlength=elements)
    p = kept / elements
    assert np.abs((counts - blocks * p) / np.sqrt(blocks * p * (1 - p))).max() < 5


def test_ranks_draw_alike_and_blocks_and_keys_differ():
    codec = codecs.randomk(density=0.1, block_size=64)
    values = np.ones(64 * 40, np.float32)

    def support(key: int, shared_key: int) -> np.ndarray:
        payload = codec.encode(values, key, shared_key=shared_key)
        return codec.decode(payload, values.size, key, shared_key=shared_key) != 0

    assert (support(1, 5) == support(2, 5)).all()
    assert (support(1, 5) != support(1, 6)).any()
    assert len({block.tobytes() for block in support(1, 5).reshape(40, 64)}) > 30


@every_implementation
@pytest.mark.parametrize("scaled", [False, True])
def test_random_numbers_are_sent_as_they_are_or_times_n_over_k(scaled, implementation):
    codec = codecs.randomk(density=0.3, scaled=scaled, block_size=64)
    values = np.random.default_rng(2).standard_normal(64 * 3 + 10).astype(np.float32)
    payload = implementation.encode(codec, values, KEY, shared_key=SHARED_KEY)
    assert payload.size == 4 * (3 * 19 + 3)
    decoded = implementation.decode(codec, payload, values.size, KEY, SHARED_KEY)
    own = codec.own_part(values, SHARED_KEY)
    assert decoded.tobytes() == (own + np.float32(0)).tobytes()
    kept = np.flatnonzero(decoded)
    assert kept.size == 3 * 19 + 3
    factor = np.where(kept < 192, np.float32(64) / np.float32(19), np.float32(10) / np.float32(3))
    np.testing.assert_array_equal(decoded[kept], values[kept] * (factor if scaled else np.float32(1)))


def test_what_does_not_leave_room_for_the_factor_is_out_of_range():
    codec = codecs.randomk(density=0.5, scaled=True, block_size=64)
    for implementation in IMPLEMENTATIONS:
        implementation.encode(codec, np.full(64, 2.0**125, np.float32), KEY)
        with pytest.raises(NonFiniteError, match="the largest magnitude is"):
            implementation.encode(codec, np.full(64, 2.0**125 * 1.001, np.float32), KEY)


def test_the_owner_s_numbers_that_are_not_finite_stay_so():
    codec = codecs.randomk(density=0.1, block_size=64)
    values = np.ones(64, np.float32)
    values[5], values[6] = np.inf, np.nan
    assert np.isnan(codec.own_part(values, SHARED_KEY)[[5, 6]]).all()


# ---- positions ----


@quick
@given(elements=st.integers(1, 8192), seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1))
def test_positions_survive_in_the_fewest_bytes(elements, seed, share):
    kept = max(1, round(share**3 * elements))
    rng = np.random.default_rng(seed)
    positions = np.sort(np.stack([rng.permutation(elements)[:kept] for _ in range(2)]), axis=-1)
    packed = pack_positions(positions, elements)
    assert packed.shape == (2, positions_nbytes(elements, kept))
    np.testing.assert_array_equal(unpack_positions(packed, elements, kept), positions)
    every_way = [kept * (low + 1) + (elements - 1 >> low) for low in range(1, 20)] + [elements]
    assert packed.shape[1] == -(-min(every_way) // 8)


@quick
@given(
    size=st.integers(1, 2000), seed=st.integers(0, 2**32 - 1), density=st.sampled_from([0.001, 0.01, 0.05, 0.2, 0.5])
)
def test_every_implementation_writes_and_reads_any_positions(size, seed, density):
    codec = codecs.topk(density=density, block_size=1024)
    rng = np.random.default_rng(seed)
    values, expected = np.zeros(size, np.float32), []
    for start in range(0, size, 1024):
        elements = min(1024, size - start)
        where = np.sort(rng.permutation(elements)[: codec.kept(elements)])
        values[start + where] = rng.uniform(1, 2, where.size)
        expected.append(pack_positions(where[None], elements).tobytes())
    for implementation in NATIVE_SINGLE:
        payload = implementation.encode(codec, values, KEY)
        assert payload[4 * codec.num_kept(size) :].tobytes() == b"".join(expected)
        assert implementation.decode(codec, payload, size, KEY).tobytes() == values.tobytes()


def test_positions_cost_what_is_documented():
    elements = 1 << 20
    for density, bits in ((0.01, 8.6), (0.1, 5.3)):
        codec = codecs.topk(density=density)
        positions = codec.payload_nbytes(elements) - codec.values.payload_nbytes(codec.num_kept(elements))
        assert round(8 * positions / codec.num_kept(elements), 1) == bits
    assert round(codecs.topk().payload_bits_per_element(elements), 2) == 0.41
    assert round(codecs.topk(values=codecs.eden(bits=4)).payload_bits_per_element(elements), 2) == 0.13
    assert round(codecs.randomk().payload_bits_per_element(elements), 2) == 0.32


def test_the_error_is_what_is_documented():
    values = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)
    codec = codecs.topk()
    error = codec.decode(codec.encode(values), values.size) - values
    assert round(float(error @ error / (values @ values)), 2) == 0.92


# ---- corrupted payloads ----


def topk_payload(codec: codecs.Codec, size: int) -> np.ndarray:
    return codec.reference_encode(np.random.default_rng(3).standard_normal(size).astype(np.float32), KEY)


@pytest.mark.parametrize(
    ("density", "size"),
    [(0.05, 200), (0.05, 100), (0.5, 192), (0.3, 128), (0.01, 128)],
    ids=["elias-fano", "short", "bitmap", "one low bit", "one number"],
)
def test_every_flipped_bit_of_the_positions_gets_the_same_verdict(density, size):
    """A flip of a low bit may be another set of positions; one that is refused leaves nothing out of bounds."""
    codec = codecs.topk(density=density, block_size=128)
    payload = topk_payload(codec, size)
    verdicts = []
    for bit in range(8 * 4 * codec.num_kept(size), 8 * payload.size):
        wrong = payload.copy()
        wrong[bit // 8] ^= 1 << bit % 8
        expected = outcome(REFERENCE.decode, codec, wrong, size, KEY)
        verdicts.append(expected)
        for implementation in NATIVE_SINGLE:
            assert outcome(implementation.decode, codec, wrong, size, KEY) == expected, (bit, str(implementation))
    assert WireFormatError in verdicts
    if low_bits(128, codec.kept(128)) == 0:
        assert verdicts.count(WireFormatError) == len(verdicts)  # no flip leaves the number of ones as it is


@every_implementation
def test_positions_that_do_not_rise_or_are_too_many(implementation):
    codec = codecs.topk(density=0.05, block_size=128)  # 6 of 128: four low bits each, then 6 + 7 bits
    kept, size = codec.kept(128), 128
    assert low_bits(128, kept) == 4
    payload = topk_payload(codec, size)
    good = np.array([[3, 5, 17, 40, 41, 127]])

    def decode(field_bits: list[int]) -> np.ndarray:
        wrong = payload.copy()
        wrong[4 * kept :] = np.packbits(np.array(field_bits, np.uint8), bitorder="little")
        return implementation.decode(codec, wrong, size, KEY)

    bits = np.unpackbits(pack_positions(good, 128)[0], bitorder="little").tolist()
    np.testing.assert_array_equal(np.flatnonzero(decode(bits)), good[0])
    equal, falling, fewer, more, padding = (list(bits) for _ in range(5))
    equal[4:8] = bits[0:4]  # 3 3
    falling[0:4], falling[4:8] = bits[4:8], bits[0:4]  # 5 3
    first_one = 24 + bits[24:].index(1)
    fewer[first_one] = 0
    more[24 + bits[24:].index(0)] = 1
    padding[-1], padding[first_one] = 1, 0  # as many ones, the last of which is beyond the block
    for wrong in (equal, falling, fewer, more, padding):
        with pytest.raises(WireFormatError, match=r"position|code"):
            decode(wrong)


@every_sparse_codec
def test_random_positions_get_the_same_verdict(codec):
    rng = np.random.default_rng(4)
    size = 2 * codec.block_size + 30
    clean = codec.reference_encode(rng.standard_normal(size).astype(np.float32), KEY)
    at = codec.values.payload_nbytes(codec.num_kept(size))
    for trial in range(30):
        payload = clean.copy()
        if at < payload.size:
            where = at + rng.integers(0, payload.size - at, 1 + trial % 3)
            payload[where] = rng.integers(0, 256, where.size)
        expected = outcome(REFERENCE.decode, codec, payload, size, KEY)
        for implementation in NATIVE_SINGLE:
            assert outcome(implementation.decode, codec, payload, size, KEY) == expected, str(implementation)


# ---- made of other codecs ----


def test_chain():
    assert codecs.chain(codecs.topk(0.1), codecs.eden(bits=4)) == codecs.topk(0.1, codecs.eden(bits=4))
    assert codecs.chain(codecs.randomk(scaled=True), codecs.fp16()).scaled
    with pytest.raises(ArgumentError, match=r"sparsifier is Eden\(.*must be topk, threshold or randomk"):
        codecs.chain(codecs.eden(), codecs.topk())
    with pytest.raises(ArgumentError, match=r"sparsifier is TopK\(.*nothing else for values yet"):
        codecs.chain(codecs.topk(values=codecs.fp16()), codecs.eden())
    with pytest.raises(ArgumentError, match="values is TopK"):
        codecs.chain(codecs.randomk(), codecs.topk())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: codecs.topk(density=0), "density is 0; it must be a number above 0, at most 1"),
        (lambda: codecs.topk(density=1.1), r"density is 1\.1"),
        (lambda: codecs.topk(density=float("nan")), "density is nan"),
        (lambda: codecs.randomk(density=True), "density is True"),
        (lambda: codecs.threshold(1.0, density="1 %"), "density is '1 %'"),
        (lambda: codecs.topk(block_size=100), "block_size is 100; it must be a multiple of 64 from 64 to 8192"),
        (lambda: codecs.topk(block_size=16384), "block_size is 16384"),
        (lambda: codecs.topk(values=codecs.topk()), r"values is TopK\(.*it must be the codec of the numbers"),
        (lambda: codecs.topk(values=codecs.signsgd(scaled=False)), r"values is SignSgd\("),
        (lambda: codecs.topk(values="fp16"), "values is 'fp16'"),
        (lambda: codecs.randomk(scaled=1), "scaled is 1; it must be True or False"),
        (lambda: codecs.threshold(0), "value is 0; it must be a float32 number above 0"),
        (lambda: codecs.threshold(-1.0), r"value is -1\.0"),
        (lambda: codecs.threshold(1e39), r"value is 1e\+39"),
        (lambda: codecs.threshold(1e-50), "value is 1e-50"),
        (lambda: codecs.threshold("1"), "value is '1'"),
        (lambda: codecs.from_config({"id": "topk", "values": {"bits": 4}}), r"config\['id'\] is None"),
        (lambda: codecs.from_config({"id": "topk", "values": {"id": "topk"}}), "values is TopK"),
    ],
)
def test_arguments(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_shared_keys_are_checked():
    values, payload = np.zeros(4, np.float32), codecs.randomk().encode(np.zeros(4, np.float32))
    for call in (codecs.randomk().encode, codecs.randomk().reference_encode):
        with pytest.raises(ArgumentError, match="shared_key is -1"):
            call(values, shared_key=-1)
    with pytest.raises(ArgumentError, match="shared_key is 18446744073709551616"):
        codecs.randomk().decode(payload, 4, shared_key=2**64)


def test_density_of_any_number_type():
    assert codecs.topk(density=np.float32(0.5)) == codecs.topk(density=0.5)
    assert type(dataclasses.asdict(codecs.topk(density=1))["density"]) is float
