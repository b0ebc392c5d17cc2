"""Numbers that all ranks draw alike: the mean has them and no others, in both exchanges and in both phases."""

from __future__ import annotations

import numpy as np
import pytest

from pqasgd_horovod import codecs
from pqasgd_horovod.codecs.sparse import RandomK
from pqasgd_horovod.errors import ArgumentError, NonFiniteError
from pqasgd_horovod.exchange.carriers.threads import run_ranks
from pqasgd_horovod.exchange.layout import cut_shards
from pqasgd_horovod.exchange.plan import check_method
from pqasgd_horovod.keys import derive_shared_key

from .world import METHODS, SEED, build, make_values, run_round, same_everywhere

BUCKETS = (200, 2500)
CODEC = codecs.randomk(density=0.1, block_size=128)


def drawn_of(method: str, codec: RandomK, size: int, step: int) -> np.ndarray:
    """Return what of all buckets is drawn: ones, times the codec's factor; and zeros."""
    parts = []
    for bucket, num_elements in enumerate(BUCKETS):
        if method == "allgather":
            shards, first = [num_elements], bucket
        else:
            shards, first = [s.num_elements for s in cut_shards(num_elements, size, codec.block_size)], bucket * size
        for i, shard in enumerate(shards):
            shared = derive_shared_key(SEED, step, first + i)
            parts.append(codec.own_part(np.ones(shard, np.float32), shared))
    return np.concatenate(parts)


def means(codec: codecs.Codec, values: list[np.ndarray], step: int = 0, **options: object) -> np.ndarray:
    def program(carrier):
        return run_round(build(carrier, codec, BUCKETS, **options), values[carrier.rank], step=step)

    return np.concatenate(same_everywhere(run_ranks(len(values), program)))


@pytest.mark.parametrize("size", [2, 5, 8])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scaled", [False, True])
def test_the_mean_is_the_true_mean_where_it_was_drawn_and_nothing_elsewhere(scaled, method, size):
    """Nothing is lost in phase two, and nothing is scaled twice."""
    codec = codecs.randomk(density=0.1, block_size=128, scaled=scaled)
    values = make_values(size, BUCKETS)
    drawn = drawn_of(method, codec, size, step=7)
    assert np.count_nonzero(drawn) == codec.num_kept(BUCKETS[0]) + codec.num_kept(BUCKETS[1])
    mean = means(codec, values, step=7, method=method)
    np.testing.assert_allclose(mean, np.mean(values, axis=0) * drawn, rtol=1e-5, atol=1e-6)
    assert ((mean != 0) == (drawn != 0)).all()


@pytest.mark.parametrize("method", METHODS)
def test_steps_draw_anew_until_everything_was_sent(method):
    values = make_values(3, BUCKETS)
    sent = sum(means(CODEC, values, step=step, method=method) != 0 for step in range(80))
    assert (sent > 0).mean() > 0.99
    assert sent.max() < 30


def test_scaled_twice_would_be_found(monkeypatch):
    """The control: phase two with the factor again."""
    monkeypatch.setattr(RandomK, "for_means", property(lambda self: self))
    codec = codecs.randomk(density=0.1, block_size=128, scaled=True)
    values = make_values(3, BUCKETS)
    mean, drawn = means(codec, values, method="two_phase"), drawn_of("two_phase", codec, 3, step=0)
    assert not np.allclose(mean, np.mean(values, axis=0) * drawn, rtol=1e-2)


@pytest.mark.parametrize("position", [0, 131, 2699])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_and_not_drawn_is_an_error_on_every_rank(method, position):
    """Also in the shard of the rank that has it, which is not encoded before it becomes a mean."""
    values = make_values(3, BUCKETS)
    step = next(step for step in range(100) if not drawn_of(method, CODEC, 3, step)[position])
    for rank in range(3):
        wrong = [vector.copy() for vector in values]
        wrong[rank][position] = np.nan

        def program(carrier, wrong=wrong):
            with pytest.raises(NonFiniteError, match="NaN, Inf") as caught:
                run_round(build(carrier, CODEC, BUCKETS, method=method), wrong[carrier.rank], step=step)
            return str(caught.value)

        texts = set(run_ranks(3, program))
        assert len(texts) == 1
        assert f"rank {rank} had" in texts.pop()


@pytest.mark.parametrize(
    "second",
    [
        codecs.randomk(density=0.2, block_size=128),
        codecs.randomk(density=0.1, block_size=256),
        codecs.randomk(density=0.1, block_size=128, scaled=True),
    ],
    ids=["density", "block_size", "scaled"],
)
def test_a_second_drawing_of_other_numbers_is_refused(second):
    for first in (CODEC, codecs.randomk(density=0.1, block_size=128, scaled=True)):
        with pytest.raises(ArgumentError, match=r"second_codec is RandomK\(.*a mean has only the numbers of phase one"):
            check_method("two_phase", first, second)


def test_second_codecs_that_are_fit():
    for first in (CODEC, codecs.randomk(density=0.1, block_size=128, scaled=True)):
        for second in (CODEC, codecs.chain(CODEC, codecs.eden(bits=8)), codecs.eden(bits=2), codecs.topk(), None):
            check_method("two_phase", first, second)
    check_method("two_phase", codecs.eden(bits=2), codecs.randomk(scaled=True))
