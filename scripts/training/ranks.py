"""What the ranks of a job do together, besides training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def on_all_ranks(hvd: Any, action: Callable[[], T], *errors: type[Exception]) -> T:
    """Return `action()`; if it raises one of `errors` on any rank, end the job on all of them with the message.

    A rank that stopped alone would leave the others waiting for it.
    """
    message = None
    try:
        result = action()
    except errors as error:
        message = str(error)
    # Named, since Horovod would otherwise name it by its type, which differs here, and wait for ever.
    messages = hvd.allgather_object(message, name="train.error")
    failed = {rank: text for rank, text in enumerate(messages) if text is not None}
    if failed:
        where = "" if len(failed) == len(messages) else f" (on ranks {', '.join(map(str, failed))} only)"
        raise SystemExit(f"train.py: error: {next(iter(failed.values()))}{where}")
    return result


def require_same(hvd: Any, what: str, value: Any) -> None:
    """End the job on all ranks, with every rank's value, unless they are the same."""
    values = hvd.allgather_object(value, name="train.same")
    if any(other != values[0] for other in values):
        listed = "; ".join(f"rank {rank}: {other}" for rank, other in enumerate(values))
        raise SystemExit(f"train.py: error: the ranks have different {what}: {listed}")


def average_buffers(hvd: Any, model: torch.nn.Module) -> None:
    """Replace BatchNorm's statistics, which each rank gathers on its own data, by their mean over the ranks."""
    saved = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in saved and buffer.is_floating_point():
            buffer.copy_(hvd.allreduce(buffer, name=f"buffer.{name}"))


def ring_allreduce_nbytes(num_elements: int, num_ranks: int) -> int:
    """Bytes that each rank sends in a ring allreduce of float32: 2 (n - 1) / n * 4 d."""
    return 2 * (num_ranks - 1) * 4 * num_elements // num_ranks
