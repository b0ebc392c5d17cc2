"""The kernels for GPUs, compiled for the CPU: the same source, byte by byte what a GPU would make, without one.

``cuda_on_cpu.h`` says how. NumPy arrays serve as device memory here; what is allocated as that is out of reach of all
but kernels and copies: who touches it ends with a segmentation fault.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pqasgd_horovod import codecs, native
from pqasgd_horovod.keys import Keys
from pqasgd_horovod.native.cuda import Device, DeviceBytes, DeviceSource, Library

NATIVE = Path(native.__file__).parent
ORDERS = (0, 1, 7)
"""In which the threads of a group take turns: as numbered, the other way round, shuffled."""


def build() -> Path:
    """Return the library with the kernels, compiled into build/ unless that was done with the same sources."""
    here = Path(__file__).parent
    sources = [here / "cuda_on_cpu.h", *(NATIVE / "cuda").iterdir(), *(NATIVE / "src").iterdir()]
    sources += [*(NATIVE / "include").iterdir(), NATIVE.parent / "codecs" / "lloyd_max.py", Path(__file__)]
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    content = hashlib.sha256(repr(compiler).encode())
    for source in sorted(sources):
        content.update(source.read_bytes())
    library = here.parents[2] / "build" / "cuda_on_cpu" / f"{content.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            _compile(compiler, Path(folder)).replace(library)
    return library


def _compile(compiler: list[str], folder: Path) -> Path:
    table = subprocess.run(
        [sys.executable, str(NATIVE.parent / "codecs" / "lloyd_max.py")], check=True, capture_output=True
    )
    (folder / "lloyd_max.inc").write_bytes(table.stdout)
    library = folder / "libpqasgd_cuda_on_cpu.so"
    subprocess.run(
        [
            *compiler,
            *("-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-fvisibility=hidden", "-DPQ_CUDA_ON_CPU"),
            *("-fsanitize=undefined", "-fno-sanitize-recover=all"),  # a GPU refuses addresses that are not aligned
            *(f"-I{path}" for path in (Path(__file__).parent, folder, NATIVE / "include")),
            *("-x", "c++", str(NATIVE / "cuda" / "cuda.cu"), str(NATIVE / "cuda" / "device.cu")),
            str(NATIVE / "src" / "plan.cc"),
            *("-o", str(library)),
        ],
        check=True,
    )
    return library


@functools.cache
def load() -> Library:
    """Return the kernels."""
    return Library(build())


def make_device(numbers_on_host: bool = False, index: int = 0, host_messages: str = "") -> Device:
    """Return a GPU that is none."""
    return Device(index, numbers_on_host=numbers_on_host, library=load(), host_messages=host_messages)


def upload(device: Device, values: np.ndarray) -> DeviceBytes:
    """Return a copy of bytes, in memory of the device."""
    memory = device.device_messages_memory(values.size)
    device.run("copy", memory.pointer, np.ascontiguousarray(values).ctypes.data, values.size)
    return memory


class DeviceHandle:
    """A collective of memory of devices, which another one of host memory does."""

    def __init__(self, handle, device: Device) -> None:
        self._handle, self._device = handle, device
        self.done = handle.done

    def wait(self, timeout: float | None = None) -> DeviceBytes:
        return upload(self._device, self._handle.wait(timeout))


class DeviceCarrier:
    """A carrier that carries memory of devices too, and as NCCL does from each rank or from none."""

    def __init__(self, inner) -> None:
        self.inner, self.rank, self.size = inner, inner.rank, inner.size
        self.names: list[str] = []
        """Of what was sent from devices, among some of the ranks too."""

    def among(self, ranks: Sequence[int]) -> DeviceCarrier:
        """Return the carrier of some ranks."""
        part = DeviceCarrier(self.inner.among(ranks))
        part.names = self.names
        return part

    def allgather(self, name: str, payload: np.ndarray | DeviceBytes):
        if isinstance(payload, np.ndarray):
            return self.inner.allgather(name, payload)
        self.names.append(name)
        return DeviceHandle(self.inner.allgather(f"{name} of devices", payload.to_host()), payload.device)

    def alltoall(self, name: str, payload: np.ndarray | DeviceBytes, splits: Sequence[int]):
        if isinstance(payload, np.ndarray):
            return self.inner.alltoall(name, payload, splits)
        self.names.append(name)
        return DeviceHandle(self.inner.alltoall(f"{name} of devices", payload.to_host(), splits), payload.device)


def make_source(
    arrays: Sequence[np.ndarray],
    anchor: np.ndarray | None = None,
    residual: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[DeviceSource, native.Source]:
    """Return the same vector for the kernels and for the core; uint16 arrays count as bfloat16."""
    types = {np.float32: native.DTYPE_F32, np.float64: native.DTYPE_F64, np.float16: native.DTYPE_F16}
    segments = [(a.ctypes.data, types.get(a.dtype.type, native.DTYPE_BF16), a.size) for a in arrays]
    pair = None if anchor is None else (anchor.ctypes.data, types[anchor.dtype.type])
    pointers = None if residual is None else (residual[0].ctypes.data, residual[1].ctypes.data)
    table = DeviceSource.table(segments)
    source = DeviceSource(segments, table.ctypes.data, pair, pointers)
    kept = source.owner = (table, arrays, anchor, residual)
    return source, native.Source(segments, pair, kept, pointers)


class Kernels:
    """The kernels on NumPy arrays; results come with what they found: True if all was finite, or WireFormatError."""

    def __init__(self) -> None:
        self.library = load()

    def set_order(self, order: int) -> None:
        """Choose one of ORDERS."""
        self.library._library.pq_cuda_on_cpu_order(order)

    def _workspace(self, codec: codecs.Codec, count: int) -> np.ndarray:
        return np.full(self.library.workspace_nbytes(codec.native_spec, count) // 4, np.nan, np.float32)

    def encode(
        self, codec: codecs.Codec, source: DeviceSource, start: int, count: int, keys: Keys
    ) -> tuple[np.ndarray, bool]:
        """Return the payload, and whether all was finite."""
        payload = np.full(codec.payload_nbytes(count), 0xEE, np.uint8)
        workspace, found = self._workspace(codec, count), np.zeros(1, np.int32)
        self.library.encode(
            codec.native_spec, source, start, count, keys, payload.ctypes.data, payload.size,
            workspace.ctypes.data, found.ctypes.data,
        )  # fmt: skip
        return payload, self.library.check_found(int(found[0]), "encode")

    def decode_add(
        self, codec: codecs.Codec, payload: np.ndarray, destination: np.ndarray, keys: Keys, weight: float = 1.0
    ) -> None:
        """Do ``destination += weight * decoded``."""
        workspace, found = self._workspace(codec, destination.size), np.zeros(1, np.int32)
        self.library.decode_add(
            codec.native_spec, payload.ctypes.data, payload.size, destination.size, keys, weight,
            destination.ctypes.data, workspace.ctypes.data, found.ctypes.data,
        )  # fmt: skip
        self.library.check_found(int(found[0]), "decode")

    def reduce(
        self,
        codec: codecs.Codec,
        payloads: Sequence[np.ndarray | None],
        keys: Sequence[Keys],
        weight: float,
        own: DeviceSource | None,
        own_start: int,
        destination: np.ndarray,
        base: np.ndarray | None = None,
    ) -> None:
        """Do what ``native.reduce`` does."""
        workspace, found = self._workspace(codec, destination.size), np.zeros(1, np.int32)
        pointers = [None if payload is None else payload.ctypes.data for payload in payloads]
        self.library.reduce(
            codec.native_spec, pointers, codec.payload_nbytes(destination.size), keys, weight, own, own_start,
            destination.size, None if base is None else base.ctypes.data, destination.ctypes.data,
            workspace.ctypes.data, found.ctypes.data,
        )  # fmt: skip
        self.library.check_found(int(found[0]), "decode")
