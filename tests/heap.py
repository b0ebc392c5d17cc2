"""What is on the heap of a process that runs many tests."""

from __future__ import annotations

import gc


def set_aside() -> None:
    """Free what is dead, and let later collections, and searches of the heap, pass over what is alive.

    TensorFlow never lets go of what it has traced, and a test session is large by itself. Every full collection would
    walk through the graphs of all tests before, as would the search for the model of an optimizer: measured on two
    ranks, half of the processor time of all tests, some of it in pauses of a minute.
    """
    gc.collect()
    gc.freeze()
