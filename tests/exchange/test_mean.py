"""The mean is what the specification says, bit by bit, and the same on every rank."""

from __future__ import annotations

import numpy as np
import pytest

from pqasgd_horovod import codecs, native
from pqasgd_horovod.errors import ArgumentError
from pqasgd_horovod.exchange import choose_exchange, make_exchange
from pqasgd_horovod.exchange.carriers.threads import run_ranks
from pqasgd_horovod.exchange.plan import bytes_per_round

from .world import (
    CODECS,
    METHODS,
    WrappedCarrier,
    build,
    make_values,
    reference_mean,
    run_round,
    same_everywhere,
)

# One element; fewer blocks than ranks, so that shards are empty; many blocks and a short one.
BUCKETS = (1, 200, 2500)


def test_every_registered_codec_is_exchanged_here():
    assert {codec.id for codec in CODECS.values()} == set(codecs.registry)


@pytest.mark.parametrize("size", [2, 3, 4, 8, 16])
@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name, codec in CODECS.items() for method in METHODS if codec.exchange_method in (None, method)],
)
def test_mean_is_the_specification(name, method, size):
    codec = CODECS[name]
    values = make_values(size, BUCKETS)

    def program(carrier):
        exchange = build(carrier, codec, BUCKETS, method=method)
        assert exchange.method == method
        means = run_round(exchange, values[carrier.rank], step=40, round=5)
        return means, exchange.bytes_sent, exchange.bytes_received, exchange.predicted_bytes_per_round()

    means, sent, received, predicted = zip(*run_ranks(size, program), strict=True)
    expected = reference_mean(method, codec, None, BUCKETS, values, step=40)
    for mean, wanted in zip(same_everywhere(means), expected, strict=True):
        np.testing.assert_array_equal(mean.view(np.uint32), wanted.view(np.uint32))
    assert sent == predicted
    assert sum(sent) == sum(received)
    assert max(sent) == bytes_per_round(method, codec, None, BUCKETS, size)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("eden1", "maxscale8"),
        ("maxscale4", "none"),
        ("none", "eden4"),
        ("eden3-stochastic", "fp16"),
        ("signs", "fp16"),
        ("topk", "eden4"),
        ("maxscale4", "randomk-scaled"),
        ("randomk-scaled", "none"),
        ("randomk", "topk-eden4"),
    ],
)
def test_second_codec(first, second):
    values = make_values(3, BUCKETS)

    def program(carrier):
        exchange = build(carrier, CODECS[first], BUCKETS, method="two_phase", second_codec=CODECS[second])
        means = run_round(exchange, values[carrier.rank], step=2)
        return means, exchange.bytes_sent == exchange.predicted_bytes_per_round(), exchange.bytes_sent

    means, predicted, sent = zip(*run_ranks(3, program), strict=True)
    expected = reference_mean("two_phase", CODECS[first], CODECS[second], BUCKETS, values, step=2)
    for mean, wanted in zip(same_everywhere(means), expected, strict=True):
        np.testing.assert_array_equal(mean, wanted)
    assert all(predicted)
    assert max(sent) == bytes_per_round("two_phase", CODECS[first], CODECS[second], BUCKETS, 3)


@pytest.mark.parametrize("method", METHODS)
def test_segments_and_anchor_of_other_dtypes(method):
    """The source may be many tensors of any dtype, less an anchor, and buckets may begin anywhere in it."""
    codec = CODECS["eden4"]
    generator = np.random.default_rng(3)
    anchor = generator.standard_normal(1000)
    locals_ = [anchor + 0.01 * generator.standard_normal(1000) for _ in range(3)]

    def program(carrier):
        vector = locals_[carrier.rank]
        source = native.Source.from_arrays([vector[:301].copy(), vector[301:302].copy(), vector[302:].copy()], anchor)
        exchange = build(carrier, codec, [400, 550], method=method)
        exchange.begin(1, source, 450, step=1, round=0)
        exchange.begin(0, source, 50, step=1, round=0)
        means = [np.empty(400, np.float32), np.empty(550, np.float32)]
        exchange.finish(means, 20.0)
        return means

    deltas = [(vector - anchor).astype(np.float32)[50:1000] for vector in locals_]
    expected = reference_mean(method, codec, None, [400, 550], deltas, step=1)
    for mean, wanted in zip(same_everywhere(run_ranks(3, program)), expected, strict=True):
        np.testing.assert_array_equal(mean, wanted)


@pytest.mark.parametrize("method", METHODS)
def test_rounds_use_the_same_names_sizes_and_buffers(method):
    values = make_values(3, BUCKETS)

    def program(carrier):
        watched = WrappedCarrier(carrier)
        exchange = build(watched, CODECS["maxscale4"], BUCKETS, method=method)
        rounds = []
        for number in range(3):
            run_round(exchange, values[carrier.rank], step=8 * number, round=number, order=(2, 0, 1))
            rounds.append(sorted(watched.log))
            watched.log.clear()
        assert rounds[0] == rounds[1] == rounds[2]
        launches = 2 if method == "two_phase" else 1
        assert len({name for _, name, *_ in rounds[0]}) == len(rounds[0]) == launches * len(BUCKETS)
        counted = sum(nbytes * (1 if kind == "alltoall" else 2) for kind, _, nbytes, _, _ in rounds[0])
        assert counted == exchange.predicted_bytes_per_round()
        return True

    assert all(run_ranks(3, program))


@pytest.mark.parametrize("method", METHODS)
def test_steps_have_their_own_noise(method):
    values = make_values(2, BUCKETS)

    def program(carrier):
        exchange = build(carrier, CODECS["maxscale4"], BUCKETS, method=method)
        return [run_round(exchange, values[carrier.rank], step=step, round=0)[2] for step in (0, 1, 0)]

    first, second, again = run_ranks(2, program)[0]
    assert not np.array_equal(first, second)
    assert np.array_equal(first, again)


def test_phase_two_does_not_wait_for_other_buckets():
    """All first phases go out before anything is waited for; a second one as soon as its own first has come."""

    def program(carrier):
        watched = WrappedCarrier(carrier)
        watched.gated = True
        exchange = build(watched, CODECS["maxscale4"], [500, 500, 500], method="two_phase")
        source = native.Source.from_arrays([np.ones(1500, np.float32)])
        for bucket in range(3):
            exchange.begin(bucket, source, 500 * bucket, step=0, round=0)
        launched = [name for _, name, *_ in watched.log]
        assert launched == ["test.b0.p1", "test.b1.p1", "test.b2.p1"]
        exchange.advance()
        assert len(watched.log) == 3
        watched.released = {"test.b2.p1"}
        while len(watched.log) == 3:
            exchange.advance()
        assert [name for _, name, *_ in watched.log[3:]] == ["test.b2.p2"]
        watched.gated = False
        means = [np.empty(500, np.float32) for _ in range(3)]
        exchange.finish(means, 20.0)
        return means

    for mean in same_everywhere(run_ranks(2, program)):
        np.testing.assert_allclose(mean, 1.0, rtol=1e-6)


@pytest.mark.parametrize(("size", "method"), [(1, "auto"), (3, "allgather"), (3, "two_phase")])
def test_the_mean_is_added_to_a_base(size, method):
    values = make_values(size, [700, 1300])
    base = np.random.default_rng(9).standard_normal(2000).astype(np.float32)

    def program(carrier):
        exchange = build(carrier, CODECS["eden4"], [700, 1300], method=method)
        plain = run_round(exchange, values[carrier.rank])
        source = native.Source.from_arrays([values[carrier.rank]])
        exchange.begin(0, source, 0, step=0, round=0, base=base[:700])
        exchange.begin(1, source, 700, step=0, round=0, base=base[700:])
        sums = [np.empty(700, np.float32), np.empty(1300, np.float32)]
        exchange.finish(sums, 20.0)
        with pytest.raises(ArgumentError, match="base"):
            exchange.begin(0, source, 0, step=0, round=0, base=base)
        np.testing.assert_array_equal(np.concatenate(sums), base + np.concatenate(plain))
        return sums

    same_everywhere(run_ranks(size, program))


@pytest.mark.parametrize("name", ["eden4", "none"])
def test_world_of_one_is_exact_and_silent(name):
    values = make_values(1, BUCKETS)[0]

    def program(carrier):
        exchange = build(carrier, CODECS[name], BUCKETS)
        means = run_round(exchange, values)
        assert (exchange.bytes_sent, exchange.bytes_received, exchange.predicted_bytes_per_round()) == (0, 0, 0)
        return np.concatenate(means)

    np.testing.assert_array_equal(run_ranks(1, program)[0], values)


class TestChoice:
    def test_the_method_that_sends_less_is_taken(self):
        for codec in CODECS.values():
            if codec.exchange_method is not None:
                continue
            for second in (None, CODECS["none"], CODECS["eden1"]):
                for size in (2, 3, 5, 16):
                    for buckets in ([1], [100_000], [64, 5000, 1_000_000]):
                        chosen = choose_exchange(codec, second, buckets, size)
                        sent = {method: bytes_per_round(method, codec, second, buckets, size) for method in METHODS}
                        assert sent[chosen] == min(sent.values())
                        assert chosen == "allgather" or sent["two_phase"] < sent["allgather"]

    def test_the_method_that_the_codec_needs_is_taken(self):
        for size in (2, 3, 5, 16):
            assert choose_exchange(CODECS["votes"], None, 10**6, size) == "two_phase"
            assert choose_exchange(CODECS["votes"], CODECS["votes"], 10**6, size) == "two_phase"
            assert choose_exchange(CODECS["signs"], None, 10**6, size) == "allgather"
        assert choose_exchange(CODECS["signs"], CODECS["fp16"], 10**6, 100) == "two_phase"

    def test_thousands_of_ranks_are_counted_in_no_time(self, monkeypatch):
        calls = []
        payload_nbytes = codecs.Eden.payload_nbytes
        monkeypatch.setattr(codecs.Eden, "payload_nbytes", lambda *args: calls.append(args) or payload_nbytes(*args))
        assert choose_exchange(codecs.eden(bits=4), None, [2_000_000] * 12, 4096) == "two_phase"
        assert len(calls) <= 12 * 8  # few sizes of shards, whatever the number of ranks

    def test_one_number_stands_for_one_bucket(self):
        assert choose_exchange(CODECS["eden4"], None, 10**6, 8) == choose_exchange(CODECS["eden4"], None, [10**6], 8)

    def test_equal_is_allgather(self):
        assert choose_exchange(CODECS["eden4"], None, 10**6, 1) == "allgather"

    def test_auto(self):
        def program(carrier):
            few = build(carrier, CODECS["eden4"], [1])
            many = build(carrier, CODECS["eden4"], [100_000])
            return few.method, many.method

        assert run_ranks(4, program) == [("allgather", "two_phase")] * 4


class TestArguments:
    """Wrong arguments are refused before anything is sent."""

    @staticmethod
    def exchange(**options):
        return run_ranks(1, lambda carrier: build(carrier, CODECS["eden4"], [10, 20], **options))[0]

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"method": "ring"}, "method is 'ring'; it must be one of 'auto', 'allgather', 'two_phase'"),
            ({"nonfinite": "ignore"}, "nonfinite has to be 'raise' or 'propagate', got 'ignore'"),
            ({"seed": -1}, "seed has to be from 0"),
            ({"digest": 2**64}, "digest has to be from 0"),
        ],
    )
    def test_make(self, options, text):
        with pytest.raises(ArgumentError, match=text):
            self.exchange(**options)

    def test_buckets(self):
        with pytest.raises(ArgumentError, match="buckets has to hold sizes of at least 1 element"):
            run_ranks(1, lambda carrier: build(carrier, CODECS["eden4"], [10, 0]))

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ({"bucket": 2}, "bucket has to be from 0 to 1, got 2"),
            ({"bucket": -1}, "bucket has to be from 0 to 1, got -1"),
            ({"start": 11}, "start has to leave room for the 10 elements of bucket 0 in a source of 20, got 11"),
            ({"start": -1}, "start has to leave room"),
            ({"step": -1}, "step has to be from 0"),
            ({"round": 2**64}, "round has to be from 0"),
        ],
    )
    def test_begin(self, arguments, text):
        exchange = self.exchange()
        source = native.Source.from_arrays([np.zeros(20, np.float32)])
        with pytest.raises(ArgumentError, match=text):
            exchange.begin(**{"bucket": 0, "source": source, "start": 0, "step": 0, "round": 0, **arguments})

    def test_a_bucket_is_begun_once_and_at_the_step_of_the_others(self):
        exchange = self.exchange()
        source = native.Source.from_arrays([np.zeros(20, np.float32)])
        exchange.begin(0, source, 0, step=3, round=0)
        with pytest.raises(ArgumentError, match="bucket 0 of exchange 'test' is in flight"):
            exchange.begin(0, source, 0, step=3, round=0)
        with pytest.raises(
            ArgumentError, match="step has to be the same for all buckets of a round, 3, got 4 for bucket 1"
        ):
            exchange.begin(1, source, 0, step=4, round=0)

    @pytest.mark.parametrize(
        "means",
        [
            [np.empty(10, np.float32)],
            [np.empty(10, np.float64), np.empty(20, np.float32)],
            [np.empty(11, np.float32), np.empty(20, np.float32)],
            [np.empty(20, np.float32)[::2], np.empty(20, np.float32)],
            [np.empty((1, 10), np.float32), np.empty(20, np.float32)],
        ],
    )
    def test_finish_refuses_means_and_can_be_called_again(self, means):
        exchange = self.exchange()
        exchange.begin(0, native.Source.from_arrays([np.ones(20, np.float32)]), 0, step=0, round=0)
        with pytest.raises(ArgumentError, match="means"):
            exchange.finish(means)
        good = [np.zeros(10, np.float32), np.zeros(20, np.float32)]
        exchange.finish(good)
        assert (good[0] == 1).all()
        assert (good[1] == 0).all()


def test_no_buckets():
    def program(carrier):
        exchange = make_exchange(CODECS["eden4"], carrier, [], name="empty", seed=0, digest=0)
        exchange.finish([])
        return exchange.predicted_bytes_per_round()

    assert run_ranks(2, program) == [0, 0]
