"""Rows of a table: bytes and means are those of the specification, and what is wrong is one error on all ranks."""

from __future__ import annotations

import numpy as np
import pytest

from pqasgd_horovod import codecs, native
from pqasgd_horovod.codecs.packing import pack
from pqasgd_horovod.errors import ArgumentError
from pqasgd_horovod.exchange import wire
from pqasgd_horovod.exchange.carriers.threads import run_ranks
from pqasgd_horovod.exchange.rows import Rows, RowsExchange, Table, payload_nbytes, row_bits
from pqasgd_horovod.exchange.verdict import Kind
from pqasgd_horovod.keys import derive_key, derive_shared_key

from .world import CODECS, DIGEST, SEED, WrappedCarrier, same_everywhere

SHAPE = Table(300, 40)
FIT = {name: codec for name, codec in CODECS.items() if codec.exchange_method in (None, "allgather")}
STEP = 7


def make_rows(rank: int, shape: Table = SHAPE) -> Rows:
    """Rows of one rank: none of rank 1, some that others have too."""
    generator = np.random.default_rng([rank, shape.num_rows])
    count = 0 if rank == 1 else min(shape.num_rows, 5 + 3 * rank)
    numbers = np.sort(generator.permutation(min(shape.num_rows, 30))[:count]).astype(np.int64)
    return Rows(numbers, generator.standard_normal((count, shape.row_size)).astype(np.float32))


def build(carrier, codec, shape=SHAPE, digest=DIGEST):
    return RowsExchange(codec, carrier, shape, name="rows", table=3, seed=SEED, digest=digest)


def run(carrier, codec, shape=SHAPE, rows=None, step=STEP, digest=DIGEST):
    exchange = build(carrier, codec, shape, digest)
    exchange.begin(make_rows(carrier.rank, shape) if rows is None else rows, step=step, round=step)
    return *exchange.finish(), exchange.bytes_sent, exchange.bytes_received


def reference_payload(codec, rows: Rows, rank: int, shape: Table) -> np.ndarray:
    numbers = pack(rows.numbers.astype(np.uint32)[None], row_bits(shape.num_rows))[0]
    key, shared = derive_key(SEED, rank, STEP, 3, 0), derive_shared_key(SEED, STEP, 3)
    values = codec.reference_encode(rows.values.reshape(-1), key, shared_key=shared)
    return np.concatenate([numbers, np.frombuffer(values, np.uint8)])


def reference_mean(codec, ranks: list[Rows], shape: Table) -> Rows:
    mean = np.zeros(shape, np.float32)
    for rank, rows in enumerate(ranks):
        key, shared = derive_key(SEED, rank, STEP, 3, 0), derive_shared_key(SEED, STEP, 3)
        payload = codec.reference_encode(rows.values.reshape(-1), key, shared_key=shared)
        decoded = np.zeros(rows.values.size, np.float32)
        codec.reference_decode_add(payload, decoded, key, shared_key=shared, weight=1 / len(ranks))
        mean[rows.numbers] += decoded.reshape(rows.values.shape)
    numbers = np.unique(np.concatenate([rows.numbers for rows in ranks]))
    return Rows(numbers, mean[numbers])


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("name", FIT)
def test_mean_is_the_specification(name, size):
    codec = FIT[name]
    results = run_ranks(size, lambda carrier: run(carrier, codec))
    ranks = [make_rows(rank) for rank in range(size)]
    expected = reference_mean(codec, ranks, SHAPE)
    assert all(problem is None for _, problem, _, _ in results)
    numbers, values = same_everywhere([[mean.numbers, mean.values] for mean, *_ in results])
    np.testing.assert_array_equal(numbers, expected.numbers)
    np.testing.assert_array_equal(values.view(np.uint32), expected.values.view(np.uint32))
    nbytes = [wire.HEADER_NBYTES + payload_nbytes(codec, SHAPE)(rows.values.size) for rows in ranks]
    assert [sent for *_, sent, _ in results] == [(size - 1) * own for own in nbytes]
    assert [received for *_, received in results] == [sum(nbytes) - own for own in nbytes]


@pytest.mark.parametrize("shape", [Table(1, 5), Table(2, 1), Table(70_000, 3)], ids=str)
@pytest.mark.parametrize("name", ["none", "eden4", "topk-eden4"])
def test_a_payload_is_the_specification(name, shape):
    codec, rows = FIT[name], make_rows(0, shape)
    rows = Rows(rows.numbers + (shape.num_rows - 30 if shape.num_rows > 30 else 0), rows.values)
    core = native.Rows(codec.native_spec, *shape, table=3, rank=0, size=2, digest=DIGEST, seed=SEED)
    message = np.zeros(wire.HEADER_NBYTES + core.nbytes(rows.numbers.size), np.uint8)
    source = native.Source.from_arrays([rows.values.reshape(-1)])
    assert core.pack(rows.numbers, source, STEP, STEP, message) == 0
    np.testing.assert_array_equal(message[wire.HEADER_NBYTES :], reference_payload(codec, rows, 0, shape))
    header = wire.unpack(message)
    assert (header.num_elements, header.bucket, header.step) == (rows.values.size, 3, STEP)


def test_what_was_not_sent_is_left():
    """The residual is added, and what the codec drops is written, as for any vector."""
    codec = codecs.topk(density=0.25, block_size=64)
    kept = np.arange(200, dtype=np.float32)
    left = np.full(200, np.nan, np.float32)
    rows = Rows(np.arange(5), np.zeros((5, 40), np.float32))

    def program(carrier):
        exchange = build(carrier, codec)
        exchange.begin(rows, step=STEP, round=STEP, residual=(kept, left))
        return exchange.finish()[0]

    (mean,) = run_ranks(1, program)
    np.testing.assert_array_equal(mean.values.reshape(-1) + left, kept)
    assert 0 < np.count_nonzero(left) < 200


def test_rows_have_to_rise_and_be_there():
    for numbers in ([3, 3], [4, 2], [-1, 2], [5, 300]):
        rows = Rows(np.array(numbers), np.zeros((2, 40), np.float32))
        with pytest.raises(ArgumentError, match="encode: the codec, the range or the memory"):
            run_ranks(1, lambda carrier, rows=rows: run(carrier, codecs.none(), rows=rows))


def test_nan_is_known_to_all():
    def program(carrier):
        rows = make_rows(carrier.rank)
        if carrier.rank == 2:
            rows.values[1, 2] = np.nan
        return run(carrier, CODECS["eden4"], rows=rows)

    results = run_ranks(3, program)
    assert {problem.text for _, problem, _, _ in results} == {
        "rank 2 had NaN, Inf or a number beyond the codec's range in bucket 3"
    }
    union = np.unique(np.concatenate([make_rows(rank).numbers for rank in range(3)]))
    for mean, *_ in results:
        np.testing.assert_array_equal(mean.numbers, union)
        assert np.isnan(mean.values).all()


@pytest.mark.parametrize("difference", ["round", "digest"])
def test_ranks_that_are_out_of_step_are_known_to_all(difference):
    def program(carrier):
        other = carrier.rank == 1
        return run(
            carrier,
            CODECS["eden4"],
            step=STEP + (other and difference == "round"),
            digest=DIGEST + (other and difference == "digest"),
        )

    results = run_ranks(3, program)
    kinds, texts = zip(*[(problem.kind, problem.text) for _, problem, _, _ in results], strict=True)
    assert set(kinds) == {Kind.DESYNCHRONIZED}
    assert len(set(texts)) == 1
    assert f"{difference} is" in texts[0]
    assert all(mean.numbers.size == 0 for mean, *_ in results)


def damage_rows(message: np.ndarray) -> None:
    message[wire.HEADER_NBYTES + 2] ^= 0xFF


def damage_scale(message: np.ndarray) -> None:
    count = make_rows(2).numbers.size
    message[wire.HEADER_NBYTES + -(-count * row_bits(SHAPE.num_rows) // 8) :][:4] = 255


def damage_count(message: np.ndarray) -> None:
    header = wire.unpack(message)
    wire.pack_into(message, header._replace(num_elements=header.num_elements + SHAPE.row_size))


@pytest.mark.parametrize("damage", [damage_rows, damage_scale, damage_count])
def test_a_damaged_message_is_known_to_all(damage):
    class Damaging(WrappedCarrier):
        def allgather(self, name, payload):
            if self.rank == 2:
                damage(payload)
            return self.inner.allgather(name, payload)

    results = run_ranks(3, lambda carrier: run(Damaging(carrier), CODECS["maxscale4"]))
    problems = [problem for _, problem, _, _ in results]
    assert {problem.kind for problem in problems} == {Kind.MALFORMED}
    assert len({problem.text for problem in problems}) == 1
