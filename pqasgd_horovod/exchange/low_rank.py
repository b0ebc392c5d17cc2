r"""Low rank: of each matrix two factors are averaged, one after the other, as they are; PowerSGD.

With the start :math:`Q` that all ranks have, orthonormal(.) by Gram-Schmidt, and means over the ranks i,

.. math:: P = \mathrm{mean}_i (M_i Q), \quad \hat P = \mathrm{orthonormal}(P), \quad
          Q' = \mathrm{mean}_i (M_i^T \hat P), \quad \text{mean} = \hat P Q'^T.

Both means are exchanges of their own, in float32, which check their messages and agree on what is wrong with them: if
something is with the first, no rank begins the second. The source's residual becomes
:math:`M_i - \hat P (M_i^T \hat P)^T`, and the next start is orthonormal(:math:`Q'`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .. import codecs, native
from ..errors import ArgumentError
from .base import MEANS_PHASE, VALUES_PHASE, Exchange, Flight, Float32, Landed, NonFinitePolicy
from .carriers import Carrier, Handle, Messages
from .plan import make_exchange
from .verdict import Problem


class _Factor:
    """One factor of all matrices: of each bucket this rank's own, the mean, and the exchange between them."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        sizes = exchange.buckets
        self.own = [np.zeros(size, np.float32) for size in sizes]
        self.mean = [np.zeros(size, np.float32) for size in sizes]
        self._sources = [native.Source.from_arrays([own]) for own in self.own]

    def begin(self, flight: Flight) -> Landed:
        """Launch the mean of one bucket."""
        self.exchange.begin(flight.bucket, self._sources[flight.bucket], 0, step=flight.step, round=flight.round)
        return Landed(self.exchange, flight.bucket)

    def take(self, bucket: int) -> Problem | None:
        """Take it when it has arrived; return what is wrong with it, the same on every rank."""
        problem = self.exchange._take(bucket, self.mean[bucket])
        self.exchange._forget()
        return problem


class LowRankExchange(Exchange):
    """Averages matrices by way of factors of ``approximation_rank``; whole matrices make a bucket.

    ``matrices`` has of each bucket the matrices, (rows, columns). ``method`` is that of the exchange of both factors.
    Sources need a next residual. The first start of matrix t, counted over all buckets, and a vector of a later one
    that has become 0 after step s, are drawn from ``derive_shared_key(seed, step, t)`` of step 0 and s.
    """

    method = "low_rank"

    def __init__(
        self,
        approximation_rank: int,
        carrier: Carrier,
        matrices: Sequence[Sequence[tuple[int, int]]],
        *,
        name: str,
        seed: int,
        digest: int,
        method: str = "auto",
        nonfinite: NonFinitePolicy = "raise",
    ) -> None:
        self._native = [native.Matrices(shapes, approximation_rank) for shapes in matrices]
        sizes = [bucket.numel for bucket in self._native]
        super().__init__(codecs.none(), carrier, sizes, name=name, seed=seed, digest=digest, nonfinite=nonfinite)

        def factor(side: str, numels: Sequence[int]) -> _Factor:
            exchange = make_exchange(
                self.codec, carrier, numels, name=f"{name}.{side}", seed=seed, digest=digest, method=method
            )
            return _Factor(exchange)

        self._left = factor("left", [bucket.left_numel for bucket in self._native])
        self._right = factor("right", [bucket.right_numel for bucket in self._native])
        self._found: dict[int, Problem | None] = {}
        # Where the start of each matrix lies: in which bucket, and there.
        self._places: list[tuple[int, slice]] = []
        self._first: list[int] = []  # matrix of each bucket
        for bucket, shapes in enumerate(matrices):
            self._first.append(len(self._places))
            at = 0
            for _, cols in shapes:
                self._places.append((bucket, slice(at, at + approximation_rank * cols)))
                at += approximation_rank * cols
        self._starts = [np.zeros(bucket.right_numel, np.float32) for bucket in self._native]
        self.restore([None] * len(self._places))
        self._next_starts = [start.copy() for start in self._starts]

    def predicted_bytes_per_round(self) -> int:
        """Return what this rank sends in a round of all buckets, headers included."""
        return sum(factor.exchange.predicted_bytes_per_round() for factor in (self._left, self._right))

    def start(self, matrix: int) -> Float32:
        """Return where the next iteration of a matrix starts: a view, the same on every rank."""
        bucket, place = self._places[matrix]
        return self._starts[bucket][place]

    def restore(self, starts: Sequence[Float32 | None]) -> None:
        """Take over the start of each matrix; None: the one that is drawn at first.

        Raises ArgumentError for one of another size, and changes nothing then.
        """
        for matrix, start in enumerate(starts):
            if start is not None and start.size != self.start(matrix).size:
                raise ArgumentError(
                    f"the saved factor of matrix {matrix} has {start.size} numbers, here it has "
                    f"{self.start(matrix).size}: the state is of another model"
                )
        for matrix, start in enumerate(starts):
            self.start(matrix)[:] = 0 if start is None else start
        for native_matrices, first, right in zip(self._native, self._first, self._starts, strict=True):
            native_matrices.redraw(self._seed, 0, first, right)

    def commit(self) -> None:
        """Start where the last round has ended."""
        for bucket in self.averaged:
            self._starts[bucket], self._next_starts[bucket] = self._next_starts[bucket], self._starts[bucket]

    def _launch(self, flight: Flight) -> Handle:
        bucket = flight.bucket
        self._native[bucket].project(flight.source, flight.start, self._starts[bucket], self._left.own[bucket])
        return self._begin(self._left, flight)

    def _begin(self, factor: _Factor, flight: Flight) -> Handle:
        arrival = factor.begin(flight)
        self._count_bytes()
        return arrival

    def _count_bytes(self) -> None:
        self.bytes_sent = self._left.exchange.bytes_sent + self._right.exchange.bytes_sent
        self.bytes_received = self._left.exchange.bytes_received + self._right.exchange.bytes_received

    def _arrived(self, flight: Flight, received: Messages) -> Handle | None:
        bucket = flight.bucket
        factor = self._left if flight.phase == VALUES_PHASE else self._right
        problem = self._found[bucket] = factor.take(bucket)
        self._count_bytes()
        if problem is not None or flight.phase == MEANS_PHASE:
            return None
        matrices, left = self._native[bucket], self._left.mean[bucket]
        matrices.orthogonalize("left", left)
        matrices.backproject(flight.source, flight.start, left, self._right.own[bucket])
        flight.phase = MEANS_PHASE
        return self._begin(self._right, flight)

    def _land(self, flight: Flight, mean: Float32) -> Problem | None:
        bucket = flight.bucket
        problem = self._found.pop(bucket)
        if problem is not None:
            return problem
        matrices, right = self._native[bucket], self._right.mean[bucket]
        matrices.reconstruct(
            flight.source, flight.start, self._left.mean[bucket], self._right.own[bucket], right, flight.base, mean
        )
        following = self._next_starts[bucket]
        following[:] = right
        matrices.orthogonalize("right", following)
        matrices.redraw(self._seed, flight.step, self._first[bucket], following)
        return None
