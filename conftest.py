"""Settings for every test and doctest."""

import contextlib
import os

from tests import heap

# Triton, which PyTorch's build for CUDA loads with the first optimizer, crashes where TensorFlow was loaded before it.
with contextlib.suppress(ImportError):
    import triton  # noqa: F401

# Without a launcher Horovod would start MPI by itself, which needs more of an MPI installation than its wheel brings.
if not {"HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"} & os.environ.keys():
    os.environ.setdefault("HOROVOD_CONTROLLER", "gloo")
    os.environ.setdefault("HOROVOD_CPU_OPERATIONS", "gloo")


def pytest_collection_finish() -> None:
    """Let collections pass over all that pytest knows of thousands of tests."""
    heap.set_aside()
