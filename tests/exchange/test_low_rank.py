"""Low rank between ranks: the bits of the specification, one error on all ranks, no failed round loses anything."""

from __future__ import annotations

import numpy as np
import pytest

from pqasgd_horovod import codecs, native
from pqasgd_horovod.codecs import low_rank
from pqasgd_horovod.exchange import LowRankExchange
from pqasgd_horovod.exchange.carriers.threads import run_ranks
from pqasgd_horovod.exchange.plan import bytes_of_rank
from pqasgd_horovod.keys import derive_shared_key

from .test_errors import one_error
from .world import DIGEST, METHODS, SEED, WrappedCarrier, make_values, outcome, reference_mean, same_everywhere

MATRICES = [[(40, 70), (20, 9)], [(90, 130)]]
SIZES = [40 * 70 + 20 * 9, 90 * 130]
RANK = 3


def build(carrier, **options):
    settings = {"name": "test", "seed": SEED, "digest": DIGEST, **options}
    return LowRankExchange(RANK, carrier, MATRICES, **settings)


class Replica:
    """One rank: its exchange and its residual."""

    def __init__(self, carrier, **options):
        self.exchange = build(carrier, **options)
        self.kept, self.following = (np.zeros(sum(SIZES), np.float32) for _ in range(2))

    def average(self, values, *, step=0, round=0, bases=None, order=(0, 1), timeout=20.0):
        source = native.Source.from_arrays([values], residual=(self.kept, self.following))
        for bucket in order:
            base = None if bases is None else bases[bucket]
            self.exchange.begin(bucket, source, (0, SIZES[0])[bucket], step=step, round=round, base=base)
        means = [np.empty(size, np.float32) for size in SIZES]
        self.exchange.finish(means, timeout)
        self.exchange.commit()
        self.kept, self.following = self.following, self.kept
        return means

    def starts(self):
        return [self.exchange.start(matrix).copy() for matrix in range(3)]


class Specification:
    """All ranks, one after the other, in NumPy."""

    def __init__(self, size, method):
        self.size, self.method = size, method
        self.starts = [
            low_rank.draw(derive_shared_key(SEED, 0, i), RANK, cols)
            for i, (_, cols) in enumerate(matrix for bucket in MATRICES for matrix in bucket)
        ]
        self.residuals = [np.zeros(sum(SIZES), np.float32) for _ in range(size)]

    def _mean(self, factors):
        """The mean over the ranks of the factors of a bucket: of rank, matrix, vector."""
        vectors = [np.concatenate([factor.reshape(-1) for factor in of_rank]) for of_rank in factors]
        (mean,) = reference_mean(self.method, codecs.none(), None, [vectors[0].size], vectors, step=0)
        parts = np.split(mean, np.cumsum([factor.size for factor in factors[0]])[:-1])
        return [part.reshape(RANK, -1) for part in parts]

    def average(self, values):
        values = [value + residual for value, residual in zip(values, self.residuals, strict=True)]
        means, at, first = [], 0, 0
        for shapes in MATRICES:
            cuts = np.cumsum([0, *(rows * cols for rows, cols in shapes)]) + at
            ranks = [
                [value[i:j].reshape(shape) for i, j, shape in zip(cuts, cuts[1:], shapes, strict=False)]
                for value in values
            ]
            starts = self.starts[first : first + len(shapes)]
            left = self._mean(
                [[low_rank.reference_project(m, s) for m, s in zip(own, starts, strict=True)] for own in ranks]
            )
            left = [low_rank.reference_orthogonalize(factor) for factor in left]
            rights = [[low_rank.reference_backproject(m, p) for m, p in zip(own, left, strict=True)] for own in ranks]
            right = self._mean(rights)
            pairs = list(zip(left, right, strict=True))
            means.append(np.concatenate([low_rank.reference_product(p, q).reshape(-1) for p, q in pairs]))
            for rank, own in enumerate(rights):
                product = [low_rank.reference_product(p, q).reshape(-1) for p, q in zip(left, own, strict=True)]
                self.residuals[rank][cuts[0] : cuts[-1]] = values[rank][cuts[0] : cuts[-1]] - np.concatenate(product)
            self.starts[first : first + len(shapes)] = [low_rank.reference_orthogonalize(q) for q in right]
            at, first = cuts[-1], first + len(shapes)
        return means


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("method", METHODS)
def test_every_rank_has_the_bits_of_the_specification(method, size):
    rounds = [make_values(size, SIZES, seed) for seed in range(3)]

    def program(carrier):
        replica = Replica(carrier, method=method)
        results = []
        for step, values in enumerate(rounds):
            # Buckets may be launched in any order, another one on each rank.
            order = (0, 1) if (carrier.rank + step) % 2 else (1, 0)
            means = replica.average(values[carrier.rank], step=step, round=step, order=order)
            results.append((means, replica.kept.copy(), replica.starts()))
        return results

    results = run_ranks(size, program)
    specification = Specification(size, method)
    for step, values in enumerate(rounds):
        expected = specification.average(values)
        means = same_everywhere([result[step][0] for result in results])
        for mean, wanted in zip(means, expected, strict=True):
            assert mean.tobytes() == wanted.tobytes()
        for rank, result in enumerate(results):
            assert result[step][1].tobytes() == specification.residuals[rank].tobytes()
            for start, wanted in zip(result[step][2], specification.starts, strict=True):
                assert start.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("method", METHODS)
def test_a_base_is_added(method):
    values, bases = make_values(2, SIZES), make_values(1, SIZES, seed=5)[0]
    parts = [bases[: SIZES[0]], bases[SIZES[0] :]]
    plain = run_ranks(2, lambda carrier: Replica(carrier, method=method).average(values[carrier.rank]))
    based = run_ranks(2, lambda carrier: Replica(carrier, method=method).average(values[carrier.rank], bases=parts))
    for mean, with_base, base in zip(plain[0], same_everywhere(based), parts, strict=True):
        assert with_base.tobytes() == (base + mean).tobytes()


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_bytes_are_those_of_the_factors(method, size):
    factors = [RANK * (40 + 20), RANK * 90, RANK * (70 + 9), RANK * 130]

    def program(carrier):
        wrapped = WrappedCarrier(carrier)
        replica = Replica(wrapped, method=method)
        replica.average(make_values(size, SIZES)[carrier.rank])
        exchange = replica.exchange
        # An allgather sends its message to each other rank, an alltoall sends it once.
        sent = sum(nbytes * (1 if kind == "alltoall" else size - 1) for kind, _, nbytes, _, _ in wrapped.log)
        assert exchange.bytes_sent == exchange.predicted_bytes_per_round() == sent
        assert len({name for _, name, *_ in wrapped.log}) == len(wrapped.log) == 4 * (1 if method == "allgather" else 2)
        return exchange.bytes_sent, exchange.bytes_received

    for rank, counted in enumerate(run_ranks(size, program)):
        assert counted == bytes_of_rank(method, codecs.none(), None, factors, size, rank)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("position", [0, 3000, 14679])
def test_what_is_not_finite(method, size, bad, position):
    """One error on all ranks; the next round is that of a world in which the failed one never was."""

    def program(carrier):
        replica, values = Replica(carrier, method=method), make_values(size, SIZES)[carrier.rank]
        spoiled = values.copy()
        if carrier.rank == 1:
            spoiled[position] = bad
        error = outcome(lambda: replica.average(spoiled))
        return error, replica.average(values)

    errors, means = zip(*run_ranks(size, program), strict=True)
    bucket = int(position >= SIZES[0])
    assert one_error(errors) == (
        "NonFiniteError",
        f"exchange 'test': rank 1 had NaN, Inf or a number beyond the codec's range in bucket {bucket}. "
        "Nothing was averaged.",
    )
    expected = Specification(size, method).average(make_values(size, SIZES))
    for mean, wanted in zip(same_everywhere(means), expected, strict=True):
        assert mean.tobytes() == wanted.tobytes()


def test_numbers_whose_products_overflow():
    def program(carrier):
        values = np.full(sum(SIZES), 3e38, np.float32)
        return outcome(lambda: Replica(carrier).average(values))

    assert one_error(run_ranks(2, program))[0] == "NonFiniteError"


@pytest.mark.parametrize("method", METHODS)
def test_propagated_nan_is_in_its_bucket_only(method):
    def program(carrier):
        replica, values = Replica(carrier, method=method, nonfinite="propagate"), np.ones(sum(SIZES), np.float32)
        before = replica.starts()
        if carrier.rank == 0:
            values[0] = np.nan
        means = replica.average(values)
        return means, before, replica.starts(), replica.exchange.averaged

    for means, before, after, averaged in run_ranks(2, program):
        assert np.isnan(means[0]).all()
        np.testing.assert_allclose(means[1], 1, rtol=1e-5)
        assert averaged == [1]
        changed = [one.tobytes() != other.tobytes() for one, other in zip(before, after, strict=True)]
        assert changed == [False, False, True]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("different", [{"step": 7}, {"round": 3}])
def test_a_rank_that_is_out_of_step(method, different):
    def program(carrier):
        replica, values = Replica(carrier, method=method), make_values(3, SIZES)[carrier.rank]
        error = outcome(lambda: replica.average(values, **(different if carrier.rank == 1 else {})))
        return error, replica.average(values)

    errors, means = zip(*run_ranks(3, program), strict=True)
    kind, text = one_error(errors)
    assert kind == "DesynchronizedError"
    assert text.startswith("exchange 'test': bucket ")
    assert f"{next(iter(different))} is 0 on ranks 0, 2; {next(iter(different.values()))} on rank 1" in text
    same_everywhere(means)


@pytest.mark.parametrize("name", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
def test_a_message_that_was_damaged(method, name):
    """In either half of a round, on its way from one rank."""

    def program(carrier):
        wrapped = WrappedCarrier(carrier)
        replica, values = Replica(wrapped, method=method), make_values(3, SIZES)[carrier.rank]

        def damage(of: str, payload: np.ndarray) -> np.ndarray:
            payload = payload.copy()
            if of == f"test.{name}.b1.p1" and carrier.rank == 2:
                payload[9] ^= 1
            return payload

        wrapped.change_sent = damage
        error = outcome(lambda: replica.average(values))
        wrapped.change_sent = None
        return error, replica.average(values)

    errors, means = zip(*run_ranks(3, program), strict=True)
    assert one_error(errors)[0] == "WireFormatError"
    expected = Specification(3, method).average(make_values(3, SIZES))
    for mean, wanted in zip(same_everywhere(means), expected, strict=True):
        assert mean.tobytes() == wanted.tobytes()


def test_a_rank_that_does_not_come():
    """It times out and says who is missing; when that rank comes after all, waiting can go on."""
    values = make_values(2, SIZES)

    def program(carrier):
        wrapped = WrappedCarrier(carrier)
        wrapped.gated = True
        replica = Replica(wrapped)
        source = native.Source.from_arrays([values[carrier.rank]], residual=(replica.kept, replica.following))
        for bucket, start in enumerate((0, SIZES[0])):
            replica.exchange.begin(bucket, source, start, step=0, round=0)
        means = [np.empty(size, np.float32) for size in SIZES]
        error = outcome(lambda: replica.exchange.finish(means, timeout=0.05))
        wrapped.gated = False
        replica.exchange.finish(means, timeout=20)
        return error, means

    errors, means = zip(*run_ranks(2, program), strict=True)
    assert {kind for kind, _ in errors} == {"CollectiveTimeoutError"}
    expected = Specification(2, "allgather").average(values)
    for mean, wanted in zip(same_everywhere(means), expected, strict=True):
        assert mean.tobytes() == wanted.tobytes()


def test_a_vector_that_is_lost_is_drawn_anew():
    """Matrices of rank one, then of full rank: what was found to be in no direction starts somewhere else, alike."""

    def program(carrier):
        replica = Replica(carrier)
        replica.average(np.ones(sum(SIZES), np.float32), step=5, round=0)
        lost = replica.starts()
        replica.average(np.zeros(sum(SIZES), np.float32), step=6, round=1)
        values = make_values(2, SIZES)[carrier.rank]
        for step in range(7, 10):
            means = replica.average(values, step=step, round=step)
        return lost, replica.starts(), means

    results = run_ranks(2, program)
    same_everywhere([means for _, _, means in results])
    for lost, starts, means in results:
        for matrix, start in enumerate(lost):
            vectors = start.reshape(RANK, -1)
            redrawn = low_rank.draw(derive_shared_key(SEED, 5, matrix), *vectors.shape)
            np.testing.assert_allclose(np.abs(vectors[0]), vectors.shape[1] ** -0.5, rtol=1e-4)
            assert vectors[1:].tobytes() == redrawn[1:].tobytes()
        for start in starts:
            vectors = start.reshape(RANK, -1).astype(np.float64)
            np.testing.assert_allclose(vectors @ vectors.T, np.eye(RANK), atol=1e-5)
        assert np.linalg.matrix_rank(means[1].reshape(90, 130).astype(np.float64), tol=1e-3) == RANK


def test_one_rank_averages_with_itself():
    def program(carrier):
        replica = Replica(carrier)
        values = make_values(1, SIZES)[0]
        return values, replica.average(values), replica.kept

    ((values, means, rest),) = run_ranks(1, program)
    np.testing.assert_allclose(np.concatenate(means) + rest, values, atol=1e-6)
