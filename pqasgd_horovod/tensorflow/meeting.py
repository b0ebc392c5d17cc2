"""Where the ranks tell each other what they are about to do: :mod:`pqasgd_horovod.averaging.meeting` in a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from ..averaging.meeting import Purpose, out_of_step_error
from ..averaging.pace import check_learning_rates
from ..exchange.carriers import Bytes
from ..exchange.handshake import HANDSHAKE_TIMEOUT_SECONDS
from .carrier import HorovodCarrier, allgather
from .library import ops, register_explainer


class MeetingPoint:
    """An allgather of small records, int64 vectors, always under the same name: in graphs, and outside of them.

    ``explain`` is given the records of all ranks, end to end, as bytes; it raises the error of ranks that are on
    different paths. In a graph it is only called if the records are not all alike.
    """

    def __init__(self, carrier: HorovodCarrier, name: str, explain: Callable[[Bytes], None]) -> None:
        self._carrier = carrier
        self._name = name
        self._explain = explain
        self._explainer = register_explainer(lambda flags, data: explain(data))

    def agree(self, record: tf.Tensor) -> tf.Operation:
        """Return the op that raises the same error on every rank unless all have sent the same record."""
        return self.agree_on(record)[0]

    def agree_on(self, record: tf.Tensor) -> tuple[tf.Operation, tf.Tensor]:
        """Return the op of :meth:`agree`, and the records of all ranks, end to end."""
        gathered = self._gather(record)
        return ops.pqasgd_agree(own=record, gathered=gathered, explainer=self._explainer), gathered

    def tell(self, record: Any, timeout: float | None) -> Bytes:
        """Send a record outside of graphs, whatever the other ranks are in; raise likewise, or return all records."""
        received = self._carrier.launch(self._name, self._gather, tf.constant(record, tf.int64)).wait(timeout)
        self._explain(received.view(np.uint8))
        return received

    def _gather(self, record: tf.Tensor) -> tf.Tensor:
        return allgather(record, self._name, self._carrier.process_set)


class Meeting:
    """The meeting point of one optimizer."""

    def __init__(self, carrier: HorovodCarrier, name: str) -> None:
        self._name = f"{name}.meeting"
        self._point = MeetingPoint(carrier, self._name, self._explain)

    def agree(self, purpose: Purpose, steps: tf.Tensor, rounds: tf.Tensor, detail: Any = 0) -> tf.Operation:
        """Return the op that raises DesynchronizedError on every rank unless all are about to do the same."""
        return self.agree_on_details(purpose, steps, rounds, detail)[0]

    def agree_on_details(
        self, purpose: Purpose, steps: tf.Tensor, rounds: tf.Tensor, detail: Any
    ) -> tuple[tf.Operation, tf.Tensor]:
        """Return the op of :meth:`agree`, and the details of all ranks.

        A detail is an int64, which :meth:`pqasgd_horovod.averaging.pace.Pace.detail` explains.
        """
        record = [tf.constant(int(purpose), tf.int64), steps, rounds, tf.cast(detail, tf.int64)]
        agreed, gathered = self._point.agree_on(tf.stack(record))
        return agreed, tf.reshape(gathered, [-1, 4])[:, 3]

    def tell(
        self,
        purpose: Purpose,
        steps: int,
        rounds: int,
        detail: int = 0,
        *,
        text: bytes = b"",
        timeout: float | None = HANDSHAKE_TIMEOUT_SECONDS,
    ) -> None:
        """Say outside of any graph what this rank is about to do, and raise likewise; ``text`` follows the record."""
        words = np.frombuffer(text + bytes(-len(text) % 8), np.int64)
        self._point.tell([int(purpose), steps, rounds, detail, *words.tolist()], timeout)

    def tell_details(self, purpose: Purpose, steps: int, rounds: int, detail: int) -> list[int]:
        """Do what :meth:`tell` does, for as long as it takes, and return the details of all ranks."""
        received = self._point.tell([int(purpose), steps, rounds, detail], None)
        details: list[int] = received.view(np.int64).reshape(-1, 4)[:, 3].tolist()
        return details

    def _explain(self, data: Bytes) -> None:
        records = data.view(np.int64).reshape(-1, 4).tolist()
        intents = [(Purpose(purpose), steps, rounds) for purpose, steps, rounds, _ in records]
        if len(set(intents)) > 1:
            raise out_of_step_error(self._name, intents)
        check_learning_rates([detail & 2**64 - 1 for *_, detail in records])
