"""Settings for every test and doctest."""

import os

from tests import heap

# Without a launcher Horovod would start MPI by itself, which needs more of an MPI installation than its wheel brings.
if not {"HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"} & os.environ.keys():
    os.environ.setdefault("HOROVOD_CONTROLLER", "gloo")
    os.environ.setdefault("HOROVOD_CPU_OPERATIONS", "gloo")


def pytest_collection_finish() -> None:
    """Let collections pass over all that pytest knows of thousands of tests."""
    heap.set_aside()
