"""What every rank does under mpirun; see test_mpi.py. Arguments: folder for the results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest


def check_collectives(carrier) -> None:
    """Sizes differ, names come in another order on each rank, messages are larger than MPI sends eagerly."""
    rank, size = carrier.rank, carrier.size
    names = ["a", "b", "c"]
    for nbytes in (1, 1_000_000):
        handles = {}
        for name in names[rank % 3 :] + names[: rank % 3]:
            handles[name] = carrier.allgather(name, np.full((rank + 1) * nbytes, rank, np.uint8))
        for name in names:
            expected = np.concatenate([np.full((sender + 1) * nbytes, sender, np.uint8) for sender in range(size)])
            np.testing.assert_array_equal(handles[name].wait(30.0), expected)
        splits = [(rank + receiver) % 2 * nbytes for receiver in range(size)]
        received = carrier.alltoall("x", np.full(sum(splits), rank, np.uint8), splits).wait(30.0)
        parts = [np.full((sender + rank) % 2 * nbytes, sender, np.uint8) for sender in range(size)]
        np.testing.assert_array_equal(received, np.concatenate(parts))


def check_refusals(carrier) -> None:
    """Wrong arguments, and two names that MPI could not tell apart."""
    from pqasgd_horovod.errors import ArgumentError

    for payload, splits in ((np.zeros(4, np.uint8), [4]), (np.zeros(4, np.int8), [4] + [0] * (carrier.size - 1))):
        with pytest.raises(ArgumentError):
            carrier.alltoall("refused", payload, splits)
    num_tags, carrier._num_tags = carrier._num_tags, 1
    carrier.allgather("one name", np.zeros(1, np.uint8)).wait(30.0)
    with pytest.raises(ArgumentError, match="have the same MPI tag 0: rename one"):
        carrier.allgather("another name", np.zeros(1, np.uint8))
    carrier._num_tags = num_tags


def late_rank(carrier) -> list[str]:
    """The last rank comes late: the others time out, and can go on waiting."""
    from mpi4py import MPI

    from pqasgd_horovod.errors import ArgumentError, CollectiveTimeoutError

    payload = np.full(3, carrier.rank, np.uint8)
    errors = []
    world, last = MPI.COMM_WORLD, carrier.size - 1
    world.Barrier()
    if carrier.rank == last:
        for rank in range(last):
            world.recv(source=rank)
    handle = carrier.allgather("late", payload)
    if carrier.rank != last:
        try:
            handle.wait(1.0)
        except CollectiveTimeoutError as error:
            errors.append(str(error))
        try:
            carrier.allgather("late", payload)
        except ArgumentError as error:
            errors.append(str(error))
        world.send("given up", last)
    np.testing.assert_array_equal(handle.wait(30.0), np.repeat(np.arange(carrier.size), 3).astype(np.uint8))
    return errors


def main(folder: Path) -> None:
    """Do everything, and write what came out to ``folder``."""
    from mpi4py import MPI

    from pqasgd_horovod.exchange import verify_same
    from pqasgd_horovod.exchange.carriers.mpi import MpiCarrier

    from .world import METHODS, MPI_CODECS, build, make_values, outcome, run_round

    carrier = MpiCarrier(MPI.COMM_WORLD)
    rank, size = carrier.rank, carrier.size
    check_collectives(carrier)
    check_refusals(carrier)
    report: dict[str, object] = {"late": late_rank(carrier)}
    report["mismatch"] = outcome(lambda: verify_same(carrier, {"bits": 4 if rank else 2}, "hello", timeout=30.0))
    buckets = [1, 200, 2500]
    values = make_values(size, buckets)[rank]
    means = {}
    for method in METHODS:
        for name, codec in MPI_CODECS.items():
            exchange = build(carrier, codec, buckets, method=method, name=f"{method}.{name}")
            # Every rank begins with another bucket, so that second phases start in different orders.
            order = [(rank + number) % 3 for number in range(3)]
            key = f"{method}.{name}"
            report[key] = [
                outcome(lambda exchange=exchange, order=order: run_round(exchange, values, step=rank, order=order)),
                outcome(lambda exchange=exchange: run_round(exchange, values * (np.nan if rank == 1 else 1))),
            ]
            means[key] = np.concatenate(run_round(exchange, values, step=6, order=order))
            assert exchange.bytes_sent == 3 * exchange.predicted_bytes_per_round()
    np.savez(folder / f"means{rank}.npz", **means)
    (folder / f"report{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
