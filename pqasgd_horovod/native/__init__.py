"""The C++ core, loaded with ctypes: every call releases the GIL, and none allocates.

``include/pqasgd.h`` is the interface; ``docs/architecture.md`` defines the bytes. Pointers come from NumPy arrays or,
as plain integers, from a framework's tensors, so that this module imports no framework.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..errors import ArgumentError, NativeLibraryError, WireFormatError
from ..keys import Keys

if TYPE_CHECKING:
    from .cuda import Device, DeviceBytes

KIND_NONE, KIND_FP16, KIND_BF16, KIND_MAXSCALE, KIND_QSGD, KIND_TERNGRAD, KIND_EDEN = range(7)
KIND_SIGNSGD, KIND_NATURAL, KIND_TOPK, KIND_RANDOMK, KIND_THRESHOLD, KIND_ONEBIT = range(7, 13)
FLAG_STOCHASTIC, FLAG_UNSCALED, FLAG_SCALED = 1, 2, 4
DTYPE_F32, DTYPE_F64, DTYPE_F16, DTYPE_BF16 = range(4)
MAX_BLOCK_SIZE = 8192
CAST_BLOCK_SIZE = 1024
ISAS = ("avx512", "avx2", "neon", "plain")

_ABI_VERSION = 6
_NONFINITE, _BAD_ARGUMENT, _BAD_LENGTH, _BAD_SCALE, _BAD_CODE = 1, -1, -2, -3, -4
_NUMPY_DTYPES = {np.dtype(np.float32): DTYPE_F32, np.dtype(np.float64): DTYPE_F64, np.dtype(np.float16): DTYPE_F16}
ITEMSIZE = {DTYPE_F32: 4, DTYPE_F64: 8, DTYPE_F16: 2, DTYPE_BF16: 2}


class CodecSpec(NamedTuple):
    """What the core needs to know about a codec."""

    kind: int
    bits: int
    block_size: int
    flags: int = 0
    density: int = 0
    threshold: int = 0
    values_kind: int = 0
    values_bits: int = 0
    values_block_size: int = 0
    values_flags: int = 0


class _Codec(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in CodecSpec._fields]


class _Segment(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    ]


class _Source(ctypes.Structure):
    _fields_ = [
        ("segments", ctypes.POINTER(_Segment)),
        ("offsets", ctypes.POINTER(ctypes.c_int64)),
        ("num_segments", ctypes.c_int64),
        ("anchor", ctypes.c_void_p),
        ("anchor_dtype", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("residual", ctypes.c_void_p),
        ("next_residual", ctypes.c_void_p),
    ]


class _Keys(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("own", "shared")]


class _Matrix(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "cols")]


class _Table(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("num_rows", "row_size")]


class _Bucket(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("digest", "seed", "step", "round")),
        ("num_elements", ctypes.c_int64),
        ("bucket", ctypes.c_uint32),
        ("rank", ctypes.c_int32),
        ("size", ctypes.c_int32),
        ("flags", ctypes.c_int32),
    ]


def _load() -> ctypes.CDLL:
    # Another build of the same core, such as the sanitized one of `make sanitize`, can be named in the environment.
    path = Path(os.environ.get("PQASGD_CORE_LIBRARY") or Path(__file__).with_name("libpqasgd_core.so"))
    advice = (
        "build it with `make setup` in a checkout, or reinstall the package with a C++17 compiler and CMake present"
    )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeLibraryError(f"the native core {path.name} could not be loaded ({error}); {advice}") from error
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    u32, u64 = ctypes.c_uint32, ctypes.c_uint64
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "pq_abi_version": (i32, []),
        "pq_isa": (ctypes.c_char_p, []),
        "pq_has_isa": (i32, [ctypes.c_char_p]),
        "pq_force_isa": (i32, [ctypes.c_char_p]),
        "pq_set_num_threads": (None, [i32]),
        "pq_get_num_threads": (i32, []),
        "pq_payload_nbytes": (i64, [pointer, i64]),
        "pq_encode": (i32, [pointer, pointer, i64, i64, _Keys, pointer, i64]),
        "pq_decode_add": (i32, [pointer, pointer, i64, i64, _Keys, ctypes.c_float, pointer]),
        "pq_reduce": (i32, [pointer, i32, pointer, i64, pointer, ctypes.c_float, pointer, i64, i64, pointer, pointer]),
        "pq_apply": (i32, [pointer, i64, i64, pointer]),
        "pq_rebase": (i32, [pointer, i64, i64, pointer]),
        "pq_gather": (i32, [pointer, i64, i64, pointer, i32]),
        "pq_capture": (i32, [pointer, i64, i64]),
        "pq_distance": (i32, [pointer, i64, i64, pointer, pointer]),
        "pq_outer": (i32, [ctypes.c_float, ctypes.c_float, ctypes.c_float, i64, pointer, pointer]),
        "pq_low_rank_project": (i32, [pointer, i64, i32, pointer, i64, pointer, pointer]),
        "pq_low_rank_backproject": (i32, [pointer, i64, i32, pointer, pointer, pointer]),
        "pq_low_rank_reconstruct": (i32, [pointer, i64, i32, *[pointer] * 6]),
        "pq_low_rank_redraw": (i32, [pointer, i64, i32, u64, u64, u32, pointer]),
        "pq_orthogonalize": (i32, [pointer, i64, i32, pointer]),
        "pq_derive_key": (u64, [u64, u32, u64, u32, u32]),
        "pq_rows_nbytes": (i64, [pointer, pointer, i64]),
        "pq_rows_pack": (i32, [pointer, pointer, pointer, i64, pointer, pointer, pointer, i64]),
        "pq_rows_total": (i32, [pointer, pointer, pointer, pointer, i64, pointer]),
        "pq_rows_union": (i32, [pointer, pointer, pointer, pointer, i64, pointer, pointer]),
        "pq_rows_land": (i32, [pointer, pointer, pointer, pointer, i64, i64, pointer, pointer]),
        "pq_allgather_pack": (i32, [pointer, pointer, pointer, i64, pointer, i64]),
        "pq_allgather_land": (i32, [pointer, pointer, pointer, i64, pointer, pointer]),
        "pq_two_phase_pack": (i32, [pointer, pointer, pointer, pointer, i64, pointer, i64]),
        "pq_two_phase_mean": (
            i32,
            [pointer, pointer, pointer, pointer, i32, pointer, i64, pointer, i64, *[pointer] * 4, i64],
        ),
        "pq_two_phase_relay": (i32, [pointer, i32, pointer, i64, pointer, i64]),
        "pq_two_phase_land": (i32, [pointer, pointer, pointer, pointer, i64, pointer, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name, None)
        if function is None:
            raise NativeLibraryError(f"the native core {path.name} has no {name}: it is from another version; {advice}")
        function.restype, function.argtypes = result, arguments
    found = library.pq_abi_version()
    if found != _ABI_VERSION:
        raise NativeLibraryError(
            f"the native core has interface version {found}, this package needs {_ABI_VERSION}; {advice}"
        )
    return library


_library = _load()


def _run(device: Device | None, name: str, *arguments: Any) -> int:
    """Call a function of the core, or that of the kernels which does the same with numbers of a device."""
    if device is None:
        return getattr(_library, f"pq_{name}")(*arguments)
    return device.run(name, *arguments)


def zeros(size: int, dtype: DTypeLike = np.float32, device: Device | None = None) -> NDArray[Any]:
    """Return an array of zeros in memory that ``device``, if there is one, and the host reach."""
    return np.zeros(size, dtype) if device is None else device.zeros(size, dtype)


def message_memory(
    nbytes: int, device: Device | None = None, on_device: bool = False
) -> NDArray[np.uint8] | DeviceBytes:
    """Return memory, zeros, for messages that are made of numbers of ``device``, if there is one.

    It is memory of the host, or ``on_device``.
    """
    if device is None:
        return np.zeros(nbytes, np.uint8)
    return device.device_messages_memory(nbytes) if on_device else device.host_messages_memory(nbytes)


def isa() -> str:
    """Return the instruction set in use: "avx512", "avx2", "neon" or "plain"."""
    return _library.pq_isa().decode()


def available_isas() -> list[str]:
    """Return the instruction sets this processor has, the best first."""
    return [name for name in ISAS if _library.pq_has_isa(name.encode())]


def force_isa(name: str | None) -> None:
    """Use this instruction set (None: the best one); the bytes are the same with any, so this is for tests."""
    if _library.pq_force_isa(None if name is None else name.encode()) != 0:
        raise ArgumentError(f"isa={name!r} is not available on this processor; choose from {available_isas()}")


def get_num_threads() -> int:
    """Return how many threads one call may use."""
    return _library.pq_get_num_threads()


def set_num_threads(threads: int) -> None:
    """Let one call use up to this many threads; the bytes do not depend on it. PQASGD_NUM_THREADS sets it at import."""
    if not isinstance(threads, int) or threads < 1:
        raise ArgumentError(f"threads={threads!r} is not allowed; give a whole number of at least 1")
    _library.pq_set_num_threads(threads)


def _threads_from_environment() -> None:
    text = os.environ.get("PQASGD_NUM_THREADS")
    if text:
        if not text.isdecimal() or int(text) < 1:
            raise ArgumentError(f"PQASGD_NUM_THREADS={text!r} is not allowed; give a whole number of at least 1")
        set_num_threads(int(text))


_threads_from_environment()


class Source:
    """A flat vector made of memory segments, optionally minus an anchor: where numbers come from, and where means go.

    ``segments`` are ``(pointer, dtype code, number of elements)``; ``anchor`` is ``(pointer, DTYPE_F32 or DTYPE_F64)``
    of an array as long as the whole vector. ``residual`` is a pair of pointers to float32 arrays, as long as the whole
    vector: the first is added to what is encoded, the second takes what the payload does not stand for. ``owner`` is
    kept alive for as long as this object. With a ``device`` all of it is memory that the device reaches.

    >>> import numpy as np
    >>> Source.from_arrays([np.zeros(3, np.float32), np.ones(2, np.float16)]).numel
    5
    """

    def __init__(
        self,
        segments: Sequence[tuple[int, int, int]],
        anchor: tuple[int, int] | None = None,
        owner: object = None,
        residual: tuple[int, int] | None = None,
        device: Device | None = None,
    ) -> None:
        self._owner = owner
        self.device = device
        self._segments = (_Segment * max(1, len(segments)))()
        self._offsets = (ctypes.c_int64 * (len(segments) + 1))()
        for i, (data, dtype, numel) in enumerate(segments):
            self._segments[i] = _Segment(data, numel, dtype, 0)
            self._offsets[i + 1] = self._offsets[i] + numel
        self.numel: int = self._offsets[len(segments)]
        pointer, dtype = anchor or (None, DTYPE_F32)
        self.has_anchor = anchor is not None
        self._struct = _Source(self._segments, self._offsets, len(segments), pointer, dtype, 0, *(residual or ()))
        self._as_argument = ctypes.addressof(self._struct)

    def without_anchor(self) -> Source:
        """Return the same segments without anchor and residual."""
        return self._like(None, DTYPE_F32)

    def without_residual(self) -> Source:
        """Return the same segments, minus the same anchor, without residual."""
        return self._like(self._struct.anchor, self._struct.anchor_dtype)

    def _like(self, anchor: int | None, anchor_dtype: int) -> Source:
        other = object.__new__(Source)
        other._owner, other._segments, other._offsets, other.numel = self, self._segments, self._offsets, self.numel
        other.device, other.has_anchor = self.device, anchor is not None
        other._struct = _Source(self._segments, self._offsets, self._struct.num_segments, anchor, anchor_dtype, 0)
        other._as_argument = ctypes.addressof(other._struct)
        return other

    def residual(self, start: int) -> tuple[int, int] | None:
        """Return the pointers to element ``start`` of both residuals, or None if there are none."""
        if self._struct.residual is None:
            return None
        return self._struct.residual + 4 * start, self._struct.next_residual + 4 * start

    @classmethod
    def from_arrays(
        cls,
        arrays: Sequence[NDArray[Any]],
        anchor: NDArray[Any] | None = None,
        residual: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
    ) -> Source:
        """Make a source of contiguous fp16, fp32 or fp64 arrays; the anchor is fp32 or fp64, as long as they are.

        ``residual`` is the one that is added and the one that is written.
        """
        segments = []
        for i, array in enumerate(arrays):
            if array.dtype not in _NUMPY_DTYPES or not array.flags.c_contiguous:
                raise ArgumentError(
                    f"arrays[{i}] has dtype {array.dtype} and contiguous={array.flags.c_contiguous}; "
                    "allowed are contiguous float16, float32 and float64 arrays"
                )
            segments.append((array.ctypes.data, _NUMPY_DTYPES[array.dtype], array.size))
        pair = None
        if anchor is not None:
            total = sum(numel for _, _, numel in segments)
            if anchor.dtype not in (np.float32, np.float64) or not anchor.flags.c_contiguous or anchor.size != total:
                raise ArgumentError(
                    f"anchor has dtype {anchor.dtype} and {anchor.size} elements; allowed is a contiguous float32 or "
                    f"float64 array of {total} elements"
                )
            pair = (anchor.ctypes.data, _NUMPY_DTYPES[anchor.dtype])
        pointers = None if residual is None else (_floats("residual", residual[0]), _floats("residual", residual[1]))
        return cls(segments, pair, (list(arrays), anchor, residual), pointers)


def check_status(status: int, what: str) -> None:
    """Raise the error that a status of the core stands for; 0 and above are none."""
    if status >= 0:
        return
    if status == _BAD_LENGTH:
        raise WireFormatError(
            f"{what}: the payload has not the size that this codec gives this many elements: it is truncated or foreign"
        )
    if status == _BAD_SCALE:
        raise WireFormatError(f"{what}: the payload holds a scale that is negative, NaN or Inf: it is corrupted")
    if status == _BAD_CODE:
        raise WireFormatError(f"{what}: the payload holds a code that no encoder writes: it is corrupted")
    raise ArgumentError(f"{what}: the codec, the range or the memory given to the native core is not valid")


def _floats(name: str, array: NDArray[Any]) -> int:
    if array.dtype != np.float32 or not array.flags.c_contiguous or not array.flags.writeable:
        raise ArgumentError(f"{name} has dtype {array.dtype}; allowed is a writable contiguous float32 array")
    return array.ctypes.data


def _bytes(name: str, array: NDArray[Any] | DeviceBytes, writeable: bool = False) -> int:
    if not isinstance(array, np.ndarray):
        return array.pointer
    if array.dtype != np.uint8 or not array.flags.c_contiguous or (writeable and not array.flags.writeable):
        raise ArgumentError(f"{name} has dtype {array.dtype}; allowed is a contiguous uint8 array")
    return array.ctypes.data


def payload_nbytes(spec: CodecSpec, count: int) -> int:
    """Return the exact size in bytes of the payload of ``count`` elements."""
    nbytes = _library.pq_payload_nbytes(ctypes.byref(_Codec(*spec)), count)
    if nbytes < 0:
        raise ArgumentError(f"the codec {spec} or the number of elements {count} is not allowed")
    return nbytes


def encode(spec: CodecSpec, source: Source, start: int, count: int, keys: Keys, out: NDArray[np.uint8]) -> bool:
    """Encode ``source[start : start + count]`` into ``out``; False (``out`` unspecified) if it was not all finite."""
    codec = ctypes.byref(_Codec(*spec))
    status = _run(
        source.device,
        "encode",
        codec,
        source._as_argument,
        start,
        count,
        _Keys(*keys),
        _bytes("out", out, True),
        out.size,
    )
    check_status(status, "encode")
    return status != _NONFINITE


def decode_add(
    spec: CodecSpec,
    payload: NDArray[np.uint8],
    count: int,
    keys: Keys,
    weight: float,
    destination: NDArray[np.float32],
) -> None:
    """Do ``destination += weight * decoded``; raises WireFormatError (the destination is then unspecified)."""
    if destination.size != count:
        raise ArgumentError(f"destination has {destination.size} elements; {count} are decoded")
    status = _library.pq_decode_add(
        ctypes.byref(_Codec(*spec)),
        _bytes("payload", payload),
        payload.size,
        count,
        _Keys(*keys),
        weight,
        _floats("destination", destination),
    )
    check_status(status, "decode")


def reduce(
    spec: CodecSpec,
    payloads: Sequence[NDArray[np.uint8] | None],
    keys: Sequence[Keys],
    weight: float,
    own: Source | None,
    own_start: int,
    destination: NDArray[np.float32],
    base: NDArray[np.float32] | None = None,
) -> None:
    """Set ``destination`` to ``base`` (or zero) plus the sum, in order, of ``weight * decoded``, in one walk.

    A payload of None stands for the uncoded numbers ``own[own_start : own_start + destination.size]``.
    """
    if base is not None and base.size != destination.size:
        raise ArgumentError(f"base has {base.size} elements; {destination.size} are decoded")
    count, nbytes = destination.size, payload_nbytes(spec, destination.size)
    pointers = (ctypes.c_void_p * max(1, len(payloads)))()
    for i, payload in enumerate(payloads):
        if payload is None:
            pointers[i] = None
        elif payload.size != nbytes:
            check_status(_BAD_LENGTH, "decode")
        else:
            pointers[i] = _bytes("payloads", payload)
    status = _library.pq_reduce(
        ctypes.byref(_Codec(*spec)),
        len(payloads),
        pointers,
        nbytes,
        (_Keys * max(1, len(keys)))(*(_Keys(*pair) for pair in keys)),
        weight,
        None if own is None else own._as_argument,
        own_start,
        count,
        None if base is None else _floats("base", base),
        _floats("destination", destination),
    )
    check_status(status, "decode")


def apply(mean: NDArray[np.float32], start: int, target: Source) -> None:
    """With an anchor: ``anchor[start:] += mean``, and the segments become the anchor; else they become the mean."""
    if mean.dtype != np.float32 or not mean.flags.c_contiguous:
        raise ArgumentError(f"mean has dtype {mean.dtype}; allowed is a contiguous float32 array")
    status = _run(target.device, "apply", mean.ctypes.data, start, mean.size, target._as_argument)
    check_status(status, "apply")


def rebase(base: NDArray[Any], start: int, target: Source) -> None:
    """Set the segments to ``base + (segments - anchor)``: what has changed since the anchor moves to another base.

    In the type of the anchor, which is that of ``base``, and then in that of each segment.

    >>> import numpy as np
    >>> array, before = np.array([5.0, 7.0], np.float32), np.array([4.0, 4.0], np.float32)
    >>> rebase(np.array([100.0, 200.0], np.float32), 0, Source.from_arrays([array], before))
    >>> array
    array([101., 203.], dtype=float32)
    """
    if _NUMPY_DTYPES.get(base.dtype) != target._struct.anchor_dtype or not base.flags.c_contiguous:
        raise ArgumentError(f"base has dtype {base.dtype}; it must be a contiguous array of the anchor's type")
    status = _run(target.device, "rebase", base.ctypes.data, start, base.size, target._as_argument)
    check_status(status, "rebase")


def gather(source: Source, start: int, destination: NDArray[Any]) -> None:
    """Copy ``source[start : start + destination.size]``, minus the anchor, into a float32 or float64 array."""
    flags = destination.flags
    if destination.dtype not in (np.float32, np.float64) or not (flags.c_contiguous and flags.writeable):
        raise ArgumentError(
            f"destination has dtype {destination.dtype}; allowed is a writable float32 or float64 array"
        )
    dtype = _NUMPY_DTYPES[destination.dtype]
    status = _run(source.device, "gather", source._as_argument, start, destination.size, destination.ctypes.data, dtype)
    check_status(status, "gather")


def outer(
    decay: float,
    a: float,
    b: float,
    momentum: NDArray[np.float32],
    delta: NDArray[np.float32],
    device: Device | None = None,
) -> None:
    """Set ``momentum`` to ``decay * momentum + delta``, then ``delta`` to ``a * momentum + b * delta``, elementwise.

    In float32, each operation rounded; see :mod:`pqasgd_horovod.averaging.outer`.
    """
    if momentum.size != delta.size:
        raise ArgumentError(f"momentum has {momentum.size} elements, delta has {delta.size}; they must have as many")
    pointers = _floats("momentum", momentum), _floats("delta", delta)
    status = _run(device, "outer", decay, a, b, delta.size, *pointers)
    check_status(status, "outer")


def distance(source: Source, start: int, center: NDArray[np.float32]) -> float:
    """Return the sum of squares of ``source[start : start + center.size] - center``.

    >>> import numpy as np
    >>> distance(Source.from_arrays([np.array([1.0, 2.0, 5.0], np.float32)]), 1, np.array([0.0, 1.0], np.float32))
    20.0
    """
    if source.device is not None:  # a sum in one order is not the work of a GPU
        values = source.device.scratch(center.size)
        gather(source, start, values)
        return distance(Source.from_arrays([values]), 0, center)
    result = ctypes.c_double()
    status = _library.pq_distance(
        source._as_argument, start, center.size, _floats("center", center), ctypes.byref(result)
    )
    check_status(status, "distance")
    return result.value


def capture(source: Source) -> None:
    """Set the anchor to the present values of the segments."""
    check_status(_library.pq_capture(source._as_argument, 0, source.numel), "capture")


def derive_key(seed: int, rank: int, step: int, tensor: int, phase: int) -> int:
    """Return :func:`pqasgd_horovod.keys.derive_key` of the same arguments, from the core.

    >>> from pqasgd_horovod import keys
    >>> derive_key(7, 1, 2, 3, 1) == keys.derive_key(7, 1, 2, 3, 1)
    True
    """
    return _library.pq_derive_key(seed, rank, step, tensor, phase)


class Bucket:
    """One bucket of an exchange: from numbers to messages, a header and a payload each, and back to their mean.

    ``shards`` are the limits of the ranks' shards in a two-phase exchange, ``size + 1`` numbers from 0 to
    ``num_elements``. What the methods return is 0, or flags of what is wrong with the bucket in this round:
    ``exchange/wire.py`` explains them. Arguments that are wrong themselves raise ArgumentError. With a ``device``
    sources, means, bases and residuals are memory that it reaches, and messages are the host's or, with
    ``device_messages``, its own.
    """

    def __init__(
        self,
        spec: CodecSpec,
        second_spec: CodecSpec,
        *,
        bucket: int,
        num_elements: int,
        rank: int,
        size: int,
        digest: int,
        seed: int,
        shards: Sequence[int] | None = None,
        device: Device | None = None,
        device_messages: bool = False,
    ) -> None:
        self._device = device
        self._codec, self._second_codec = _Codec(*spec), _Codec(*second_spec)
        self._struct = _Bucket(digest, seed, 0, 0, num_elements, bucket, rank, size, 0)
        self._shards = None if shards is None else (ctypes.c_int64 * (size + 1))(*shards)
        if device is not None:
            codecs = ctypes.byref(self._codec), ctypes.byref(self._second_codec)
            device.reserve(*codecs, ctypes.byref(self._struct), self._shards, device_messages)

    def _arguments(self, step: int, round: int, second: bool = False) -> tuple[Any, ...]:
        self._struct.step, self._struct.round = step, round
        codec = ctypes.byref(self._second_codec if second else self._codec)
        both = (codec, ctypes.byref(self._struct))
        return both if self._shards is None else (*both, self._shards)

    def pack(
        self,
        source: Source,
        start: int,
        step: int,
        round: int,
        messages: NDArray[np.uint8] | DeviceBytes,
        flags: int = 0,
    ) -> int:
        """Encode ``source[start : start + num_elements]`` into the messages of the first phase.

        ``flags`` say what is known to be wrong already.
        """
        self._struct.flags = flags
        flags = _run(
            self._device,
            "allgather_pack" if self._shards is None else "two_phase_pack",
            *self._arguments(step, round),
            source._as_argument,
            start,
            _bytes("messages", messages, True),
            messages.size,
        )
        check_status(flags, "encode")
        return flags

    def make_mean(
        self,
        flags: int,
        received: NDArray[np.uint8] | DeviceBytes,
        source: Source,
        start: int,
        step: int,
        round: int,
        mean: NDArray[np.float32],
        message: NDArray[np.uint8] | DeviceBytes,
        residual: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
    ) -> int:
        """Second phase: write the mean of the own shard to ``mean``, and encoded to ``message``; return all flags.

        ``residual`` is that of the mean: the one that is added before it is encoded, and the one that is written.
        """
        codec, bucket, shards = self._arguments(step, round)
        flags = _run(
            self._device,
            "two_phase_mean",
            codec,
            ctypes.byref(self._second_codec),
            bucket,
            shards,
            flags,
            _bytes("received", received),
            received.size,
            source._as_argument,
            start,
            *((None, None) if residual is None else (_floats("residual", array) for array in residual)),
            _floats("mean", mean),
            _bytes("message", message, True),
            message.size,
        )
        check_status(flags, "mean")
        return flags

    def relay(
        self, flags: int, step: int, round: int, mean: NDArray[np.float32], message: NDArray[np.uint8] | DeviceBytes
    ) -> None:
        """Write another message than :meth:`make_mean`: ``mean`` as it is, and ``flags`` of what is wrong with it."""
        self._struct.step, self._struct.round = step, round
        status = _run(
            self._device,
            "two_phase_relay",
            ctypes.byref(self._struct),
            flags,
            _floats("mean", mean),
            mean.size,
            _bytes("message", message, True),
            message.size,
        )
        check_status(status, "mean")

    def land(
        self,
        received: NDArray[np.uint8] | DeviceBytes,
        step: int,
        round: int,
        base: NDArray[np.float32] | None,
        mean: NDArray[np.float32],
    ) -> int:
        """Set ``mean`` to ``base`` (or zero) plus the mean that the last phase brought; NaN if there are flags."""
        two_phase = self._shards is not None
        if mean.size != self._struct.num_elements or (base is not None and base.size != mean.size):
            raise ArgumentError(f"mean and base must have {self._struct.num_elements} elements, mean has {mean.size}")
        flags = _run(
            self._device,
            "two_phase_land" if two_phase else "allgather_land",
            *self._arguments(step, round, second=two_phase),
            _bytes("received", received),
            received.size,
            None if base is None else _floats("base", base),
            _floats("mean", mean),
        )
        check_status(flags, "decode")
        return flags


class Rows:
    """Rows of a table, of which each rank has others: from numbers to messages, and back to the mean of each row.

    :mod:`pqasgd_horovod.exchange.rows` says what a message holds. Arguments that are wrong raise ArgumentError.
    """

    def __init__(
        self,
        spec: CodecSpec,
        num_rows: int,
        row_size: int,
        *,
        table: int,
        rank: int,
        size: int,
        digest: int,
        seed: int,
    ) -> None:
        self._codec, self._table = _Codec(*spec), _Table(num_rows, row_size)
        self._struct = _Bucket(digest, seed, 0, 0, 0, table, rank, size, 0)
        self._row_size = row_size

    def nbytes(self, count: int) -> int:
        """Return the bytes of the payload of ``count`` rows."""
        nbytes: int = _library.pq_rows_nbytes(ctypes.byref(self._codec), ctypes.byref(self._table), count)
        check_status(nbytes, "rows")
        return nbytes

    def _arguments(self, step: int, round: int) -> tuple[Any, ...]:
        self._struct.step, self._struct.round = step, round
        return ctypes.byref(self._codec), ctypes.byref(self._struct), ctypes.byref(self._table)

    def pack(self, rows: NDArray[np.int64], source: Source, step: int, round: int, message: NDArray[np.uint8]) -> int:
        """Write the message of ``rows``, whose values are all of the source; return its flags."""
        self._struct.num_elements = rows.size * self._row_size
        flags: int = _library.pq_rows_pack(
            *self._arguments(step, round),
            rows.size,
            _int64(rows),
            source._as_argument,
            _bytes("message", message, True),
            message.size,
        )
        check_status(flags, "encode")
        return flags

    def land(
        self, received: NDArray[np.uint8], step: int, round: int
    ) -> tuple[int, NDArray[np.int64], NDArray[np.float32]]:
        """Return flags, the rows that any rank has sent, rising, and their means (rows, row_size); NaN with flags.

        There are no rows where messages cannot be read.
        """
        nothing = np.zeros(0, np.int64), np.zeros((0, self._row_size), np.float32)
        arguments = (*self._arguments(step, round), _bytes("received", received), received.size)
        total, count = ctypes.c_int64(), ctypes.c_int64()
        flags: int = _library.pq_rows_total(*arguments, ctypes.byref(total))
        check_status(flags, "rows")
        if flags:
            return flags, *nothing
        rows = np.empty(total.value, np.int64)
        flags = _library.pq_rows_union(*arguments, _int64(rows), ctypes.byref(count))
        check_status(flags, "rows")
        if flags:
            return flags, *nothing
        rows = rows[: count.value].copy()
        values = np.empty((rows.size, self._row_size), np.float32)
        flags = _library.pq_rows_land(*arguments, rows.size, _int64(rows), values.ctypes.data)
        check_status(flags, "rows")
        return flags, rows, values


def _int64(array: NDArray[np.int64]) -> int:
    if array.dtype != np.int64 or not array.flags.c_contiguous:
        raise ArgumentError(f"rows has dtype {array.dtype}; allowed is a contiguous int64 array")
    return array.ctypes.data


class Matrices:
    """Matrices that lie one after the other in a flat vector, each row by row, and their factors of low rank.

    Of each matrix a factor holds ``approximation_rank`` vectors, left ones of ``rows`` numbers and right ones of
    ``cols``, one vector after the other and one matrix after the other. :mod:`pqasgd_horovod.codecs.low_rank` is the
    specification. Arguments that do not fit raise ArgumentError.

    >>> import numpy as np
    >>> matrices = Matrices([(2, 3)], approximation_rank=1)
    >>> residual = np.zeros(6, np.float32), np.empty(6, np.float32)
    >>> source = Source.from_arrays([np.ones(6, np.float32)], residual=residual)
    >>> left = np.empty(2, np.float32)
    >>> matrices.project(source, 0, np.ones(3, np.float32), left)
    >>> left
    array([3., 3.], dtype=float32)
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], approximation_rank: int) -> None:
        self._matrices = (_Matrix * max(1, len(shapes)))(*(_Matrix(*shape) for shape in shapes))
        self._count, self._approximation_rank = len(shapes), approximation_rank
        lengths = [[shape[axis] for shape in shapes] for axis in (0, 1)]
        self.numel = sum(rows * cols for rows, cols in shapes)
        self.left_numel, self.right_numel = (approximation_rank * sum(side) for side in lengths)
        rows, cols = ((ctypes.c_int64 * max(1, len(shapes)))(*side) for side in lengths)
        self._rows, self._cols = (rows, self.left_numel), (cols, self.right_numel)

    def _array(self, name: str, array: NDArray[np.float32] | None, numel: int) -> int | None:
        if array is None:
            return None
        if array.size != numel:
            raise ArgumentError(f"{name} has {array.size} elements; for these matrices it must have {numel}")
        return _floats(name, array)

    def project(self, source: Source, start: int, right: NDArray[np.float32], left: NDArray[np.float32]) -> None:
        """Write the matrices, which begin at ``start``, to the source's next residual, and their left factors."""
        status = _library.pq_low_rank_project(
            self._matrices,
            self._count,
            self._approximation_rank,
            source._as_argument,
            start,
            self._array("right", right, self.right_numel),
            self._array("left", left, self.left_numel),
        )
        check_status(status, "project")

    def orthogonalize(self, side: Literal["left", "right"], factors: NDArray[np.float32]) -> None:
        """Make the vectors of each factor orthonormal, in place; one that depends on those before it becomes 0."""
        lengths, numel = self._rows if side == "left" else self._cols
        pointer = self._array(side, factors, numel)
        check_status(
            _library.pq_orthogonalize(lengths, self._count, self._approximation_rank, pointer), "orthogonalize"
        )

    def redraw(self, seed: int, step: int, first: int, right: NDArray[np.float32]) -> None:
        """Draw the vectors of right factors that are 0, with the shared key of (seed, step, ``first`` + number)."""
        status = _library.pq_low_rank_redraw(
            self._matrices,
            self._count,
            self._approximation_rank,
            seed,
            step,
            first,
            self._array("right", right, self.right_numel),
        )
        check_status(status, "redraw")

    def _rest(self, source: Source, start: int) -> int:
        pointer = source._struct.next_residual
        if pointer is None or start < 0 or start + self.numel > source.numel:
            raise ArgumentError(
                f"start is {start} in a source of {source.numel} elements; there must be a next residual, and room for "
                f"{self.numel} elements"
            )
        return int(pointer) + 4 * start

    def backproject(self, source: Source, start: int, left: NDArray[np.float32], right: NDArray[np.float32]) -> None:
        """Write the right factors of the matrices that :meth:`project` has written, with these left ones."""
        status = _library.pq_low_rank_backproject(
            self._matrices,
            self._count,
            self._approximation_rank,
            self._rest(source, start),
            self._array("left", left, self.left_numel),
            self._array("right", right, self.right_numel),
        )
        check_status(status, "backproject")

    def reconstruct(
        self,
        source: Source,
        start: int,
        left: NDArray[np.float32],
        own_right: NDArray[np.float32],
        right: NDArray[np.float32],
        base: NDArray[np.float32] | None,
        mean: NDArray[np.float32],
    ) -> None:
        """Set ``mean`` to ``base`` (or zero) plus left times right; take left times own_right from the matrices."""
        status = _library.pq_low_rank_reconstruct(
            self._matrices,
            self._count,
            self._approximation_rank,
            self._array("left", left, self.left_numel),
            self._array("own_right", own_right, self.right_numel),
            self._array("right", right, self.right_numel),
            self._array("base", base, self.numel),
            self._array("mean", mean, self.numel),
            self._rest(source, start),
        )
        check_status(status, "reconstruct")
