"""Ranks on different paths find each other out at once, whatever the pair of paths; ranks on the same path go on."""

import threading

import pytest

from pqasgd_horovod.averaging.meeting import Meeting, Purpose
from pqasgd_horovod.errors import CollectiveTimeoutError, DesynchronizedError
from pqasgd_horovod.exchange.carriers.threads import run_ranks

LAYOUT, AVERAGE, FLUSH, LAST, JOINED = Purpose


def meet(intents):
    """Return what became of a meeting with one intent for each rank: None or the error's text."""

    def program(carrier):
        meeting = Meeting(carrier, "test")
        meeting.announce(*intents[carrier.rank])
        try:
            meeting.agree(20.0)
        except DesynchronizedError as error:
            return str(error)
        return None

    return run_ranks(len(intents), program, timeout=30.0)


@pytest.mark.parametrize(
    "intents",
    [
        [(AVERAGE, 8, 1)] * 3,
        [(FLUSH, 8, 1)] * 2,
        [(AVERAGE, 8, 1), (FLUSH, 8, 1)],  # a flush where the period ends
        [(LAYOUT, 8, 1), (LAYOUT, 0, 0)],  # the layout's own handshake has more to say about it
        [(AVERAGE, 8, 1), (AVERAGE, 6, 1)],  # the bucket headers have
        [(AVERAGE, 8, 1), (LAST, 6, 1), (JOINED, 4, 1)],
        [(LAYOUT, 8, 2), (JOINED, 4, 2)],
        [(LAST, 8, 2), (JOINED, 4, 2)],
    ],
)
def test_who_does_the_same_goes_on(intents):
    assert meet(intents) == [None] * len(intents)


@pytest.mark.parametrize(
    "intents",
    [
        [(FLUSH, 6, 1), (AVERAGE, 8, 1)],
        [(FLUSH, 6, 1), (FLUSH, 7, 1), (FLUSH, 6, 1)],
        [(LAYOUT, 8, 1), (AVERAGE, 8, 1)],
        [(LAYOUT, 8, 1), (FLUSH, 8, 1)],
        [(FLUSH, 8, 1), (JOINED, 8, 1)],
        [(FLUSH, 8, 1), (AVERAGE, 8, 1), (LAST, 8, 1)],
        [(LAYOUT, 8, 1), (AVERAGE, 8, 1), (JOINED, 8, 1)],
    ],
)
def test_who_does_not_is_told_so_alike(intents):
    texts = meet(intents)
    assert len(set(texts)) == 1
    assert "out of step" in str(texts[0])
    for rank, (purpose, steps, rounds) in enumerate(intents):
        assert purpose.describe(steps, rounds) in str(texts[0]), rank


def test_a_flush_that_was_given_up_does_not_disturb_the_next_average():
    given_up = threading.Event()

    def program(carrier):
        meeting = Meeting(carrier, "test")
        if carrier.rank == 0:
            meeting.announce(FLUSH, 2, 0)
            with pytest.raises(CollectiveTimeoutError):
                meeting.agree(0.05)
            given_up.set()
        assert given_up.wait(20.0)
        meeting.announce(AVERAGE, 4, 0)
        meeting.agree(20.0)
        meeting.announce(FLUSH, 5, 1)
        meeting.agree(20.0)
        return True

    assert run_ranks(3, program, timeout=30.0) == [True] * 3


def test_what_has_failed_is_not_waited_for_again():
    class Failed:
        def wait(self, timeout=None):
            raise OSError("connection reset")

    def program(carrier):
        meeting = Meeting(carrier, "test")
        meeting._handle = Failed()
        with pytest.raises(OSError, match="reset"):
            meeting.agree(20.0)
        meeting.announce(AVERAGE, 4, 0)
        return len(meeting.agree(20.0).intents)

    assert run_ranks(2, program, timeout=30.0) == [2] * 2
