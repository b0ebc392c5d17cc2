"""The core's TensorFlow ops, loaded, and what they say when something is wrong.

The kernels (``ops/``) find out that something is wrong; the words stand once, in :mod:`pqasgd_horovod.exchange`.
An op that may have something to say carries the number of an *explainer*, a Python function, which is called only then.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow.python.framework.auto_control_deps_utils import register_read_only_resource_op

from .. import errors, native
from ..errors import NativeLibraryError
from ..native import cuda

_FOLDER = Path(__file__).parent
_PREFIX = "libpqasgd_tensorflow-"

Explainer = Callable[[int, NDArray[np.uint8]], None]
"""Given flags and the bytes they are about: raises the error that they stand for, or only takes note."""

# What ops/common.h makes a TensorFlow error of.
_KINDS: tuple[tuple[type[Exception], int], ...] = (
    (errors.DesynchronizedError, 1),
    (errors.WireFormatError, 2),
    (errors.NonFiniteError, 3),
    (errors.MismatchError, 4),
)
_INTERNAL = 4


def _load() -> Any:
    assert native is not None  # the core has to be loaded first: the ops call it
    path = _FOLDER / f"{_PREFIX}{tf.__version__}.so"
    if not path.exists():
        built = sorted(found.stem.removeprefix(_PREFIX) for found in _FOLDER.glob(f"{_PREFIX}*.so"))
        state = (
            f"was built against TensorFlow {', '.join(built)}, and this is {tf.__version__}"
            if built
            else "was installed without TensorFlow's ops: TensorFlow was not there, or not seen, when it was built"
        )
        raise NativeLibraryError(
            f"pqasgd_horovod {state}. Install it again in this environment: "
            "PQASGD_WITH_TENSORFLOW=1 pip install --no-build-isolation --force-reinstall --no-deps pqasgd_horovod "
            "(in a checkout: make setup)"
        )
    return tf.load_op_library(str(path)), ctypes.CDLL(str(path))


ops, _library = _load()

# Buckets go beside each other, each with its own part of a variable: for TensorFlow's control dependencies that is like
# reading it.
for _op in ("Land", "Pack", "Mean", "Relay", "Project", "Backproject", "Reconstruct"):
    register_read_only_resource_op(f"Pqasgd{_op}")

_explainers: dict[int, Explainer] = {}
_numbers = itertools.count(1)

_EXPLAIN = ctypes.CFUNCTYPE(
    ctypes.c_int32,
    ctypes.c_int64,
    ctypes.c_int32,
    ctypes.POINTER(ctypes.c_uint8),
    ctypes.c_int64,
    ctypes.POINTER(ctypes.c_char),
    ctypes.c_int64,
)


@_EXPLAIN
def _explain(number: int, flags: int, data: Any, nbytes: int, text: Any, capacity: int) -> int:
    received = np.ctypeslib.as_array(data, (nbytes,)) if nbytes else np.zeros(0, np.uint8)
    try:
        _explainers[number](flags, received)
    except Exception as error:  # whatever it is, it is handed on as the op's error
        kind = next((kind for cls, kind in _KINDS if isinstance(error, cls)), _INTERNAL)
        name = "" if isinstance(error, errors.PqasgdError) else "pqasgd_horovod cannot explain flags: "
        encoded = f"{name}{type(error).__name__}: {error}".encode()[:capacity]
        ctypes.memmove(text, encoded, len(encoded))
        return kind
    return 0


_library.pqasgd_tensorflow_set_explain.argtypes = [_EXPLAIN]
_library.pqasgd_tensorflow_set_explain.restype = None
_library.pqasgd_tensorflow_set_explain(_explain)
_library.pqasgd_tensorflow_close_gate.argtypes = [ctypes.c_int64]
_library.pqasgd_tensorflow_close_gate.restype = None
_library.pqasgd_tensorflow_open_gate.argtypes = [ctypes.c_int64, ctypes.c_int32]
_library.pqasgd_tensorflow_open_gate.restype = None


_library.pqasgd_tensorflow_load_kernels.argtypes = [ctypes.c_char_p]
_library.pqasgd_tensorflow_load_kernels.restype = ctypes.c_char_p


def load_kernels(kernels: cuda.Library) -> None:
    """Let ops on GPUs, from now on, call these kernels."""
    wrong = _library.pqasgd_tensorflow_load_kernels(os.fsencode(kernels.path))
    if wrong is not None:
        raise NativeLibraryError(f"the ops of TensorFlow cannot use {kernels.path}: {wrong.decode()}")


def close_gate(gate: int) -> None:
    """Let ``ops.pqasgd_await`` wait from now on."""
    _library.pqasgd_tensorflow_close_gate(gate)


def open_gate(gate: int, failed: bool) -> None:
    """Let it go on, wherever it waits."""
    _library.pqasgd_tensorflow_open_gate(gate, failed)


def register_explainer(explainer: Explainer) -> int:
    """Return the number under which an op finds ``explainer``; it stays for the life of the process, as graphs do."""
    number = next(_numbers)
    _explainers[number] = explainer
    return number


def translate(error: tf.errors.OpError) -> Exception:
    """Return the error of this package that an op has raised, or else the error itself.

    A traced function raises TensorFlow's errors, which carry the text; what this package calls itself raises its own.
    """
    for name in ("DesynchronizedError", "WireFormatError", "NonFiniteError", "MismatchError", "DeviceError"):
        _, found, text = error.message.partition(f"{name}: ")
        if found:
            result: Exception = getattr(errors, name)(text.splitlines()[0])
            return result
    return error
