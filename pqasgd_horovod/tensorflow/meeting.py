"""Where the ranks tell each other what they are about to do: :mod:`pqasgd_horovod.averaging.meeting` in a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from ..averaging.meeting import Agreement, Intent, Purpose, out_of_step_error
from ..averaging.pace import check_learning_rates
from ..exchange.carriers import Bytes
from ..exchange.handshake import HANDSHAKE_TIMEOUT_SECONDS
from .carrier import HorovodCarrier, allgather
from .library import ops, register_explainer
from .places import on_host
from .traced import after


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
        with on_host():
            gathered = self._gather(record)
            return ops.pqasgd_agree(own=record, gathered=gathered, explainer=self._explainer), gathered

    def tell(self, record: Any, timeout: float | None) -> Bytes:
        """Send a record outside of graphs, whatever the other ranks are in; raise likewise, or return all records."""
        received = self._carrier.launch(self._name, self._gather, tf.constant(record, tf.int64)).wait(timeout)
        self._explain(received.view(np.uint8))
        return received

    def _gather(self, record: tf.Tensor) -> tf.Tensor:
        return allgather(record, self._name, self._carrier.process_set)


class Records(NamedTuple):
    """What all ranks have said in a meeting: :class:`pqasgd_horovod.averaging.meeting.Agreement` in a graph."""

    words: tf.Tensor  # int64: purpose, steps, rounds and detail of each rank

    @property
    def details(self) -> tf.Tensor:
        """The details of all ranks."""
        return self.words[:, 3]

    @property
    def scale(self) -> tf.Tensor:
        """What a mean, in which ranks without data are zeros, is multiplied by; 1 where there are none."""
        with on_host():
            counts = tf.not_equal(self.words[:, 0], int(Purpose.JOINED))
            num_counted = tf.reduce_sum(tf.cast(counts, tf.float64))
            return tf.cast(tf.cast(tf.size(counts), tf.float64) / num_counted, tf.float32)


class Meeting:
    """The meeting point of one optimizer."""

    def __init__(self, carrier: HorovodCarrier, name: str) -> None:
        self._name = f"{name}.meeting"
        self._point = MeetingPoint(carrier, self._name, self._explain)

    def agree(self, purpose: Purpose, steps: tf.Tensor, rounds: tf.Tensor, detail: Any = 0) -> Records:
        """Return what all ranks say, when they go together; DesynchronizedError is raised on every rank if they do not.

        All do the same, or those that have more data do. A detail is an int64, which
        :meth:`pqasgd_horovod.averaging.pace.Pace.detail` explains.
        """
        with on_host():
            record = tf.stack([tf.constant(int(purpose), tf.int64), steps, rounds, tf.cast(detail, tf.int64)])
        agreed, gathered = self._point.agree_on(record)
        with after(agreed), on_host():
            return Records(tf.reshape(gathered, [-1, 4]))

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

    def meet(self, purpose: Purpose, steps: int, rounds: int, detail: int = 0) -> tuple[Agreement, Records]:
        """Do what :meth:`tell` does, for as long as it takes, and return what all ranks say, for Python and a graph."""
        received = self._point.tell([int(purpose), steps, rounds, detail], None).view(np.int64).reshape(-1, 4)
        return _agreement_of(received), Records(tf.constant(received))

    def _explain(self, data: Bytes) -> None:
        met = _agreement_of(data.view(np.int64).reshape(-1, 4))
        training = {intent[:3] for intent in met.intents if not intent.has_ended}
        some_average = any(purpose is Purpose.AVERAGE for purpose, *_ in training)
        some_have_ended = any(intent.has_ended for intent in met.intents)
        if len(training) > 1 or (training and some_have_ended and not some_average):
            raise out_of_step_error(self._name, [intent[:3] for intent in met.intents])
        check_learning_rates(met.details_of_training)


def _agreement_of(records: np.ndarray) -> Agreement:
    return Agreement(
        [
            Intent(Purpose(purpose), steps, rounds, detail & 2**64 - 1)
            for purpose, steps, rounds, detail in records.tolist()
        ]
    )
