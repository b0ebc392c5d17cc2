"""Whatever goes wrong, all ranks raise the same, nothing hangs, and the next round works."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pqasgd_horovod import native
from pqasgd_horovod.errors import CollectiveTimeoutError, DesynchronizedError, MismatchError, PqasgdError
from pqasgd_horovod.exchange.carriers.threads import run_ranks

from .world import (
    CODECS,
    METHODS,
    PATIENT,
    WrappedCarrier,
    build,
    make_values,
    outcome,
    reference_mean,
    run_round,
    same_everywhere,
)

BUCKETS = (1, 200, 2500)
CODEC = CODECS["maxscale4"]


def one_error(outcomes):
    """Assert that all ranks had the same error; return its type and text."""
    assert len(set(outcomes)) == 1, f"the ranks do not say the same: {outcomes}"
    return outcomes[0]


def works_again(exchange, carrier, *, step=90, round=9):
    return run_round(exchange, make_values(carrier.size, BUCKETS)[carrier.rank], step=step, round=round)


def assert_recovered(means, method, size, codec=CODEC):
    expected = reference_mean(method, codec, None, BUCKETS, make_values(size, BUCKETS), step=90)
    for mean, wanted in zip(same_everywhere(means), expected, strict=True):
        np.testing.assert_array_equal(mean, wanted)


class TestOutOfStep:
    @pytest.mark.parametrize("size", [2, 3, 8])
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize(
        ("late", "text"),
        [
            ({"step": 7}, "step is 8 on rank{s} {rest}; 7 on rank 1; some ranks have made more steps"),
            ({"round": 2**60}, "round is 0 on rank{s} {rest}; 1152921504606846976 on rank 1; some ranks have averaged"),
        ],
    )
    def test_step_or_round(self, method, size, late, text):
        def program(carrier):
            exchange = build(carrier, CODEC, BUCKETS, method=method)
            values = make_values(size, BUCKETS)[carrier.rank]
            when = {"step": 8, "round": 0, **(late if carrier.rank == 1 else {})}
            error = outcome(lambda: run_round(exchange, values, **when))
            return error, works_again(exchange, carrier)

        started = time.monotonic()
        errors, means = zip(*run_ranks(size, program), strict=True)
        assert time.monotonic() - started < 20
        rest = ", ".join(str(rank) for rank in range(size) if rank != 1)
        kind, message = one_error(errors)
        assert kind == "DesynchronizedError"
        expected = text.format(s="s" if size > 2 else "", rest=rest)
        assert message.startswith(f"exchange 'test': bucket 0: the ranks are out of step: {expected}")
        assert_recovered(means, method, size)

    @pytest.mark.parametrize("size", [2, 3, 8])
    @pytest.mark.parametrize("method", METHODS)
    def test_digest(self, method, size):
        def program(carrier):
            exchange = build(carrier, CODEC, BUCKETS, method=method, digest=0xABC if carrier.rank == 1 else 0xDEF)
            return outcome(lambda: works_again(exchange, carrier))

        kind, message = one_error(run_ranks(size, program))
        assert kind == "DesynchronizedError"
        assert "digest is 0x0000000000000def on rank" in message
        assert "0x0000000000000abc on rank 1; the ranks do not run the same configuration" in message

    @pytest.mark.parametrize("size", [2, 3, 8])
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("other", [1, 201, 2500])
    def test_bucket_sizes(self, method, size, other):
        def program(carrier):
            exchange = build(carrier, CODEC, [other if carrier.rank == 1 else 200], method=method)
            return outcome(lambda: run_round(exchange, np.ones(sum(exchange.buckets), np.float32)))

        kind, message = one_error(run_ranks(size, program))
        assert kind == "DesynchronizedError"
        assert f"num_elements is 200 on rank{'s' if size > 2 else ''} 0" in message
        assert f"; {other} on rank 1; " in message

    @pytest.mark.parametrize("method", METHODS)
    def test_codec_behind_the_same_digest(self, method):
        """The digest should tell; if it does not, the sizes of the payloads do."""

        def program(carrier):
            exchange = build(carrier, CODECS["maxscale8" if carrier.rank == 1 else "maxscale4"], BUCKETS, method=method)
            return outcome(lambda: works_again(exchange, carrier))

        kind, message = one_error(run_ranks(3, program))
        assert kind == "WireFormatError"
        assert "the payloads are not of the size" in message or "received something malformed" in message

    def test_other_method(self):
        def program(carrier):
            exchange = build(carrier, CODEC, BUCKETS, method=METHODS[carrier.rank])
            return outcome(lambda: works_again(exchange, carrier))

        kind, message = one_error(run_ranks(2, program))
        assert kind == "MismatchError"
        assert message == (
            "collective 'test.b0.p1' is not the same operation on every rank: allgather on rank 0, alltoall on rank 1"
        )


class TestNonFinite:
    @pytest.mark.parametrize("size", [2, 3, 8])
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("position", [0, 201, 2700])
    @pytest.mark.parametrize("name", ["maxscale4", "none"])
    def test_one_value_on_one_rank(self, name, method, size, bad, position):
        """In whichever shard it is, that of its own rank included."""
        bucket = {0: 0, 201: 2, 2700: 2}[position]

        def program(carrier):
            exchange = build(carrier, CODECS[name], BUCKETS, method=method)
            values = make_values(size, BUCKETS)[carrier.rank]
            outcomes = []
            for rank in range(size):
                spoiled = values.copy()
                if carrier.rank == rank:
                    spoiled[position] = bad
                outcomes.append(outcome(lambda spoiled=spoiled: run_round(exchange, spoiled)))
            return outcomes, works_again(exchange, carrier)

        outcomes, means = zip(*run_ranks(size, program), strict=True)
        for rank, errors in enumerate(zip(*outcomes, strict=True)):
            assert one_error(errors) == (
                "NonFiniteError",
                f"exchange 'test': rank {rank} had NaN, Inf or a number beyond the codec's range in bucket {bucket}. "
                "Nothing was averaged.",
            )
        assert_recovered(means, method, size, CODECS[name])

    @pytest.mark.parametrize("method", METHODS)
    def test_all_ranks_and_buckets_are_named(self, method):
        def program(carrier):
            exchange = build(carrier, CODEC, BUCKETS, method=method)
            values = make_values(4, BUCKETS)[carrier.rank]
            if carrier.rank in (0, 3):
                values[0] = np.nan
            if carrier.rank == 2:
                values[1:] = np.inf
            return outcome(lambda: run_round(exchange, values))

        what = "had NaN, Inf or a number beyond the codec's range in bucket"
        assert one_error(run_ranks(4, program)) == (
            "NonFiniteError",
            f"exchange 'test': ranks 0, 3 {what} 0; rank 2 {what} 1; rank 2 {what} 2. Nothing was averaged.",
        )

    @pytest.mark.parametrize("method", METHODS)
    def test_beyond_the_range_of_fp16(self, method):
        def program(carrier):
            exchange = build(carrier, CODECS["fp16"], BUCKETS, method=method)
            values = make_values(3, BUCKETS)[carrier.rank]
            values[5] = 1e6 if carrier.rank == 1 else 0
            return outcome(lambda: run_round(exchange, values))

        kind, message = one_error(run_ranks(3, program))
        assert kind == "NonFiniteError"
        assert "rank 1 had NaN, Inf or a number beyond the codec's range in bucket 1." in message

    def test_mean_beyond_the_range_of_the_second_codec(self):
        def program(carrier):
            exchange = build(carrier, CODECS["none"], BUCKETS, method="two_phase", second_codec=CODECS["fp16"])
            values = make_values(3, BUCKETS)[carrier.rank]
            values[1] = 1e6
            return outcome(lambda: run_round(exchange, values)), works_again(exchange, carrier)

        errors, means = zip(*run_ranks(3, program), strict=True)
        kind, message = one_error(errors)
        assert kind == "NonFiniteError"
        assert "rank 0 made a mean beyond the range of the second codec in bucket 1." in message
        same_everywhere(means)

    @pytest.mark.parametrize("size", [1, 2, 3])
    @pytest.mark.parametrize("method", METHODS)
    def test_propagate(self, method, size):
        def program(carrier):
            exchange = build(carrier, CODEC, BUCKETS, method=method, nonfinite="propagate")
            values = make_values(size, BUCKETS)[carrier.rank]
            if carrier.rank == size - 1:
                values[150] = np.nan
            return run_round(exchange, values, step=4)

        means = same_everywhere(run_ranks(size, program))
        assert np.isnan(means[1]).all()
        values = make_values(size, BUCKETS)
        if size > 1:
            values[-1][150] = 0  # bucket 1 aside, all is as ever
            expected = reference_mean(method, CODEC, None, BUCKETS, values, step=4)
            np.testing.assert_array_equal(means[0], expected[0])
            np.testing.assert_array_equal(means[2], expected[2])

    def test_world_of_one(self):
        def program(carrier):
            exchange = build(carrier, CODEC, BUCKETS)
            values = make_values(1, BUCKETS)[0]
            values[0] = np.nan
            return outcome(lambda: run_round(exchange, values)), works_again(exchange, carrier)

        error, means = run_ranks(1, program)[0]
        assert error == (
            "NonFiniteError",
            "exchange 'test': rank 0 had NaN, Inf or a number beyond float32's range in bucket 0. "
            "Nothing was averaged.",
        )
        np.testing.assert_array_equal(np.concatenate(means), make_values(1, BUCKETS)[0])

    @pytest.mark.parametrize("method", METHODS)
    def test_being_out_of_step_is_told_first(self, method):
        def program(carrier):
            exchange = build(carrier, CODEC, BUCKETS, method=method)
            values = np.full(sum(BUCKETS), np.nan, np.float32)
            return outcome(lambda: run_round(exchange, values, step=carrier.rank))

        assert one_error(run_ranks(3, program))[0] == "DesynchronizedError"


class TestMissingRanks:
    @pytest.mark.parametrize("method", METHODS)
    def test_a_rank_that_never_comes(self, method):
        given_up = threading.Semaphore(0)

        def program(carrier):
            if carrier.rank == 2:
                assert all(given_up.acquire(timeout=30) for _ in range(2))
                return "", ""
            exchange = build(carrier, CODEC, BUCKETS, method=method)
            error = outcome(lambda: run_round(exchange, make_values(3, BUCKETS)[carrier.rank], timeout=0.3))
            given_up.release()
            return error

        errors = run_ranks(3, program)[:2]
        assert one_error(errors) == (
            "CollectiveTimeoutError",
            "exchange 'test': bucket 0 did not arrive in 0.3 s: "
            "collective 'test.b0.p1': ranks [2] did not take part in time",
        )

    @pytest.mark.parametrize("method", METHODS)
    def test_a_rank_that_comes_late_can_be_waited_for_again(self, method):
        values = make_values(3, BUCKETS)
        given_up = threading.Semaphore(0)

        def program(carrier):
            exchange = build(carrier, CODEC, BUCKETS, method=method)
            if carrier.rank == 2:
                assert all(given_up.acquire(timeout=30) for _ in range(2))
                return run_round(exchange, values[2], step=90)
            with pytest.raises(CollectiveTimeoutError):
                run_round(exchange, values[carrier.rank], step=90, timeout=0.1)
            given_up.release()
            means = [np.empty(num_elements, np.float32) for num_elements in BUCKETS]
            exchange.finish(means, timeout=10.0)
            return means

        assert_recovered(run_ranks(3, program), method, 3)

    @pytest.mark.parametrize("method", METHODS)
    def test_a_rank_that_has_died_is_noticed_at_once_and_the_exchange_says_so_ever_after(self, method):
        def program(carrier):
            if carrier.rank == 1:
                raise ZeroDivisionError("planted")
            exchange = build(carrier, CODEC, BUCKETS, method=method)
            first = outcome(lambda: works_again(exchange, carrier))
            return first, outcome(lambda: works_again(exchange, carrier))

        started = time.monotonic()
        (first, second), failure, *_ = run_ranks(3, program, return_exceptions=True)
        assert time.monotonic() - started < 20
        assert isinstance(failure, ZeroDivisionError)
        assert first[0] == "CollectiveTimeoutError"
        assert "ranks [1] have ended" in first[1]
        assert second[0] == "PqasgdError"
        assert "exchange 'test' has lost its carrier, make a new one" in second[1]


def corrupt(flips, name, of_rank, carrier):
    """Return a function that flips bits of what passes under ``name`` on one rank."""

    def change(passing, data):
        if passing != name or carrier.rank != of_rank or not data.size:
            return data
        data = data.copy()
        for flip in flips:
            data[flip // 8 % data.size] ^= 1 << flip % 8
        return data

    return change


FLIPS = st.lists(st.integers(0, 2**20), min_size=1, max_size=4)


class TestCorruption:
    """Bits flipped on the way. Headers have a checksum; what a payload then stands for is the transport's business."""

    ALLOWED = ("", "WireFormatError", "DesynchronizedError")

    @settings(PATIENT, max_examples=60)
    @given(
        flips=FLIPS,
        phase=st.sampled_from(["allgather p1", "two_phase p1", "two_phase p2"]),
        size=st.sampled_from([2, 3]),
    )
    def test_what_is_sent(self, flips, phase, size):
        """All ranks see the same corrupted bytes, and must come to the same end: one error, or one mean."""
        method, name = phase.split()

        def program(carrier):
            watched = WrappedCarrier(carrier)
            watched.change_sent = corrupt(flips, f"test.b1.{name}", 1, carrier)
            exchange = build(watched, CODECS["maxscale4"], BUCKETS, method=method)
            means = [None]

            def attempt():
                means[0] = run_round(exchange, make_values(size, BUCKETS)[carrier.rank])

            error = outcome(attempt)
            watched.change_sent = None
            return error, means[0], works_again(exchange, carrier)

        errors, means, after = zip(*run_ranks(size, program), strict=True)
        assert one_error(errors)[0] in self.ALLOWED
        if not errors[0][0]:
            same_everywhere(means)
        assert_recovered(after, method, size)

    @settings(PATIENT, max_examples=40)
    @given(flips=FLIPS)
    def test_what_one_rank_receives_in_phase_one(self, flips):
        """Only one rank knows; phase two tells the others."""

        def program(carrier):
            watched = WrappedCarrier(carrier)
            watched.change_received = corrupt(flips, "test.b1.p1", 1, carrier)
            exchange = build(watched, CODECS["none"], [200, 2500], method="two_phase")
            error = outcome(lambda: run_round(exchange, np.ones(2700, np.float32)))
            watched.change_received = None
            return error, run_round(exchange, np.ones(2700, np.float32))

        errors, means = zip(*run_ranks(3, program), strict=True)
        # "none" turns a flipped exponent into Inf: then the owner's mean is not finite.
        assert one_error(errors)[0] in (*self.ALLOWED, "NonFiniteError")
        assert (np.concatenate(same_everywhere(means)) == 1).all()

    @settings(PATIENT, max_examples=40)
    @given(flips=FLIPS, method=st.sampled_from(METHODS))
    def test_what_one_rank_receives_in_the_last_phase(self, flips, method):
        """Too late to tell the others: this rank raises, or cannot know."""
        name = "p1" if method == "allgather" else "p2"

        def program(carrier):
            watched = WrappedCarrier(carrier)
            watched.change_received = corrupt(flips, f"test.b1.{name}", 1, carrier)
            exchange = build(watched, CODEC, BUCKETS, method=method)
            error = outcome(lambda: works_again(exchange, carrier))
            watched.change_received = None
            return error, works_again(exchange, carrier)

        errors, means = zip(*run_ranks(3, program), strict=True)
        assert errors[1][0] in self.ALLOWED
        assert errors[0] == errors[2] == ("", "")
        assert_recovered(means, method, 3)

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize(
        "change",
        [
            lambda data: data[:-1],
            lambda data: data[:63],
            lambda data: data[:0],
            lambda data: np.concatenate([data, data[:1]]),
            lambda data: np.concatenate([data[64:], data[:64]]),
        ],
        ids=["short", "no header", "nothing", "long", "rotated"],
    )
    def test_cut_and_stretched(self, change, method):
        """One rank received too little or too much; in the two-phase exchange all ranks are told."""

        def program(carrier):
            watched = WrappedCarrier(carrier)
            if carrier.rank == 1:
                watched.change_received = lambda name, data: change(data) if name == "test.b1.p1" else data
            exchange = build(watched, CODEC, BUCKETS, method=method)
            error = outcome(lambda: works_again(exchange, carrier))
            watched.change_received = None
            return error, works_again(exchange, carrier)

        errors, means = zip(*run_ranks(3, program), strict=True)
        assert errors[1][0] == "WireFormatError"
        if method == "two_phase":
            assert one_error(errors)[1] == "exchange 'test': rank 1 received something malformed in bucket 1"
        assert_recovered(means, method, 3)

    def test_what_one_rank_knows_is_the_cause(self):
        def program(carrier):
            watched = WrappedCarrier(carrier)
            watched.change_received = corrupt([0], "test.b1.p1", 1, carrier)
            exchange = build(watched, CODEC, BUCKETS, method="two_phase")
            try:
                works_again(exchange, carrier)
            except PqasgdError as error:
                return str(error.__cause__)
            return "no error"

        causes = run_ranks(3, program)
        assert causes == ["None", "message of rank 0: a message begins with b'PQA1', got b'QQA1'", "None"]

    def test_a_stale_message_is_out_of_step(self):
        """Phase one of the last round once more, to one rank only: its header is valid, but old."""

        def program(carrier):
            watched = WrappedCarrier(carrier)
            exchange = build(watched, CODEC, BUCKETS, method="two_phase")
            kept = {}

            def keep(name, data):
                return kept.setdefault(name, data) if name == "test.b2.p1" and carrier.rank == 0 else data

            watched.change_received = keep
            run_round(exchange, make_values(3, BUCKETS)[carrier.rank], step=1, round=1)
            try:
                run_round(exchange, make_values(3, BUCKETS)[carrier.rank], step=2, round=2)
            except DesynchronizedError as error:
                return str(error), str(error.__cause__)
            return "no error", ""

        errors, causes = zip(*run_ranks(3, program), strict=True)
        assert one_error(errors) == (
            "exchange 'test': rank 0 received a message of another step, round, bucket or configuration in bucket 2"
        )
        assert "round is 2 on rank 0; 1 on ranks 1, 2" in causes[0]
        assert causes[1:] == ("None", "None")


def test_an_error_of_the_carrier_is_not_swallowed():
    def program(carrier):
        watched = WrappedCarrier(carrier)

        def fail(name, data):
            raise MismatchError("planted")

        watched.change_received = fail
        exchange = build(watched, CODEC, BUCKETS, method="allgather")
        source = native.Source.from_arrays([make_values(2, BUCKETS)[carrier.rank]])
        exchange.begin(0, source, 0, step=0, round=0)
        first = outcome(lambda: exchange.finish([np.empty(num_elements, np.float32) for num_elements in BUCKETS]))
        return first, outcome(lambda: exchange.begin(1, source, 1, step=0, round=0))

    for first, second in run_ranks(2, program):
        assert first == ("MismatchError", "planted")
        assert second == ("PqasgdError", "exchange 'test' has lost its carrier, make a new one: planted")
