"""Settings for every test and doctest."""

import os

# Without a launcher Horovod would start MPI by itself, which needs more of an MPI installation than its wheel brings.
if not {"HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"} & os.environ.keys():
    os.environ.setdefault("HOROVOD_CONTROLLER", "gloo")
    os.environ.setdefault("HOROVOD_CPU_OPERATIONS", "gloo")
