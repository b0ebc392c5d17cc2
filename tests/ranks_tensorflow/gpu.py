"""A GPU that is none: TensorFlow's second CPU (conftest.py), where variables are somewhere else.

Ops there run the kernels of GPUs, compiled for CPUs (tests/native/cuda_on_cpu): those of a label, since TensorFlow
takes the device for what it is.
"""

from __future__ import annotations

import ctypes

import pytest
import tensorflow as tf

import pqasgd_horovod.tensorflow as hvd
from pqasgd_horovod.native import cuda
from pqasgd_horovod.tensorflow import places
from tests.native.cuda_on_cpu import build

NAME = "CPU:1"
OPS = ("Pack", "Mean", "Land", "Relay", "Keep", "Distance", "Outer", "Commit", "Scatter", "Snapshot", "Rebase")
"""Ops that have a kernel for GPUs."""
_create = tf.Graph._create_op_helper
_LABELS = {f"Pqasgd{name}": "pqasgd_gpu" for name in OPS}


class Pretended:
    """What the tests are told of the GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        path = build() if hvd.rank() == 0 else None
        self.path = str(hvd.broadcast_object(path, 0, name="test.kernels"))
        self._library = ctypes.CDLL(self.path)
        self._labels: dict[str, str] = {}
        forget_kernels()

    def begin(self, *, has_kernels: bool = True) -> None:
        """Let the second CPU be a GPU from now on, with kernels or without."""
        self._labels.clear()
        self._labels.update(_LABELS if has_kernels else {})
        self._monkeypatch.setenv("PQASGD_CUDA_LIBRARY", self.path)
        self._monkeypatch.setattr(
            places, "gpu_of", lambda device, name: 0 if places.short_name(device) == NAME else None
        )
        labels = self._labels

        def create_labelled(graph: tf.Graph, operation: tf.Operation, compute_device: bool = True) -> None:
            graph._op_to_kernel_label_map = labels
            _create(graph, operation, compute_device)

        self._monkeypatch.setattr(tf.Graph, "_create_op_helper", create_labelled)

    def limit_memory(self, nbytes: int) -> None:
        """Let the GPU have so many more bytes for what the kernels need; -1: all that there are."""
        self._library.pq_cuda_on_cpu_limit(ctypes.c_int64(nbytes))

    def break_down(self, broken: bool) -> None:
        """Let the GPU do no work any more, or do it again."""
        self._library.pq_cuda_on_cpu_break(ctypes.c_int32(broken))

    def num_launched(self) -> int:
        """How many kernels were launched."""
        return int(self._library.pq_cuda_on_cpu_launched())


def forget_kernels() -> None:
    """Let kernels be loaded anew, and devices looked at."""
    cuda.load.cache_clear()
    places.use_gpu.cache_clear()
