"""Where the ranks tell each other what they are about to do: :mod:`pqasgd_horovod.averaging.meeting` in a graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from ..averaging.meeting import Purpose, out_of_step_error
from ..averaging.pace import check_learning_rates
from ..exchange.carriers import Bytes
from .carrier import HorovodCarrier, HorovodHandle, allgather
from .library import ops, register_explainer


class Meeting:
    """The meeting point of one optimizer."""

    def __init__(self, carrier: HorovodCarrier, name: str) -> None:
        self._carrier = carrier
        self._name = f"{name}.meeting"
        self._explainer = register_explainer(self._explain)

    def agree(
        self, purpose: Purpose, steps: tf.Tensor, rounds: tf.Tensor, detail: Any = 0
    ) -> tuple[tf.Operation, tf.Tensor]:
        """Return the op that raises DesynchronizedError on every rank unless all are about to do the same.

        And the ranks' details, int64, which :meth:`Pace.detail <pqasgd_horovod.averaging.pace.Pace.detail>` explains.
        """
        record = tf.stack([tf.constant(int(purpose), tf.int64), steps, rounds, tf.cast(detail, tf.int64)])
        gathered = self._gather(record)
        agreed = ops.pqasgd_agree(own=record, gathered=gathered, explainer=self._explainer)
        return agreed, tf.reshape(gathered, [-1, 4])[:, 3]

    def announce(self, purpose: Purpose, steps: int, rounds: int, detail: int = 0) -> HorovodHandle:
        """Say, outside of any graph, what this rank is about to do; :meth:`check` takes what the handle brings."""
        record = np.array([int(purpose), steps, rounds, detail], np.int64)
        return self._carrier.launch(self._name, self._gather, tf.constant(record))

    def check(self, received: Bytes) -> list[int]:
        """Raise DesynchronizedError unless all ranks are about to do the same; return their details."""
        self._explain(0, received.view(np.uint8))
        details: list[int] = received.view(np.int64).reshape(-1, 4)[:, 3].tolist()
        return details

    def _gather(self, record: Any) -> tf.Tensor:
        return allgather(record, self._name, self._carrier.process_set)

    def _explain(self, flags: int, data: Bytes) -> None:
        records = data.view(np.int64).reshape(-1, 4).tolist()
        intents = [(Purpose(purpose), steps, rounds) for purpose, steps, rounds, _ in records]
        if len(set(intents)) > 1:
            raise out_of_step_error(self._name, intents)
        check_learning_rates([detail & 2**64 - 1 for *_, detail in records])
