"""One rank: the mean of one is itself, and nothing is sent."""

from __future__ import annotations

import numpy as np

from .. import native
from ..codecs.cast import NoCompression
from ..keys import Keys
from .base import Exchange, Flight, Float32
from .carriers import Handle, Messages
from .verdict import Kind, Problem

_EXACT = NoCompression().native_spec


class LocalExchange(Exchange):
    """The exchange of a world of size 1: ``mean = values`` exactly; NaN and Inf are treated as in any world."""

    method = "local"

    def predicted_bytes_per_round(self) -> int:
        """Return what this rank sends in a round of all buckets, headers included."""
        return 0

    def _launch(self, flight: Flight) -> Handle | None:
        return None

    def _arrived(self, flight: Flight, received: Messages) -> Handle | None:
        raise AssertionError("nothing is sent, so nothing arrives")

    def _land(self, flight: Flight, mean: Float32) -> Problem | None:
        # The payload of the codec "none" is the float32 numbers themselves: one walk that copies and checks.
        if not native.encode(_EXACT, flight.source, flight.start, mean.size, Keys(0), mean.view(np.uint8)):
            text = f"rank 0 had NaN, Inf or a number beyond float32's range in bucket {flight.bucket}"
            return Problem(Kind.NON_FINITE, flight.bucket, text)
        if flight.base is not None:
            np.add(flight.base, mean, out=mean)
        return None
