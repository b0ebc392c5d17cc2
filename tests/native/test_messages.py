"""The core's messages are those of the specification: keys of keys.py, headers of exchange/wire.py."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pqasgd_horovod import codecs, keys, native
from pqasgd_horovod.errors import ArgumentError, WireFormatError
from pqasgd_horovod.exchange import wire

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
CODEC = codecs.maxscale(bits=4, block_size=64)
NUM_ELEMENTS, SIZE = 200, 3
SHARDS = [0, 128, 192, 200]
VALUES = np.random.default_rng(1).standard_normal(NUM_ELEMENTS).astype(np.float32)
STEP, ROUND, DIGEST, SEED, BUCKET = 2**40 + 3, 17, 2**64 - 5, 2**63 + 11, 7


def make_bucket(rank: int, shards: list[int] | None = None) -> native.Bucket:
    spec = CODEC.native_spec
    return native.Bucket(
        spec, spec, bucket=BUCKET, num_elements=NUM_ELEMENTS, rank=rank, size=SIZE, digest=DIGEST, seed=SEED,
        shards=shards,
    )  # fmt: skip


def header(rank: int, payload_nbytes: int, flags: int = 0, phase: int = 0) -> wire.Header:
    return wire.Header(flags, DIGEST, ROUND, STEP, BUCKET, rank, payload_nbytes, NUM_ELEMENTS, phase)


def message(rank: int, payload: np.ndarray, **fields: int) -> np.ndarray:
    buffer = np.concatenate([np.zeros(wire.HEADER_NBYTES, np.uint8), payload])
    wire.pack_into(buffer, header(rank, payload.size, **fields))
    return buffer


@given(U64, st.integers(0, 2**24 - 1), U64, U32, st.integers(0, 255))
def test_keys(seed, rank, step, tensor, phase):
    assert native.derive_key(seed, rank, step, tensor, phase) == keys.derive_key(seed, rank, step, tensor, phase)


@pytest.mark.parametrize("rank", range(SIZE))
def test_allgather_message(rank):
    packed = np.zeros(wire.HEADER_NBYTES + CODEC.payload_nbytes(NUM_ELEMENTS), np.uint8)
    flags = make_bucket(rank).pack(native.Source.from_arrays([VALUES]), 0, STEP, ROUND, packed)
    key = keys.derive_key(SEED, rank, STEP, BUCKET, 0)
    assert flags == 0
    assert packed.tobytes() == message(rank, CODEC.reference_encode(VALUES, key)).tobytes()


@pytest.mark.parametrize("rank", range(SIZE))
def test_two_phase_messages(rank):
    source = native.Source.from_arrays([VALUES])
    want = []
    for owner in range(SIZE):
        if owner != rank:
            key = keys.derive_key(SEED, rank, STEP, BUCKET * SIZE + owner, 0)
            payload = CODEC.reference_encode(VALUES[SHARDS[owner] : SHARDS[owner + 1]], key)
            want.append(message(rank, payload))
    packed = np.zeros(sum(part.size for part in want), np.uint8)
    assert make_bucket(rank, SHARDS).pack(source, 0, STEP, ROUND, packed) == 0
    assert packed.tobytes() == np.concatenate(want).tobytes()


def test_numbers_that_are_not_finite_are_flagged_in_the_header():
    values = VALUES.copy()
    values[150] = np.inf  # in the shard of rank 1
    source = native.Source.from_arrays([values])
    for rank, expected in ((0, wire.FLAG_NON_FINITE), (1, 0), (2, wire.FLAG_NON_FINITE)):
        nbytes = [CODEC.payload_nbytes(SHARDS[r + 1] - SHARDS[r]) for r in range(SIZE) if r != rank]
        packed = np.zeros(sum(nbytes) + 2 * wire.HEADER_NBYTES, np.uint8)
        assert make_bucket(rank, SHARDS).pack(source, 0, STEP, ROUND, packed) == expected
        second = nbytes[0] + wire.HEADER_NBYTES
        assert [wire.unpack(packed[at:]).flags for at in (0, second)] == [expected] * 2


def received_by_all() -> np.ndarray:
    parts = []
    for rank in range(SIZE):
        key = keys.derive_key(SEED, rank, STEP, BUCKET, 0)
        parts.append(message(rank, CODEC.reference_encode(VALUES * (rank + 1), key)))
    return np.concatenate(parts)


def test_the_mean_is_added_to_the_base():
    received = received_by_all()
    base = np.arange(NUM_ELEMENTS, dtype=np.float32)
    mean, sum_ = np.empty(NUM_ELEMENTS, np.float32), np.zeros(NUM_ELEMENTS, np.float32)
    assert make_bucket(1).land(received, STEP, ROUND, base, mean) == 0
    for rank, part in enumerate(received.reshape(SIZE, -1)):
        key = keys.derive_key(SEED, rank, STEP, BUCKET, 0)
        CODEC.reference_decode_add(part[wire.HEADER_NBYTES :], sum_, key, 1.0 / SIZE)
    np.testing.assert_array_equal(mean, base + sum_)


FIELDS = {"digest": 8, "round": 16, "step": 24, "bucket": 32, "num_elements": 48, "phase": 56}


@pytest.mark.parametrize("field", FIELDS)
def test_another_value_in_a_header_is_a_rank_out_of_step(field):
    received = received_by_all()
    part = received.reshape(SIZE, -1)[2]
    wire.pack_into(part, wire.unpack(part)._replace(**{field: 1}))
    mean = np.zeros(NUM_ELEMENTS, np.float32)
    assert make_bucket(0).land(received, STEP, ROUND, None, mean) == wire.FLAG_DESYNCHRONIZED
    assert np.isnan(mean).all()


@pytest.mark.parametrize("bit", range(8 * wire.HEADER_NBYTES))
def test_every_flipped_bit_of_a_header_is_found(bit):
    received = received_by_all()
    received.reshape(SIZE, -1)[1, bit // 8] ^= 1 << bit % 8
    mean = np.zeros(NUM_ELEMENTS, np.float32)
    assert make_bucket(0).land(received, STEP, ROUND, None, mean) == wire.FLAG_MALFORMED
    assert np.isnan(mean).all()


@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 65, 300])
def test_too_few_or_too_many_bytes(nbytes):
    received = received_by_all()
    mean = np.zeros(NUM_ELEMENTS, np.float32)
    for data in (received[:nbytes], np.concatenate([received, received[:1]])):
        assert make_bucket(0).land(data, STEP, ROUND, None, mean) == wire.FLAG_MALFORMED


def test_a_code_that_no_encoder_writes_is_told_apart():
    received = received_by_all()
    received.reshape(SIZE, -1)[1, -1] = 0xFF
    mean = np.zeros(NUM_ELEMENTS, np.float32)
    flags = make_bucket(0).land(received, STEP, ROUND, None, mean)
    assert flags & wire.ALL_FLAGS == wire.FLAG_MALFORMED
    with pytest.raises(WireFormatError, match="a code that no encoder writes"):
        native.check_status(-(flags >> 8), "decode")


@pytest.mark.parametrize("shards", [[0, 128, 192, 199], [1, 128, 192, 200], [0, 192, 128, 200]])
def test_shards_that_do_not_cover_the_bucket_are_refused(shards):
    with pytest.raises(ArgumentError):
        make_bucket(0, shards).land(np.zeros(0, np.uint8), STEP, ROUND, None, np.zeros(NUM_ELEMENTS, np.float32))
