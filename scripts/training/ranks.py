"""What the ranks of a job do together, besides training; `hvd` is Horovod's module of whichever framework."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from training.arguments import CASTS, QUANTIZERS

T = TypeVar("T")


def threads_per_rank(hvd: Any, args: argparse.Namespace) -> int:
    """Return how many threads this rank is to compute with: the cores are for all ranks of a machine."""
    return args.threads or max(1, len(os.sched_getaffinity(0)) // hvd.local_size())


def compression_of(hvd: Any, args: argparse.Namespace) -> Any:
    """Return what the command line means by --compression and --bits."""
    if args.stock:
        return hvd.Compression.none
    compression = getattr(hvd.Compression, args.compression)
    if args.compression in QUANTIZERS:
        return compression(bits=args.bits)
    return compression if args.compression in CASTS else compression()


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
        raise SystemExit(f"{program()}: error: {next(iter(failed.values()))}{where}")
    return result


def require_same(hvd: Any, what: str, value: Any) -> None:
    """End the job on all ranks, with every rank's value, unless they are the same."""
    values = hvd.allgather_object(value, name="train.same")
    if any(other != values[0] for other in values):
        listed = "; ".join(f"rank {rank}: {other}" for rank, other in enumerate(values))
        raise SystemExit(f"{program()}: error: the ranks have different {what}: {listed}")


def program() -> str:
    """Return the name that messages begin with, as argparse has it."""
    return os.path.basename(sys.argv[0])


def ring_allreduce_nbytes(num_elements: int, num_ranks: int) -> int:
    """Bytes that each rank sends in a ring allreduce of float32: 2 (n - 1) / n * 4 d."""
    return 2 * (num_ranks - 1) * 4 * num_elements // num_ranks
