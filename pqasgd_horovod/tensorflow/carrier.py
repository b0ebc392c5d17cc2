"""Horovod's TensorFlow collectives as a carrier of bytes: for what ranks say to each other outside of graphs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import horovod.tensorflow as horovod
import numpy as np
import tensorflow as tf
from horovod.tensorflow import mpi_ops

from ..averaging.construction import check_process_set
from ..errors import ArgumentError, CollectiveTimeoutError
from ..exchange.carriers import Bytes
from ..exchange.carriers.nodes import NodesCarrier

HOST = "/device:CPU:0"


class HorovodHandle:
    """One collective in flight; it can be waited for again after a timeout."""

    def __init__(self, run: Callable[[], Bytes], name: str) -> None:
        self._name = name
        self._result: Bytes | None = None
        self._error: Exception | None = None

        def body() -> None:
            try:
                self._result = run()
            except Exception as error:  # handed to whoever waits
                self._error = error

        # Horovod's TensorFlow ops return when they are complete, so somebody has to stay with them.
        self._thread = threading.Thread(target=body, name=name, daemon=True)
        self._thread.start()

    def done(self) -> bool:
        """Return whether :meth:`wait` would return at once."""
        return not self._thread.is_alive()

    def wait(self, timeout: float | None = None) -> Bytes:
        """Block until the collective is complete and return the received bytes, in rank order.

        Raises CollectiveTimeoutError after ``timeout`` seconds (None: never); the collective then stays in flight.
        """
        self._thread.join(timeout)
        if self._error is not None:
            raise self._error
        if self._result is None:
            raise CollectiveTimeoutError(
                f"collective {self._name!r}: not every rank took part within {timeout:g} s; "
                "every rank has to make the same sequence of collective calls"
            )
        return self._result


class HorovodCarrier:
    """Carry uint8 arrays with ``horovod.tensorflow`` allgather and alltoall.

    Calls are matched between ranks by name. ``rank`` and ``size`` are those of the process set; Horovod must be
    initialised and this process must belong to the set.
    """

    def __init__(self, process_set: Any = horovod.global_process_set) -> None:
        check_process_set(horovod, process_set)
        if not process_set.included():
            raise ArgumentError(f"process_set: rank {horovod.rank()} does not belong to {process_set}")
        self.process_set = process_set
        self.rank: int = process_set.rank()
        self.size: int = process_set.size()
        self.nodes: NodesCarrier | None = None
        """Which ranks share a node, where coded numbers travel between nodes only."""
        self._functions: dict[tuple[str, tuple[int, ...]], Any] = {}

    @property
    def ranks_per_node(self) -> int | None:
        """How many share a node, where that matters."""
        return None if self.nodes is None else self.nodes.local.size

    def allgather(self, name: str, payload: Bytes) -> HorovodHandle:
        """Start to send ``payload`` to all; the result is the payloads of all ranks, in rank order."""
        return self.launch(name, lambda tensor: allgather(tensor, name, self.process_set), tf.constant(payload))

    def alltoall(self, name: str, payload: Bytes, splits: Sequence[int]) -> HorovodHandle:
        """Start to send the consecutive parts of ``payload``, ``splits[r]`` bytes to rank r."""

        def collective(tensor: tf.Tensor) -> tf.Tensor:
            return alltoall(tensor, splits, name, self.process_set)

        return self.launch(name, collective, tf.constant(payload), *splits)

    def launch(
        self, name: str, collective: Callable[[tf.Tensor], tf.Tensor], vector: tf.Tensor, *options: int
    ) -> HorovodHandle:
        """Start a collective that nobody but its name tells from others; the result is what it returns, as an array.

        ``options`` are what it knows besides the vector: it is traced once for each.
        """
        # An eager op has no name of its own, a node of a graph has.
        key = (name, options)
        if key not in self._functions:
            # A concrete one: TensorFlow warns of a function that is traced for name after name.
            signature = tf.TensorSpec([None], vector.dtype)
            self._functions[key] = tf.function(collective, autograph=False).get_concrete_function(signature)
        function = self._functions[key]

        def run() -> Bytes:
            received: Bytes = np.asarray(function(vector))
            return received

        return HorovodHandle(run, name)


@contextlib.contextmanager
def constant_names() -> Iterator[None]:
    """Let collectives have the names that they are given; without it a second one in a graph would get a number.

    So whoever may come twice in one graph has to see to it that the first is over by then.
    """
    with tf.name_scope("pqasgd"):  # which gets the number, and is left out where ``ignore_name_scope``
        yield


def allgather(tensor: tf.Tensor, name: str, process_set: Any, device: str = HOST) -> tf.Tensor:
    """Horovod's allgather of a tensor, matched by ``name`` whatever scopes and functions it is traced in.

    It takes host memory, also where Horovod has NCCL, unless there is another ``device``.
    """
    with constant_names(), tf.device(device):
        return mpi_ops.allgather(tensor, name=name, ignore_name_scope=True, process_set=process_set)


def alltoall(tensor: tf.Tensor, splits: Sequence[int], name: str, process_set: Any) -> tf.Tensor:
    """Horovod's alltoall of a tensor's parts, matched by ``name`` likewise."""
    with constant_names(), tf.device(HOST):
        received, _ = mpi_ops.alltoall(
            tensor, tf.constant(splits, tf.int32), name=name, ignore_name_scope=True, process_set=process_set
        )
    return received
