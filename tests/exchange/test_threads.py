"""The in-process carrier behaves as Horovod does, and never hangs."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from pqasgd_horovod.errors import ArgumentError, CollectiveTimeoutError, MismatchError
from pqasgd_horovod.exchange.carriers.threads import run_ranks

from .world import outcome


def payload_of(rank: int, nbytes: int) -> np.ndarray:
    return np.full(nbytes, rank, np.uint8)


@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_collectives(size):
    """Sizes may differ and be 0; what comes is in rank order."""

    def program(carrier):
        gathered = carrier.allgather("g", payload_of(carrier.rank, carrier.rank)).wait()
        splits = [(carrier.rank + rank) % 3 for rank in range(size)]
        pieces = [np.full(split, 16 * carrier.rank + rank, np.uint8) for rank, split in enumerate(splits)]
        exchanged = carrier.alltoall("x", np.concatenate(pieces), splits).wait()
        return gathered.tolist(), exchanged.tolist()

    for rank, (gathered, exchanged) in enumerate(run_ranks(size, program)):
        assert gathered == [sender for sender in range(size) for _ in range(sender)]
        assert exchanged == [16 * sender + rank for sender in range(size) for _ in range((sender + rank) % 3)]


def test_names_are_matched_in_any_order_and_may_be_used_again():
    names = ["a", "b", "c"]

    def program(carrier):
        received = []
        for repetition in range(3):
            order = names[carrier.rank :] + names[: carrier.rank]
            value = {name: np.array([ord(name), repetition, carrier.rank], np.uint8) for name in names}
            handles = {name: carrier.allgather(name, value[name]) for name in order}
            received.append([handles[name].wait().tolist() for name in names])
        return received

    for received in run_ranks(3, program):
        for repetition, lists in enumerate(received):
            for name, values in zip(names, lists, strict=True):
                assert values == [number for rank in range(3) for number in (ord(name), repetition, rank)]


def test_send_buffers_are_free_when_the_collective_is_done():
    def program(carrier):
        payload = payload_of(carrier.rank + 1, 4)
        handle = carrier.allgather("g", payload)
        first = handle.wait()
        payload[:] = 99
        carrier.allgather("barrier", payload).wait()
        return first.tolist()

    assert run_ranks(2, program) == [[1] * 4 + [2] * 4] * 2


def test_other_operation_under_one_name_is_an_error_on_every_rank():
    def program(carrier):
        data = payload_of(carrier.rank, 3)
        handle = carrier.alltoall("n", data, [1, 1, 1]) if carrier.rank == 1 else carrier.allgather("n", data)
        return outcome(handle.wait)

    (error,) = set(run_ranks(3, program))
    assert error == (
        MismatchError.__name__,
        "collective 'n' is not the same operation on every rank: "
        "allgather on rank 0, alltoall on rank 1, allgather on rank 2",
    )


def test_a_name_in_flight_is_refused():
    refused = threading.Event()

    def program(carrier):
        if carrier.rank == 1:
            assert refused.wait(30)
            return carrier.allgather("n", payload_of(1, 1)).wait().tolist()
        handle = carrier.allgather("n", payload_of(0, 1))
        with pytest.raises(ArgumentError, match="collective 'n' is in flight on rank 0"):
            carrier.allgather("n", payload_of(0, 1))
        refused.set()
        return handle.wait().tolist()

    assert run_ranks(2, program) == [[0, 1], [0, 1]]


@pytest.mark.parametrize("splits", [[1, 1], [1, 1, 2], [4, -1, 0], [3]])
def test_splits_have_to_fit(splits):
    def program(carrier):
        return outcome(lambda: carrier.alltoall("n", payload_of(0, 3), splits))[0]

    assert set(run_ranks(3, program)) == {"ArgumentError"}


@pytest.mark.parametrize("payload", [np.zeros(3, np.int8), np.zeros((1, 3), np.uint8)])
def test_payload_has_to_be_flat_bytes(payload):
    assert run_ranks(1, lambda carrier: outcome(lambda: carrier.allgather("n", payload))[0]) == ["ArgumentError"]


def test_waiting_ends():
    given_up = threading.Event()

    def program(carrier):
        if carrier.rank == 0:
            return given_up.wait(30)
        handle = carrier.allgather("n", payload_of(1, 1))
        assert not handle.done()
        started = time.monotonic()
        with pytest.raises(CollectiveTimeoutError, match=r"collective 'n': ranks \[0\] did not take part in time"):
            handle.wait(0.05)
        given_up.set()
        with pytest.raises(CollectiveTimeoutError, match=r"collective 'n': ranks \[0\] have ended"):
            handle.wait()
        assert handle.done()
        return time.monotonic() - started < 20

    assert run_ranks(2, program) == [True, True]


def test_nothing_outlives_the_deadline():
    release = threading.Event()
    started = time.monotonic()

    def program(carrier):
        if carrier.rank == 1:
            return release.wait(30)
        try:
            return carrier.allgather("n", payload_of(0, 1)).wait()
        finally:
            release.set()

    with pytest.raises(CollectiveTimeoutError, match=r"collective 'n': ranks \[1\] did not take part in time"):
        run_ranks(2, program, timeout=0.2)
    assert time.monotonic() - started < 20


def test_a_rank_that_is_stuck_is_named():
    release = threading.Event()
    with pytest.raises(CollectiveTimeoutError, match=r"ranks \[1\] were still running after 0.1 s"):
        run_ranks(2, lambda carrier: release.wait(10) if carrier.rank else None, timeout=0.1)
    release.set()


def test_the_first_error_is_raised_and_all_can_be_had():
    def program(carrier):
        if carrier.rank == 1:
            raise KeyError("planted")
        return carrier.allgather("n", payload_of(0, 1)).wait()

    with pytest.raises(KeyError, match="planted"):
        run_ranks(3, program)
    errors = run_ranks(3, program, return_exceptions=True)
    assert [type(error) for error in errors] == [CollectiveTimeoutError, KeyError, CollectiveTimeoutError]


def test_size_has_to_be_positive():
    with pytest.raises(ArgumentError, match="size has to be at least 1, got 0"):
        run_ranks(0, lambda carrier: None)
