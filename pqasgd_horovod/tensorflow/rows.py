"""Sparse gradients as a graph: :mod:`pqasgd_horovod.exchange.rows`, pack, allgather, land."""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from ..averaging import ExchangeConfig
from ..averaging.tables import SparseSpec
from ..exchange.base import VALUES_PHASE
from ..exchange.carriers import Bytes
from ..exchange.rows import payload_nbytes
from ..exchange.verdict import explain
from .carrier import HorovodCarrier, allgather
from .graph import Problems, Round, own_header, signed
from .library import ops, register_explainer
from .places import hosted


class Landed(NamedTuple):
    """What an exchange has brought; it means something where ``flags`` are 0."""

    mean: tf.IndexedSlices
    flags: tf.Tensor
    rows: tf.Tensor  # this rank's own
    left: tf.Tensor  # of them: what was not sent
    nbytes: tuple[tf.Tensor, tf.Tensor]  # sent and received


class GraphRows:
    """The exchange of one sparse gradient; with feedback ``residual`` is the float32 variable (rows, row size)."""

    def __init__(
        self, spec: SparseSpec, config: ExchangeConfig, carrier: HorovodCarrier, *, name: str, table: int, digest: int,
        problems: Problems, residual: tf.Variable | None,
    ) -> None:  # fmt: skip
        self._spec, self._codec = spec, config.codec_of_rows(spec)
        self._carrier, self._table, self._digest, self._problems = carrier, table, digest, problems
        self._name = f"{name}.rows.{table}"
        self._residual = residual
        self._attributes: dict[str, Any] = {
            "codec": list(self._codec.native_spec),
            "table": table,
            "num_rows": spec.table.num_rows,
            "row_size": spec.table.row_size,
            "rank": carrier.rank,
            "size": carrier.size,
            "digest": signed(digest),
            "seed": signed(config.seed_of_tables),
        }

    @hosted
    def exchange(self, gradient: tf.IndexedSlices, round: Round) -> Landed:
        """Exchange a gradient."""
        rows, values = _rising(gradient, self._spec.table.row_size)
        kept = tf.zeros([0]) if self._residual is None else tf.gather(self._residual.value(), rows)
        message, left = ops.pqasgd_pack_rows(
            step=round.step, round=round.number, rows=rows, values=values, kept=kept, **self._attributes
        )
        received = allgather(message, self._name, self._carrier.process_set)
        numbers, means, flags = ops.pqasgd_land_rows(
            step=round.step,
            round=round.number,
            received=received,
            scale=round.scale,
            explainer=register_explainer(self._explain),
            **self._attributes,
        )
        means = tf.cast(means, gradient.values.dtype)
        means = tf.reshape(means, [-1, *self._spec.shape[1:]])
        mean = tf.IndexedSlices(means, tf.cast(numbers, gradient.indices.dtype), gradient.dense_shape)
        own, all_of_it = tf.size(message, tf.int64), tf.size(received, tf.int64)
        return Landed(mean, flags, rows, left, ((self._carrier.size - 1) * own, all_of_it - own))

    def nothing(self) -> tf.IndexedSlices:
        """Return no rows, for a rank that is absent."""
        shape = self._spec.shape
        return tf.IndexedSlices(tf.zeros([0, *shape[1:]]), tf.zeros([0], tf.int64), tf.constant(shape, tf.int64))

    @hosted
    def keep(self, landed: Landed) -> None:
        """Keep what was not sent, if there is a mean; after the verdict."""
        if self._residual is not None:
            kept = tf.gather(self._residual.value(), landed.rows)
            left = tf.where(tf.equal(landed.flags, 0), landed.left, kept)
            self._residual.scatter_update(tf.IndexedSlices(left, landed.rows))

    def _explain(self, flags: int, received: Bytes) -> None:
        size, rank = self._carrier.size, self._carrier.rank
        expected = own_header(received, size, rank, self._digest, self._table, 0, VALUES_PHASE)
        problem = explain(flags, received, expected, range(size), payload_nbytes(self._codec, self._spec.table))
        self._problems.note(self._spec.named(problem, self._table))


def _rising(gradient: tf.IndexedSlices, row_size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the rows of a gradient, rising and each once, and their values, added up in the order they came in."""
    order = tf.argsort(gradient.indices, stable=True)
    rows, positions = tf.unique(tf.gather(tf.cast(gradient.indices, tf.int64), order))
    values = tf.math.segment_sum(tf.gather(gradient.values, order), positions)
    return rows, tf.reshape(values, [-1, row_size])
