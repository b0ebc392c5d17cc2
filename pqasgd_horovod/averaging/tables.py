"""Sparse gradients: of each the rows that a rank has used, coded, and their mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..exchange.base import Float32
from ..exchange.carriers import Carrier
from ..exchange.rows import Rows, RowsExchange, Table
from ..exchange.verdict import Kind, Problem, raise_verdict
from .config import ExchangeConfig


class SparseSpec(NamedTuple):
    """A gradient of which few rows are not zero."""

    name: str
    shape: tuple[int, ...]
    description: str

    @property
    def table(self) -> Table:
        """Its rows: what is outermost."""
        return Table(self.shape[0], math.prod(self.shape[1:]))

    def named(self, problem: Problem, table: int) -> Problem:
        """Return a problem of its exchange, which knows a number only, with the name."""
        return problem._replace(text=problem.text.replace(f"bucket {table}", f"the rows of {self.name!r}"))


class Tables:
    """The sparse gradients of one optimizer, each with an exchange, and a residual where there is feedback.

    A residual is as large as the whole table; what it keeps of a row is sent when the row is used again.
    """

    def __init__(
        self, specs: Sequence[SparseSpec], config: ExchangeConfig, carrier: Carrier, *, name: str, digest: int
    ) -> None:
        self._name = name
        self._nonfinite = config.nonfinite
        self._exchanges: dict[str, RowsExchange] = {}
        self._residuals: dict[str, Float32] = {}
        self._specs = {spec.name: spec for spec in specs}
        self._left: dict[str, tuple[Rows, Float32]] = {}  # of rows that are on their way: what is not sent of them
        for number, spec in enumerate(specs):
            codec = config.codec_of_rows(spec)
            self._exchanges[spec.name] = RowsExchange(
                codec,
                carrier,
                spec.table,
                name=f"{name}.rows.{number}",
                table=number,
                seed=config.seed_of_tables,
                digest=digest,
            )
            if config.feedback is not None and not codec.lossless:
                self._residuals[spec.name] = np.zeros(spec.table, np.float32)

    def byte_counts(self) -> tuple[int, int]:
        """Return the bytes sent and received so far."""
        exchanges = self._exchanges.values()
        return sum(each.bytes_sent for each in exchanges), sum(each.bytes_received for each in exchanges)

    def ready(self, name: str, gradient: Callable[[], Rows], step: int) -> None:
        """Encode and launch a gradient, each of its rows once; what was launched in this step stays as it is."""
        exchange = self._exchanges[name]
        if exchange.in_flight:
            return
        rows, residual = gradient(), None
        if name in self._residuals:
            kept = self._residuals[name][rows.numbers]
            residual = kept.reshape(-1), np.empty(kept.size, np.float32)
            self._left[name] = rows, residual[1].reshape(kept.shape)
        exchange.begin(rows, step=step, round=step, residual=residual)

    def finish(self) -> dict[str, Rows]:
        """Wait for all gradients, which are on their way, and return their means.

        Raises NonFiniteError, WireFormatError or DesynchronizedError, the same on every rank, when nothing is in
        flight.
        """
        means, problems = {}, []
        for name, exchange in self._exchanges.items():
            means[name], problem = exchange.finish()
            if problem is None:
                continue
            self._left.pop(name, None)
            if problem.kind is not Kind.NON_FINITE or self._nonfinite == "raise":
                problems.append(self._specs[name].named(problem, exchange.table))
        if problems:
            raise_verdict(self._name, problems)
        return means

    def commit(self) -> None:
        """Keep what the last round left of the rows that have a mean: it has succeeded, and its means are used."""
        for name, (rows, values) in self._left.items():
            self._residuals[name][rows.numbers] = values
        self._left.clear()

    def residuals(self) -> dict[str, Float32]:
        """Return what was not sent, by name: views."""
        return {name: residual.reshape(-1) for name, residual in self._residuals.items()}

    def restore(self, residuals: Mapping[str, Float32]) -> None:
        """Take over residuals; those that are not there begin anew."""
        for name, residual in self._residuals.items():
            residual.reshape(-1)[:] = residuals.get(name, 0.0)
