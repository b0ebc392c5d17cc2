"""The codecs on a GPU: the kernels of ``native/cuda``, loaded with ctypes.

``include/pqasgd_cuda.h`` is the interface. Pointers are plain integers, of memory of the device that is current in the
calling thread; the stream is one too, 0 for the default one. Calls put work on the stream and return: nothing is
allocated or waited for. The bytes and the floats are those of :mod:`pqasgd_horovod.native`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..errors import DeviceError, NativeLibraryError
from ..keys import Keys
from . import DTYPE_F32, CodecSpec, _Codec, _Keys, _Segment, _Source, check_status

_ABI_VERSION = 3
_DEVICE_ERROR = -16
_ON_DEVICE, _ON_HOST, _MESSAGES, _DEVICE_MESSAGES = range(4)
_IDENTITY_NBYTES = 16
_LIBRARY = Path(__file__).with_name("libpqasgd_cuda.so")


class DeviceSource:
    """A flat vector of device memory, as :class:`pqasgd_horovod.native.Source` is one of host memory.

    ``segments`` are ``(pointer, dtype code, number of elements)``. ``table`` is a pointer to device memory, aligned to
    8 bytes, to which the caller has copied what :meth:`table` makes of them; it stays there while the source is in use.
    ``anchor`` and ``residual`` are as for ``Source``.
    """

    def __init__(
        self,
        segments: Sequence[tuple[int, int, int]],
        table: int,
        anchor: tuple[int, int] | None = None,
        residual: tuple[int, int] | None = None,
    ) -> None:
        self.numel = sum(numel for _, _, numel in segments)
        pointer, dtype = anchor or (None, DTYPE_F32)
        as_segments = ctypes.cast(table, ctypes.POINTER(_Segment))
        as_offsets = ctypes.cast(table + len(segments) * ctypes.sizeof(_Segment), ctypes.POINTER(ctypes.c_int64))
        self._struct = _Source(as_segments, as_offsets, len(segments), pointer, dtype, 0, *(residual or ()))
        self.argument = ctypes.addressof(self._struct)
        self.owner: object = None  # kept alive for as long as this object

    @staticmethod
    def table(segments: Sequence[tuple[int, int, int]]) -> NDArray[np.uint8]:
        """Return what kernels look up: the segments, and where each begins.

        >>> DeviceSource.table([(4096, DTYPE_F32, 10)]).view(np.int64).tolist()
        [4096, 10, 0, 0, 10]
        """
        offsets = np.cumsum([0, *(numel for _, _, numel in segments)], dtype=np.int64)
        records = (_Segment * len(segments))(*(_Segment(data, numel, dtype, 0) for data, dtype, numel in segments))
        return np.concatenate([np.frombuffer(bytes(records), np.uint8), offsets.view(np.uint8)])


class Library:
    """The kernels of one shared library. :func:`load` returns the package's own.

    Methods raise ArgumentError for codecs, ranges or memory that are not valid, WireFormatError for a payload of the
    wrong size, and DeviceError where CUDA refuses. What kernels find in the numbers is added to the status word, an
    int32 of device memory that is 0 to begin with: :meth:`check_found` says what it means.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        advice = "reinstall the package with nvcc in PATH and PQASGD_WITH_CUDA=1, or keep the model on the CPU"
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise NativeLibraryError(
                f"the kernels for GPUs, {path.name}, could not be loaded ({error}); {advice}"
            ) from error
        pointer, i32, i64, f32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
        signatures: dict[str, tuple[Any, list[Any]]] = {
            "abi_version": (i32, []),
            "architectures": (ctypes.c_char_p, []),
            "error": (ctypes.c_char_p, []),
            "check": (i32, []),
            "status": (i32, [i32]),
            "workspace_nbytes": (i64, [pointer, i64]),
            "encode": (i32, [pointer, pointer, i64, i64, i64, _Keys, pointer, i64, pointer, pointer, pointer]),
            "decode_add": (i32, [pointer, pointer, i64, i64, _Keys, f32, pointer, pointer, pointer, pointer]),
            "reduce": (
                i32,
                [pointer, i32, pointer, i64, pointer, f32, pointer, i64, i64, i64, *[pointer] * 5],
            ),
            "own_rest": (i32, [pointer, pointer, i64, i64, i64, _Keys, pointer]),
            "apply": (i32, [pointer, i64, i64, pointer, i64, pointer]),
            "rebase": (i32, [pointer, i64, i64, pointer, i64, pointer]),
            "gather": (i32, [pointer, i64, i64, i64, pointer, i32, pointer]),
            "capture": (i32, [pointer, i64, i64, i64, pointer]),
            "outer": (i32, [f32, f32, f32, i64, pointer, pointer, pointer]),
            "fill": (i32, [f32, i64, pointer, pointer]),
            "scale": (i32, [f32, pointer, i64, pointer, pointer]),
        }
        of_devices: dict[str, list[Any]] = {
            "alloc": [i64, i32, pointer],
            "free": [pointer, i32],
            "reserve": [*[pointer] * 4, i32],
            "reserve_tables": [i64],
            "identity": [pointer],
            "copy": [pointer, pointer, pointer, i64],
            "encode": [pointer, pointer, pointer, i64, i64, _Keys, pointer, i64],
            "allgather_pack": [*[pointer] * 4, i64, pointer, i64],
            "allgather_land": [*[pointer] * 4, i64, pointer, pointer],
            "two_phase_pack": [*[pointer] * 5, i64, pointer, i64],
            "two_phase_mean": [*[pointer] * 5, i32, pointer, i64, pointer, i64, *[pointer] * 4, i64],
            "two_phase_relay": [pointer, pointer, i32, pointer, i64, pointer, i64],
            "two_phase_land": [*[pointer] * 5, i64, pointer, pointer],
            "apply": [pointer, pointer, i64, i64, pointer],
            "rebase": [pointer, pointer, i64, i64, pointer],
            "gather": [pointer, pointer, i64, i64, pointer, i32],
            "outer": [pointer, f32, f32, f32, i64, pointer, pointer],
            "scale": [pointer, f32, pointer, i64, pointer],
            "check": [],
        }
        declared = {f"pq_cuda_{name}": signature for name, signature in signatures.items()}
        declared |= {f"pq_device_{name}": (i32, [i32, *arguments]) for name, arguments in of_devices.items()}
        for name, (result, arguments) in declared.items():
            function = getattr(self._library, name, None)
            if function is None:
                raise NativeLibraryError(f"{path.name} has no {name}: it is from another version; {advice}")
            function.restype, function.argtypes = result, arguments
        found = self._library.pq_cuda_abi_version()
        if found != _ABI_VERSION:
            raise NativeLibraryError(
                f"{path.name} has interface version {found}, this package needs {_ABI_VERSION}; {advice}"
            )

    @property
    def architectures(self) -> str:
        """What the kernels were compiled for, as in "75 80 90+PTX"."""
        return self._library.pq_cuda_architectures().decode()

    def check_device(self, name: str, index: int | None = None) -> None:
        """Raise DeviceError unless the kernels run on this device, or the current one; the message has its ``name``."""
        status = self._library.pq_cuda_check() if index is None else self._library.pq_device_check(index)
        if status != 0:
            raise DeviceError(
                f"the kernels cannot run on {name}: {self._error()}. They were compiled for architectures "
                f"{self.architectures}: update the driver, or reinstall pqasgd_horovod with the CUDA toolkit of this "
                "machine and PQASGD_WITH_CUDA=1"
            )

    def _error(self) -> str:
        return self._library.pq_cuda_error().decode()

    def run(self, name: str, *arguments: Any) -> int:
        """Call ``pq_device_<name>``; return its status, or raise DeviceError if CUDA refuses."""
        status: int = getattr(self._library, f"pq_device_{name}")(*arguments)
        if status == _DEVICE_ERROR:
            raise DeviceError(f"{name}: CUDA refuses: {self._error()}")
        return status

    def _check(self, status: int, what: str) -> None:
        if status == _DEVICE_ERROR:
            raise DeviceError(f"{what}: CUDA refused the work: {self._error()}")
        check_status(status, what)

    def check_found(self, found: int, what: str) -> bool:
        """Return whether all numbers were finite; raise WireFormatError for a payload that no encoder writes."""
        status = self._library.pq_cuda_status(found)
        check_status(status, what)
        return status == 0

    def workspace_nbytes(self, spec: CodecSpec, count: int) -> int:
        """Return how much workspace :meth:`encode`, :meth:`decode_add` and :meth:`reduce` need."""
        nbytes = self._library.pq_cuda_workspace_nbytes(ctypes.byref(_Codec(*spec)), count)
        self._check(nbytes, "workspace")
        return nbytes

    def encode(
        self,
        spec: CodecSpec,
        source: DeviceSource,
        start: int,
        count: int,
        keys: Keys,
        payload: int,
        payload_nbytes: int,
        workspace: int,
        status: int,
        stream: int = 0,
    ) -> None:
        """Encode ``source[start : start + count]``, and write the source's next residual if it has one."""
        codec = ctypes.byref(_Codec(*spec))
        result = self._library.pq_cuda_encode(
            codec,
            source.argument,
            source.numel,
            start,
            count,
            _Keys(*keys),
            payload,
            payload_nbytes,
            workspace,
            status,
            stream,
        )
        self._check(result, "encode")

    def decode_add(
        self,
        spec: CodecSpec,
        payload: int,
        payload_nbytes: int,
        count: int,
        keys: Keys,
        weight: float,
        destination: int,
        workspace: int,
        status: int,
        stream: int = 0,
    ) -> None:
        """Do ``destination += weight * decoded``."""
        codec = ctypes.byref(_Codec(*spec))
        result = self._library.pq_cuda_decode_add(
            codec, payload, payload_nbytes, count, _Keys(*keys), weight, destination, workspace, status, stream
        )
        self._check(result, "decode")

    def reduce(
        self,
        spec: CodecSpec,
        payloads: Sequence[int | None],
        payload_nbytes: int,
        keys: Sequence[Keys],
        weight: float,
        own: DeviceSource | None,
        own_start: int,
        count: int,
        base: int | None,
        destination: int,
        workspace: int,
        status: int,
        stream: int = 0,
    ) -> None:
        """Set ``destination`` to ``base`` (or zero) plus the sum, in order, of ``weight * decoded``.

        A payload of None stands for the own numbers.
        """
        result = self._library.pq_cuda_reduce(
            ctypes.byref(_Codec(*spec)),
            len(payloads),
            (ctypes.c_void_p * max(1, len(payloads)))(*payloads),
            payload_nbytes,
            (_Keys * max(1, len(keys)))(*(_Keys(*pair) for pair in keys)),
            weight,
            None if own is None else own.argument,
            0 if own is None else own.numel,
            own_start,
            count,
            base,
            destination,
            workspace,
            status,
            stream,
        )
        self._check(result, "decode")

    def own_rest(
        self, spec: CodecSpec, source: DeviceSource, start: int, count: int, keys: Keys, stream: int = 0
    ) -> None:
        """Write to the next residual what the owner of a shard, who does not code it, leaves to the next round."""
        codec = ctypes.byref(_Codec(*spec))
        result = self._library.pq_cuda_own_rest(
            codec, source.argument, source.numel, start, count, _Keys(*keys), stream
        )
        self._check(result, "residual")

    def apply(self, mean: int, start: int, count: int, target: DeviceSource, stream: int = 0) -> None:
        """Do what :func:`pqasgd_horovod.native.apply` does."""
        self._check(self._library.pq_cuda_apply(mean, start, count, target.argument, target.numel, stream), "apply")

    def rebase(self, base: int, start: int, count: int, target: DeviceSource, stream: int = 0) -> None:
        """Do what :func:`pqasgd_horovod.native.rebase` does."""
        self._check(self._library.pq_cuda_rebase(base, start, count, target.argument, target.numel, stream), "rebase")

    def gather(
        self, source: DeviceSource, start: int, count: int, destination: int, dtype: int, stream: int = 0
    ) -> None:
        """Do what :func:`pqasgd_horovod.native.gather` does, to float32 or float64 numbers."""
        result = self._library.pq_cuda_gather(source.argument, source.numel, start, count, destination, dtype, stream)
        self._check(result, "gather")

    def capture(self, source: DeviceSource, stream: int = 0) -> None:
        """Do what :func:`pqasgd_horovod.native.capture` does."""
        self._check(self._library.pq_cuda_capture(source.argument, source.numel, 0, source.numel, stream), "capture")

    def outer(self, decay: float, a: float, b: float, count: int, momentum: int, delta: int, stream: int = 0) -> None:
        """Do what :func:`pqasgd_horovod.native.outer` does."""
        self._check(self._library.pq_cuda_outer(decay, a, b, count, momentum, delta, stream), "outer")


class DeviceBytes:
    """Bytes in the memory of a GPU, out of the host's reach; ``owner`` keeps them alive."""

    def __init__(self, pointer: int, size: int, device: Device, owner: object = None) -> None:
        self.pointer, self.size, self.device = pointer, size, device
        self._owner = owner

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """What other libraries know these bytes by, as a flat uint8 array."""
        return {"shape": (self.size,), "typestr": "|u1", "data": (self.pointer, False), "version": 3}

    def to_host(self) -> NDArray[np.uint8]:
        """Return a copy in host memory."""
        copy = np.empty(self.size, np.uint8)
        self.device.run("copy", copy.ctypes.data, self.pointer, self.size)
        return copy


class Device:
    """A GPU whose numbers are averaged: its kernels, and memory that it and the host reach.

    Averaging works on arrays of :meth:`zeros`, as on any others, and the kernels do what is done to all numbers in
    every round. All that the host does to them it does at the speed of the bus.

    Args:
        index: its number, from 0.
        stream: returns the CUDA stream, as an integer, that the work is put on: that of the one who made the numbers.
        numbers_on_host: keep arrays in host memory, for models that fill the GPU.
        library: the kernels; the package's own if None.
        host_messages: why messages have to be in host memory, if they have to: what it is that carries them.

    Raises NativeLibraryError if there are no kernels, DeviceError if they do not run on this device.
    """

    def __init__(
        self,
        index: int,
        stream: Callable[[], int] = lambda: 0,
        numbers_on_host: bool = False,
        library: Library | None = None,
        host_messages: str = "",
    ) -> None:
        self._library = library or load()
        self.index = index
        self.host_messages = host_messages
        self._stream = stream
        self._kind = _ON_HOST if numbers_on_host else _ON_DEVICE
        self._scratch: NDArray[np.float32] | None = None

    def __str__(self) -> str:
        return f"cuda:{self.index}"

    def run(self, name: str, *arguments: Any) -> int:
        """Do with numbers of this device what a function of the core does, and wait until it is done."""
        return self._library.run(name, self.index, self._stream(), *arguments)

    @functools.cached_property
    def identity(self) -> bytes:
        """16 bytes that no other GPU has, on this machine or another; not all are 0."""
        identity = ctypes.create_string_buffer(_IDENTITY_NBYTES)
        self._library.run("identity", self.index, identity)
        return identity.raw

    def reserve(self, *of_bucket: Any) -> None:
        """Keep the memory that coding a bucket takes, so that no round lacks it; raise DeviceError if there is none.

        ``of_bucket`` are both codecs, the bucket, its shards or None, and whether messages are in this device's memory,
        as the library knows them.
        """
        self._reserve("reserve", *of_bucket)

    def reserve_tables(self, num_tensors: int) -> None:
        """Keep the memory that it takes to know where so many tensors are."""
        self._reserve("reserve_tables", num_tensors)

    def _reserve(self, name: str, *arguments: Any) -> None:
        try:
            status = self._library.run(name, self.index, *arguments)
        except DeviceError as error:
            raise DeviceError(
                f"memory to code a bucket on {self}: {error}. Smaller buckets (bucket_cap_mb) take less"
            ) from None
        check_status(status, "memory")

    def _allocate(self, nbytes: int, kind: int) -> int:
        pointer = ctypes.c_void_p()
        try:
            status = self._library.run("alloc", self.index, nbytes, kind, ctypes.byref(pointer))
        except DeviceError as error:
            advice = "With anchor_device='cpu' anchors and residuals stay in host memory"
            if kind == _DEVICE_MESSAGES:
                advice = "With PQASGD_GPU_MESSAGES=host messages stay in host memory"
            raise DeviceError(f"{nbytes:,} bytes of memory for averages on {self}: {error}. {advice}") from None
        check_status(status, "memory")
        assert pointer.value is not None
        return pointer.value

    def _array(self, nbytes: int, kind: int) -> NDArray[np.uint8]:
        pointer = self._allocate(nbytes, kind)
        memory = (ctypes.c_uint8 * nbytes).from_address(pointer)
        weakref.finalize(memory, self._release, pointer, kind).atexit = False
        return np.ctypeslib.as_array(memory)

    def _release(self, pointer: int, kind: int) -> None:
        self._library.run("free", self.index, pointer, kind)

    def zeros(self, size: int, dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """Return an array of zeros for numbers, in memory that the host and this device reach."""
        return self._array(size * np.dtype(dtype).itemsize, self._kind).view(dtype)

    def host_messages_memory(self, nbytes: int) -> NDArray[np.uint8]:
        """Return host memory, zeros, that is copied to and from this device at full speed."""
        return self._array(nbytes, _MESSAGES)

    def device_messages_memory(self, nbytes: int) -> DeviceBytes:
        """Return memory of this device, zeros."""
        memory = DeviceBytes(self._allocate(nbytes, _DEVICE_MESSAGES), nbytes, self)
        weakref.finalize(memory, self._release, memory.pointer, _DEVICE_MESSAGES).atexit = False
        return memory

    def scratch(self, size: int) -> NDArray[np.float32]:
        """Return an array of float32 numbers for a while; the next call may return the same."""
        if self._scratch is None or self._scratch.size < size:
            self._scratch = self.zeros(size)
        return self._scratch[:size]


@functools.cache
def load() -> Library:
    """Return the package's kernels; raise NativeLibraryError where they were not built, and say how to build them.

    PQASGD_CUDA_LIBRARY names another build of the same library.
    """
    return Library(Path(os.environ.get("PQASGD_CUDA_LIBRARY") or _LIBRARY))


def is_built() -> bool:
    """Return whether there are kernels to load."""
    return "PQASGD_CUDA_LIBRARY" in os.environ or _LIBRARY.exists()
