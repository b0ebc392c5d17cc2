"""An exchange that goes on beside the next runs of a graph: :mod:`pqasgd_horovod.averaging.background` for TensorFlow.

A graph cannot leave anything running. So it lets Python start a thread, once for each average, which runs a graph of
its own; and waits for it, so many steps later, in an op that takes no thread of TensorFlow's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from ..averaging.background import Background
from ..exchange.carriers import Bytes
from .library import close_gate, open_gate, ops, register_explainer, translate
from .traced import after

_gates = itertools.count(1)


class DelayedExchange:
    """Calls ``exchange(fragment)``, eagerly, in a thread; one average at a time.

    An average is known by its *ticket*: the steps when it began, and the fragment. One that was restored from a
    checkpoint has no thread yet; whoever waits for it lets it begin.
    """

    def __init__(self, exchange: Callable[[int], None]) -> None:
        self._exchange = exchange
        self._gate = next(_gates)
        self._explainer = register_explainer(self._raise)
        self._ticket: tuple[int, ...] | None = None
        self._thread: Background[None] | None = None
        self.error: Exception | None = None
        """What went wrong with the last one."""

    def start(self, ticket: tf.Tensor) -> tf.Operation:
        """Return the op that lets an average begin."""
        return tf.numpy_function(self._start, [ticket], [])

    def wait(self, ticket: tf.Tensor) -> tf.Tensor:
        """Return what is not 0 if it has failed, when it is over."""
        with after(tf.numpy_function(self._take, [ticket], [])):
            return ops.pqasgd_await(gate=self._gate)

    def verdict(self, failed: tf.Tensor) -> tf.Operation:
        """Return the op that raises its error, if it has failed."""
        return ops.pqasgd_verdict(flags=[failed], explainer=self._explainer)

    def join(self, timeout: float | None = None) -> None:
        """Wait outside of graphs; raise CollectiveTimeoutError after ``timeout`` seconds."""
        if self._thread is not None:
            self._thread.wait(timeout)

    def _start(self, ticket: np.ndarray) -> None:
        asked = tuple(ticket.tolist())
        if asked == self._ticket:
            return
        self.join()  # one of a state that was replaced since
        self._ticket, self.error = asked, None
        close_gate(self._gate)
        self._thread = Background(lambda: self._run(asked[-1]))

    def _take(self, ticket: np.ndarray) -> None:
        self._start(ticket)
        self._ticket = None  # the next one may have the same, after a state was restored

    def _run(self, fragment: int) -> None:
        try:
            self._exchange(fragment)
        except tf.errors.OpError as error:
            self.error = translate(error)
        except Exception as error:  # it is raised where it is waited for
            self.error = error
        open_gate(self._gate, self.error is not None)

    def _raise(self, flags: int, data: Bytes) -> None:
        if self.error is not None:
            raise self.error
