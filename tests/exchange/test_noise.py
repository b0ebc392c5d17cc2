"""The ranks' rounding noise is independent, so that it falls as 1/n, and phase two adds what is documented."""

from __future__ import annotations

import numpy as np
import pytest

from pqasgd_horovod import codecs
from pqasgd_horovod.exchange.carriers.threads import run_ranks
from pqasgd_horovod.keys import derive_key

from .world import SEED, build, run_round

NUM_ELEMENTS = 2**17
VALUES = np.random.default_rng(5).standard_normal(NUM_ELEMENTS).astype(np.float32)
CODECS = [codecs.maxscale(bits=4), codecs.qsgd(bits=4), codecs.eden(bits=2), codecs.eden(bits=3, rounding="stochastic")]


def relative_error(mean: np.ndarray) -> float:
    """Return |mean - v|^2 / |v|^2 in float64."""
    error = mean.astype(np.float64) - VALUES
    return float(error @ error / (VALUES.astype(np.float64) @ VALUES))


def noise_of(codec: codecs.Codec) -> float:
    """Return q, measured on one payload."""
    return relative_error(codec.decode(codec.encode(VALUES, key=1), NUM_ELEMENTS, key=1))


def noise_of_mean(codec: codecs.Codec, size: int, **options: object) -> float:
    """Return the relative error of the mean when all ranks have the same values."""

    def program(carrier):
        return run_round(build(carrier, codec, [NUM_ELEMENTS], **options), VALUES, step=3)[0]

    return relative_error(run_ranks(size, program)[0])


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("size", [4, 16])
def test_allgather_divides_the_noise_by_the_number_of_ranks(codec, size):
    assert noise_of_mean(codec, size, method="allgather") == pytest.approx(noise_of(codec) / size, rel=0.1)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_negative_control_one_key_for_all_ranks_divides_nothing(codec):
    def noise_of_keys(keys: list[int]) -> float:
        decoded = [codec.decode(codec.encode(VALUES, key), NUM_ELEMENTS, key) for key in keys]
        return relative_error(np.mean(decoded, axis=0))

    own = [derive_key(SEED, rank, 3, 0, 0) for rank in range(4)]
    assert noise_of_keys(own) == pytest.approx(noise_of(codec) / 4, rel=0.1)
    assert noise_of_keys([own[0]] * 4) == pytest.approx(noise_of(codec), rel=0.1)


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("second", [codecs.none(), codecs.eden(bits=4), codecs.maxscale(bits=4)], ids=str)
def test_two_phase_adds_the_noise_of_the_second_codec(second, size):
    """(1 + q2) q (n - 1)/n^2 + q2 for equal values, the owner's part being exact."""
    first = codecs.maxscale(bits=3)
    q, q2 = noise_of(first), noise_of(second)
    expected = (1 + q2) * q * (size - 1) / size**2 + q2
    measured = noise_of_mean(first, size, method="two_phase", second_codec=second)
    assert measured == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("method", ["allgather", "two_phase"])
def test_shards_buckets_and_steps_have_noise_of_their_own(method):
    """The same block of numbers everywhere in the vector is rounded differently in every bucket, shard and step."""
    codec = codecs.maxscale(bits=4, block_size=512)
    block = np.random.default_rng(6).standard_normal(512).astype(np.float32)

    def program(carrier):
        exchange = build(carrier, codec, [2048, 2048], method=method)
        means = [np.concatenate(run_round(exchange, np.tile(block, 8), step=step)) for step in (0, 1)]
        return np.concatenate(means).reshape(-1, 512)

    blocks = run_ranks(4, program)[0]
    assert blocks.shape == (16, 512)
    assert len({row.tobytes() for row in blocks}) == 16
