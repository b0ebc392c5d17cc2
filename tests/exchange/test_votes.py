"""signSGD with majority vote: every rank gets the sign of the sum of all ranks' signs, and ties are +."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pqasgd_horovod import codecs
from pqasgd_horovod.averaging import ExchangeConfig
from pqasgd_horovod.errors import ArgumentError, NonFiniteError
from pqasgd_horovod.exchange.carriers.threads import run_ranks
from pqasgd_horovod.exchange.plan import check_method

from .world import build, outcome, run_round, same_everywhere

BUCKETS = (1, 200, 2500)
VOTES = codecs.signsgd(block_size=64, majority_vote=True)
SIGNS = codecs.signsgd(block_size=64, scaled=False)
FP16 = codecs.fp16()
SCALED = codecs.signsgd(block_size=64)


def heavy_values(size: int) -> list[np.ndarray]:
    """Numbers of all magnitudes, so that whoever adds one and not its sign decides alone; and zeros of both signs."""
    generator = np.random.default_rng(size)
    vectors = generator.standard_normal((size, sum(BUCKETS))) * np.exp2(generator.integers(-60, 60, (size, 1)))
    vectors[:, ::7] = np.where(generator.random((size, vectors[0, ::7].size)) < 0.5, 0.0, -0.0)
    return list(vectors.astype(np.float32))


def mean_of(size: int, codec: codecs.Codec, **options: object) -> np.ndarray:
    """Return the mean that all ranks get of ``heavy_values``."""
    values = heavy_values(size)

    def program(carrier):
        return run_round(build(carrier, codec, BUCKETS, **options), values[carrier.rank], step=3)

    return np.concatenate(same_everywhere(run_ranks(size, program)))


def sum_of_signs(size: int) -> np.ndarray:
    return np.where(np.stack(heavy_values(size)) < 0, -1, 1).sum(axis=0)


# 6, 10, 12 and 14: their inverses are not exact, so that a sum of n times 1/n or -1/n may miss 0.
@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16])
def test_the_mean_is_the_sign_of_the_sum_of_the_signs(size):
    votes = sum_of_signs(size)
    assert (votes == 0).any() == (size % 2 == 0)
    np.testing.assert_array_equal(mean_of(size, VOTES), np.where(votes < 0, np.float32(-1), np.float32(1)))


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_without_votes_it_is_the_mean_of_the_signs(size):
    """Where a quarter of the ranks has another sign the mean is half; with fp16 in phase two it is so in two phases."""
    wanted = (sum_of_signs(size) / size).astype(np.float32)
    np.testing.assert_array_equal(mean_of(size, SIGNS), wanted)
    np.testing.assert_array_equal(mean_of(size, SIGNS, method="two_phase", second_codec=FP16), wanted)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 150, 2600])
@pytest.mark.parametrize("second", [None, FP16], ids=["vote", "mean"])
def test_what_is_not_finite_is_no_sign_wherever_it_is_and_whoever_owns_it(bad, position, second):
    codec = VOTES if second is None else SIGNS

    def program(carrier, policy):
        values = heavy_values(3)[carrier.rank]
        exchange = build(carrier, codec, BUCKETS, nonfinite=policy, method="two_phase", second_codec=second)
        if carrier.rank == 1:
            values[position] = bad
        if policy == "propagate":
            return [bool(np.isnan(mean).all()) for mean in run_round(exchange, values)]
        return outcome(lambda: run_round(exchange, values))

    errors = run_ranks(3, lambda carrier: program(carrier, "raise"))
    assert len(set(errors)) == 1
    assert errors[0][0] == NonFiniteError.__name__
    assert "rank 1 had NaN, Inf" in errors[0][1]
    starts = np.cumsum([0, *BUCKETS])
    inside = [bool(start <= position < stop) for start, stop in itertools.pairwise(starts)]
    assert run_ranks(3, lambda carrier: program(carrier, "propagate")) == [inside] * 3


NOT_FIT = [
    (VOTES, None, "allgather", "which is for 'two_phase': the owner of a shard counts the votes"),
    (VOTES, VOTES, "allgather", "which is for 'two_phase'"),
    (SIGNS, None, "two_phase", "which is for 'allgather': it cannot code the mean .* except as a vote"),
    (VOTES, FP16, "auto", "is not fit to be one of two codecs"),
    (VOTES, SIGNS, "two_phase", "is not fit to be one of two codecs"),
    (SIGNS, VOTES, "two_phase", "is not fit to be one of two codecs"),
    (SCALED, SIGNS, "auto", "cannot code the mean of what it decodes to, except as a vote"),
    (FP16, VOTES, "two_phase", "counts the votes, and sends the result as a vote"),
]
FIT = [
    (VOTES, None, "auto"),
    (VOTES, VOTES, "two_phase"),
    (SIGNS, None, "allgather"),
    (SIGNS, SIGNS, "auto"),
    (SIGNS, FP16, "two_phase"),
    (SIGNS, SCALED, "auto"),
    (SCALED, None, "two_phase"),
    (SCALED, FP16, "allgather"),
]


@pytest.mark.parametrize(("codec", "second", "method", "text"), NOT_FIT)
@pytest.mark.parametrize("size", [1, 2])
def test_codecs_that_are_not_fit_for_an_exchange(codec, second, method, text, size):
    changed = second not in (None, codec)
    subject = f"second_codec is {second} with codec={codec}" if changed else f"method is '{method}' with codec={codec}"
    with pytest.raises(ArgumentError, match=text) as caught:
        run_ranks(size, lambda carrier: build(carrier, codec, BUCKETS, method=method, second_codec=second))
    assert str(caught.value).startswith(subject)
    with pytest.raises(ArgumentError, match=text) as caught:
        ExchangeConfig(codec, second, method)
    named = subject.replace("method is", "exchange is").replace("second_codec is", "second_compression is")
    assert str(caught.value).startswith(named.replace(" codec=", " compression="))


@pytest.mark.parametrize(("codec", "second", "method"), FIT)
def test_codecs_that_are_fit(codec, second, method):
    check_method(method, codec, second)
    assert ExchangeConfig(codec, second, method).method == method
