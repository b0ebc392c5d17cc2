"""Ranks with different settings are told so, all alike."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from pqasgd_horovod import codecs
from pqasgd_horovod.errors import ArgumentError, CollectiveTimeoutError, WireFormatError
from pqasgd_horovod.exchange import describe_exchange, verify_same
from pqasgd_horovod.exchange.carriers.threads import run_ranks

from .world import WrappedCarrier, outcome

SETTINGS = {"codec": codecs.eden(bits=4), "buckets": [4096, 4096], "seed": 7}


def description(**changes):
    settings = {**SETTINGS, **changes}
    return {"period": 8, "exchange": describe_exchange(settings.pop("codec"), settings.pop("buckets"), **settings)}


@pytest.mark.parametrize("size", [1, 2, 5])
def test_same_settings_give_the_same_digest(size):
    digests = run_ranks(size, lambda carrier: verify_same(carrier, description(), "hello"))
    assert len(set(digests)) == 1
    assert 0 <= digests[0] < 2**64


def test_digest_depends_on_the_settings_and_not_on_the_order_of_keys():
    def digest(settings):
        return run_ranks(1, lambda carrier: verify_same(carrier, settings, "hello"))[0]

    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest({"a": 1}) != digest({"a": 1.0})
    assert digest({"a": 1}) != digest({"a": True})


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"codec": codecs.eden(bits=2)}, "exchange.codec.bits: it is 4 on {rest}; 2 on rank 1"),
        ({"codec": codecs.qsgd(bits=4)}, 'exchange.codec.id: it is "eden" on {rest}; "qsgd" on rank 1'),
        ({"seed": 8}, "exchange.seed: it is 7 on {rest}; 8 on rank 1"),
        ({"buckets": [4096, 1024]}, "exchange.buckets[1]: it is 4096 on {rest}; 1024 on rank 1"),
        ({"buckets": [4096]}, "exchange.buckets (length): it is 2 on {rest}; 1 on rank 1"),
        ({"second_codec": codecs.none()}, "exchange.second_codec: it is null on {rest}; absent on rank 1"),
        ({"method": "allgather"}, 'exchange.method: it is "auto" on {rest}; "allgather" on rank 1'),
        ({"nonfinite": "propagate"}, 'exchange.nonfinite: it is "raise" on {rest}; "propagate" on rank 1'),
    ],
)
def test_the_first_difference_is_named_on_every_rank(size, changes, text):
    def program(carrier):
        return outcome(lambda: verify_same(carrier, description(**(changes if carrier.rank == 1 else {})), "hello"))

    started = time.monotonic()
    (error,) = set(run_ranks(size, program))
    assert time.monotonic() - started < 20
    others = [str(rank) for rank in range(size) if rank != 1]
    rest = f"rank{'s' if size > 2 else ''} {', '.join(others)}"
    assert error == ("MismatchError", f"the ranks have to agree on {text.format(rest=rest)}")


def test_every_rank_may_have_a_value_of_its_own():
    def program(carrier):
        return outcome(lambda: verify_same(carrier, {"same": 0, "value": "x" * 1000 + str(carrier.rank)}, "hello"))

    (error,) = set(run_ranks(3, program))
    assert error[0] == "MismatchError"
    assert len(error[1]) < 1000
    assert error[1].startswith('the ranks have to agree on value: it is "xxx')


def test_difference_in_nesting_only():
    def program(carrier):
        return outcome(lambda: verify_same(carrier, {"a.b": 1} if carrier.rank else {"a": {"b": 1}}, "hello"))

    (error,) = set(run_ranks(2, program))
    assert error[0] == "MismatchError"
    assert "nested differently" in error[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1, 2}])
def test_what_json_cannot_hold_is_refused_before_anything_is_sent(value):
    def program(carrier):
        watched = WrappedCarrier(carrier)
        with pytest.raises(ArgumentError, match="description has to be JSON-able"):
            verify_same(watched, {"value": value}, "hello")
        return len(watched.log)

    assert run_ranks(2, program) == [0, 0]


def test_a_rank_that_does_not_take_part():
    given_up = threading.Semaphore(0)

    def program(carrier):
        if carrier.rank == 0:
            assert all(given_up.acquire(timeout=30) for _ in range(2))
            return "", ""
        error = outcome(lambda: verify_same(carrier, description(), "hello", timeout=0.1))
        given_up.release()
        return error

    errors = run_ranks(3, program)[1:]
    assert len(set(errors)) == 1
    assert errors[0][0] == CollectiveTimeoutError.__name__
    assert "hello.handshake.digest" in errors[0][1]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("digest", lambda data: data[:-1]),
        ("description", lambda data: data[:-1]),
        ("description", lambda data: np.roll(data, 1)),
        ("description", lambda data: np.zeros_like(data)),
        ("description", lambda data: np.frombuffer(b"\2\0\0\0\0\0\0\0[]" * 2, np.uint8)),
    ],
)
def test_malformed(name, change):
    def program(carrier):
        watched = WrappedCarrier(carrier)
        watched.change_received = lambda passing, data: change(data) if passing.endswith(name) else data
        return outcome(lambda: verify_same(watched, {"rank": carrier.rank}, "hello"))

    assert {kind for kind, _ in run_ranks(2, program)} == {WireFormatError.__name__}
