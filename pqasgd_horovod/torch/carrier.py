"""Horovod's torch collectives as a carrier of coded bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, cast

import horovod.torch as horovod
import numpy as np
import torch

from ..averaging.construction import check_process_set
from ..errors import ArgumentError, CollectiveTimeoutError
from ..exchange.carriers import Memory, Messages, wait_until
from . import devices


class HorovodHandle(Generic[Memory]):
    """One collective in flight; it can be waited for again after a timeout."""

    def __init__(self, handle: int, name: str, sent: Memory) -> None:
        self._handle = handle
        self._name = name
        self._sent = sent
        self._result: Memory | None = None

    def done(self) -> bool:
        """Return whether :meth:`wait` would return at once."""
        return self._result is not None or bool(horovod.poll(self._handle))

    def wait(self, timeout: float | None = None) -> Memory:
        """Block until the collective is complete and return the received bytes, in rank order.

        Raises CollectiveTimeoutError after ``timeout`` seconds (None: never); the collective then stays in flight.
        """
        if self._result is None:
            # Horovod's own wait spins on a core that its background thread may need.
            if not wait_until(self.done, timeout):
                raise CollectiveTimeoutError(
                    f"collective {self._name!r}: not every rank took part within {timeout:g} s; "
                    "every rank has to make the same sequence of collective calls"
                )
            received: Any = horovod.synchronize(self._handle)
            # An alltoall also returns how much came from whom; the sizes are known here.
            output = received[0] if isinstance(received, tuple) else received
            sent: Messages = self._sent
            result = output.numpy() if isinstance(sent, np.ndarray) else devices.from_tensor(output, sent.device)
            self._result = cast("Memory", result)
        return self._result


class HorovodCarrier:
    """Carry uint8 arrays with ``horovod.torch`` allgather and alltoall, without copying what is sent.

    Where Horovod has NCCL it carries memory of GPUs, too, if all ranks send such memory under a name. Calls are matched
    between ranks by name. ``rank`` and ``size`` are those of the process set; Horovod must be initialised and this
    process must belong to the set. What is sent must not change until its handle is done.

    It does not depend on the thread's inference mode, since Horovod resizes what it receives on a thread of its own.
    """

    def __init__(self, process_set: Any = horovod.global_process_set) -> None:
        check_process_set(horovod, process_set)
        if not process_set.included():
            raise ArgumentError(f"process_set: rank {horovod.rank()} does not belong to {process_set}")
        self._process_set = process_set
        self.rank: int = process_set.rank()
        self.size: int = process_set.size()

    def allgather(self, name: str, payload: Memory) -> HorovodHandle[Memory]:
        """Start to send ``payload`` to all; the result is the payloads of all ranks, in rank order."""
        with torch.inference_mode(False):
            handle = horovod.allgather_async(_as_tensor(payload), name=name, process_set=self._process_set)
        return HorovodHandle(handle, name, payload)

    def alltoall(self, name: str, payload: Memory, splits: Sequence[int]) -> HorovodHandle[Memory]:
        """Start to send the consecutive parts of ``payload``, ``splits[r]`` bytes to rank r."""
        with torch.inference_mode(False):
            pieces = torch.tensor(splits, dtype=torch.int32, device="cpu")
            handle = horovod.alltoall_async(
                _as_tensor(payload), splits=pieces, name=name, process_set=self._process_set
            )
        return HorovodHandle(handle, name, payload)


def _as_tensor(payload: Messages) -> torch.Tensor:
    if not isinstance(payload, np.ndarray):
        return devices.to_tensor(payload)
    # torch has no read-only tensors and warns about a view of a read-only array: such arrays are small, copy them.
    return torch.from_numpy(payload if payload.flags.writeable else payload.copy())
