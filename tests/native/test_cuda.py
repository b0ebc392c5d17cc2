"""The kernels for GPUs give the bytes and the floats of the core, whatever order their threads take turns in.

They run on the CPU here: the source that nvcc compiles, thread by thread. What only a GPU shows, whether its arithmetic
is what the language says and how fast it is, ``make gpu-check`` asks.
"""

from __future__ import annotations

import ctypes
import mmap
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pqasgd_horovod import codecs, keys, native
from pqasgd_horovod.codecs.sparse import Sparse
from pqasgd_horovod.errors import ArgumentError, NativeLibraryError, WireFormatError
from pqasgd_horovod.keys import Keys
from pqasgd_horovod.native import cuda

from .. import strategies
from ..codecs.cases import ALL_CODECS, name
from ..codecs.test_contract import numbers
from .cuda_on_cpu import ORDERS, Kernels, make_source

ROOT = Path(__file__).parents[2]
OWN = keys.derive_key(seed=1, rank=2, step=3, tensor=4, phase=0)
KEYS = Keys(OWN, OWN ^ 0x5555)
SIZES = (*(size for size in strategies.SIZES if size), 20003)

every_codec = pytest.mark.parametrize("codec", ALL_CODECS, ids=name)


@pytest.fixture(scope="module")
def kernels():
    return Kernels()


@pytest.fixture(params=ORDERS, ids=lambda order: f"order-{order}")
def in_any_order(request, kernels):
    kernels.set_order(request.param)
    yield kernels
    kernels.set_order(0)


def of_the_core(codec, source, start, count, pair=KEYS):
    payload = np.empty(codec.payload_nbytes(count), np.uint8)
    finite = native.encode(codec.native_spec, source, start, count, pair, payload)
    return payload, finite


@every_codec
def test_same_bytes_and_floats(codec, in_any_order):
    for size in SIZES:
        on_device, source = make_source([numbers(size)])
        payload, finite = in_any_order.encode(codec, on_device, 0, size, KEYS)
        expected, _ = of_the_core(codec, source, 0, size)
        assert finite
        assert payload.tobytes() == expected.tobytes(), size
        start = np.random.default_rng(0).standard_normal(size).astype(np.float32)
        start[::7] = -0.0
        destination, sum_of_core = start.copy(), start.copy()
        in_any_order.decode_add(codec, payload, destination, KEYS, 1 / 3)
        native.decode_add(codec.native_spec, payload, size, KEYS, 1 / 3, sum_of_core)
        assert destination.tobytes() == sum_of_core.tobytes(), size


@pytest.mark.parametrize("block_size", [64, 128, 192, 256, 512, 576, 1024, 1536, 2048, 4096, 8192])
def test_blocks_of_any_size(block_size, in_any_order):
    """A warp has a small block, several have a large one; a number's place in memory depends on it."""
    makers = [codecs.maxscale, codecs.qsgd, codecs.terngrad, codecs.signsgd, codecs.onebit]
    some = [make(block_size=block_size) for make in makers]
    if block_size & (block_size - 1) == 0:
        some += [codecs.eden(bits=bits, block_size=block_size) for bits in (1, 4, 5)]
        some += [codecs.eden(bits=2, block_size=block_size, rounding="stochastic")]
    size = 2 * block_size + 77
    on_device, source = make_source([numbers(size)])
    for codec in some:
        payload, _ = in_any_order.encode(codec, on_device, 0, size, KEYS)
        assert payload.tobytes() == of_the_core(codec, source, 0, size)[0].tobytes(), codec
        decoded, of_core = np.zeros(size, np.float32), np.zeros(size, np.float32)
        in_any_order.decode_add(codec, payload, decoded, KEYS, 1.0)
        native.decode_add(codec.native_spec, payload, size, KEYS, 1.0, of_core)
        assert decoded.tobytes() == of_core.tobytes(), codec


@every_codec
@pytest.mark.parametrize("anchor_dtype", [None, np.float32, np.float64])
def test_segments_anchors_and_residuals(codec, anchor_dtype, kernels):
    rng = np.random.default_rng(3)
    arrays = [
        numbers(3), numbers(700, np.float16), numbers(0), numbers(1500, np.float64), numbers(1),
        (numbers(900).view(np.uint32) >> np.uint32(16)).astype(np.uint16), numbers(9000),
    ]  # fmt: skip
    total = sum(array.size for array in arrays)
    anchor = None if anchor_dtype is None else rng.standard_normal(total).astype(anchor_dtype)
    residual = rng.standard_normal(total).astype(np.float32)
    for start, count in [(0, total), (2, 1300), (702, 1), (3105, 8999)]:
        for feeds_back in (False, True):
            rests = [np.full(total, 5, np.float32) for _ in range(2)]
            on_device, _ = make_source(arrays, anchor, (residual, rests[0]) if feeds_back else None)
            _, source = make_source(arrays, anchor, (residual, rests[1]) if feeds_back else None)
            payload, finite = kernels.encode(codec, on_device, start, count, KEYS)
            expected, _ = of_the_core(codec, source, start, count)
            assert finite
            assert payload.tobytes() == expected.tobytes(), (start, count, feeds_back)
            assert rests[0].tobytes() == rests[1].tobytes(), (start, count, feeds_back)


@every_codec
def test_reduce_is_that_of_the_core(codec, in_any_order):
    rng = np.random.default_rng(4)
    own_start, base = 7, rng.standard_normal(9100).astype(np.float32)
    for size, ranks in [(1, 1), (700, 3), (9100, 2), (130, 70)]:  # more payloads than a launch takes
        own_on_device, own = make_source([rng.standard_normal(size + 20).astype(np.float32)])
        payloads, pairs = [], []
        for rank in range(ranks):
            pairs.append(Keys(keys.derive_key(1, rank, 3, 4, 0), KEYS.shared))
            _, source = make_source([numbers(size) * np.float32(rank + 1)])
            payloads.append(None if rank == ranks // 2 else of_the_core(codec, source, 0, size, pairs[-1])[0])
        for offset in (None, base[:size]):
            means = [np.full(size, np.nan, np.float32) for _ in range(2)]
            in_any_order.reduce(codec, payloads, pairs, 1 / ranks, own_on_device, own_start, means[0], offset)
            native.reduce(codec.native_spec, payloads, pairs, 1 / ranks, own, own_start, means[1], offset)
            assert means[0].tobytes() == means[1].tobytes(), (size, ranks)


@pytest.mark.parametrize(
    "codec", [codecs.eden(), codecs.topk(0.1), *(c for c in ALL_CODECS if c.id == "randomk")], ids=name
)
def test_what_an_owner_leaves(codec, in_any_order):
    size = 9000
    values, residual, rest = numbers(size), numbers(size)[::-1].copy(), np.full(size, np.nan, np.float32)
    on_device, _ = make_source([values], residual=(residual, rest))
    in_any_order.library.own_rest(codec.native_spec, on_device, 0, size, KEYS)
    if codec.id != "randomk":
        assert not rest.any()
        return
    total = values + residual
    counts = np.zeros(size, np.float32)
    in_any_order.reduce(codec, [None], [KEYS], 1.0, make_source([total])[0], 0, counts)
    assert rest.tobytes() == (total - counts).tobytes()
    assert 0 < np.count_nonzero(counts) < size


@every_codec
def test_not_finite_is_found(codec, kernels):
    for position in (0, 63, 64, 1023, 1099):
        for bad in (np.nan, np.inf, -np.inf):
            values = numbers(1100)
            values[position] = bad
            assert not kernels.encode(codec, make_source([values])[0], 0, 1100, KEYS)[1], (position, bad)


@every_codec
def test_tiny_and_huge_numbers(codec, kernels):
    shape = np.random.default_rng(5).uniform(-1, 1, 700).astype(np.float32)
    shape[3] = 1
    edges = [2.0**-100, 2.0**-50, 2.0**-40, 65504.0, 65520.0, 2.0**59, 2.0**64, 2.0**126, 2.0**127, 3.3895314e38]
    magnitudes = [1e-45, 1e-38, 1e-30, 3.4028235e38]
    for edge in map(np.float32, edges):
        magnitudes += [np.nextafter(edge, np.float32(0)), edge, np.nextafter(edge, np.float32(np.inf))]
    for magnitude in map(np.float32, magnitudes):
        on_device, source = make_source([shape * magnitude])
        payload, finite = kernels.encode(codec, on_device, 0, 700, KEYS)
        expected, finite_in_core = of_the_core(codec, source, 0, 700)
        assert finite == finite_in_core, magnitude
        if not finite:
            continue
        assert payload.tobytes() == expected.tobytes(), magnitude
        sums = [np.zeros(700, np.float32) for _ in range(2)]
        kernels.decode_add(codec, payload, sums[0], KEYS)
        native.decode_add(codec.native_spec, payload, 700, KEYS, 1.0, sums[1])
        assert sums[0].tobytes() == sums[1].tobytes(), magnitude


@every_codec
def test_damaged_payloads(codec, kernels):
    """What an attacker or a broken wire makes is read within its limits, and found in the same cases as by the core."""
    size = 1300
    payload, _ = of_the_core(codec, make_source([numbers(size)])[1], 0, size)
    rng = np.random.default_rng(6)
    found = 0
    for attempt in range(40):
        damaged = payload.copy()
        if attempt < 30:
            damaged[rng.integers(payload.size)] ^= 1 << rng.integers(8)
        else:
            damaged[:] = rng.integers(0, 256, payload.size)
        sums, errors = [np.zeros(size, np.float32) for _ in range(2)], []
        for decode, destination in [
            (lambda to, bytes_=damaged: kernels.decode_add(codec, bytes_, to, KEYS), sums[0]),
            (lambda to, bytes_=damaged: native.decode_add(codec.native_spec, bytes_, size, KEYS, 1.0, to), sums[1]),
        ]:
            try:
                decode(destination)
            except WireFormatError:
                errors.append(True)
        assert len(errors) in (0, 2), attempt
        found += len(errors)
        if not errors:
            np.testing.assert_array_equal(sums[0].view(np.uint32), sums[1].view(np.uint32))
    if isinstance(codec, Sparse) and codec.id != "randomk":
        assert found


@settings(max_examples=150, deadline=None)
@given(
    codec=strategies.all_codecs(),
    size=st.integers(1, 3000),
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(-30, 30),
    pair=st.builds(Keys, strategies.keys(), strategies.keys()),
    start=st.integers(0, 70),
)
def test_any_codec(kernels, codec, size, seed, scale, pair, start):
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(size + start) * 2.0**scale).astype(np.float32)
    values[rng.random(values.size) < 0.3] = 0
    on_device, source = make_source([values])
    payload, finite = kernels.encode(codec, on_device, start, size, pair)
    expected, finite_in_core = of_the_core(codec, source, start, size, pair)
    assert finite == finite_in_core
    if finite:
        assert payload.tobytes() == expected.tobytes()
        sums = [np.zeros(size, np.float32) for _ in range(2)]
        kernels.decode_add(codec, payload, sums[0], pair, 0.7)
        native.decode_add(codec.native_spec, payload, size, pair, 0.7, sums[1])
        assert sums[0].tobytes() == sums[1].tobytes()


@pytest.fixture(scope="module")
def guarded():
    """Memory that ends where no page follows."""
    page, libc = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)
    area = mmap.mmap(-1, 65 * page)
    memory = np.frombuffer(area, np.uint8)
    assert libc.mprotect(ctypes.c_void_p(memory.ctypes.data + 64 * page), page, 0) == 0, ctypes.get_errno()
    yield memory[: 64 * page]
    libc.mprotect(ctypes.c_void_p(memory.ctypes.data + 64 * page), page, mmap.PROT_READ | mmap.PROT_WRITE)


@every_codec
def test_nothing_past_a_payload_is_touched(codec, kernels, guarded):
    for size in (1, 63, 1100):
        on_device, source = make_source([numbers(size)])
        expected, _ = of_the_core(codec, source, 0, size)
        payload = guarded[guarded.size - expected.size :]
        payload[:], found = 0, np.zeros(1, np.int32)
        workspace = np.zeros(size, np.float32)
        kernels.library.encode(
            codec.native_spec, on_device, 0, size, KEYS, payload.ctypes.data, payload.size,
            workspace.ctypes.data, found.ctypes.data,
        )  # fmt: skip
        assert payload.tobytes() == expected.tobytes()
        kernels.decode_add(codec, payload, np.zeros(size, np.float32), KEYS)


def test_unaligned_payloads(kernels):
    """Messages lie one after the other: a payload may begin at any byte."""
    for codec in (codecs.none(), codecs.fp16(), codecs.natural(), *(codecs.eden(bits=bits) for bits in range(1, 9))):
        size = 1100
        on_device, source = make_source([numbers(size)])
        expected, _ = of_the_core(codec, source, 0, size)
        for offset in (1, 2, 4):
            memory = np.full(expected.size + 16, 0xEE, np.uint8)
            found = np.zeros(1, np.int32)
            kernels.library.encode(
                codec.native_spec, on_device, 0, size, KEYS, memory.ctypes.data + offset, expected.size,
                0, found.ctypes.data,
            )  # fmt: skip
            assert memory[offset : offset + expected.size].tobytes() == expected.tobytes()
            assert (memory[:offset] == 0xEE).all()
            assert (memory[offset + expected.size :] == 0xEE).all()
            sums = [np.zeros(size, np.float32) for _ in range(2)]
            kernels.decode_add(codec, memory[offset : offset + expected.size], sums[0], KEYS)
            native.decode_add(codec.native_spec, expected, size, KEYS, 1.0, sums[1])
            assert sums[0].tobytes() == sums[1].tobytes()


def copies(arrays):
    return [[array.copy() for array in arrays] for _ in range(2)]


@pytest.mark.parametrize("anchor_dtype", [None, np.float32, np.float64])
def test_apply_rebase_gather_capture_outer(anchor_dtype, in_any_order):
    rng = np.random.default_rng(8)
    library = in_any_order.library
    arrays = [
        rng.standard_normal(n).astype(t)
        for n, t in [(5, np.float32), (2000, np.float64), (0, np.float32), (3000, np.float16)]
    ]
    arrays.append((rng.standard_normal(700).astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16))
    total = sum(array.size for array in arrays)
    anchor = [] if anchor_dtype is None else [rng.standard_normal(total).astype(anchor_dtype)]
    start, count = 3, total - 10
    mean = rng.standard_normal(count).astype(np.float32)
    mean[5] = np.inf
    device, host = copies([*arrays, *anchor])

    def sources():
        parts = (device, host) if anchor_dtype is None else (device[:-1], host[:-1])
        anchors = (None, None) if anchor_dtype is None else (device[-1], host[-1])
        return make_source(parts[0], anchors[0])[0], make_source(parts[1], anchors[1])[1]

    def agree(what):
        for mine, theirs in zip(device, host, strict=True):
            assert mine.tobytes() == theirs.tobytes(), what

    on_device, source = sources()
    for dtype, code in [(np.float32, native.DTYPE_F32), (np.float64, native.DTYPE_F64)]:
        gathered = [np.empty(count, dtype) for _ in range(2)]
        library.gather(on_device, start, count, gathered[0].ctypes.data, code)
        native.gather(source, start, gathered[1])
        assert gathered[0].tobytes() == gathered[1].tobytes()
    if anchor_dtype is not None:
        base = rng.standard_normal(count).astype(anchor_dtype)
        library.rebase(base.ctypes.data, start, count, on_device)
        native.rebase(base, start, source)
        agree("rebase")
    library.apply(mean.ctypes.data, start, count, on_device)
    native.apply(mean, start, source)
    agree("apply")
    if anchor_dtype is not None:
        library.capture(on_device)
        native.capture(source)
        agree("capture")
    (momentum, delta), (momentum_of_core, delta_of_core) = copies([mean[:100], mean[100:200]])
    library.outer(0.9, 0.3, 0.7, 100, momentum.ctypes.data, delta.ctypes.data)
    native.outer(0.9, 0.3, 0.7, momentum_of_core, delta_of_core)
    assert momentum.tobytes() == momentum_of_core.tobytes()
    assert delta.tobytes() == delta_of_core.tobytes()


def test_wrong_arguments_are_refused(kernels):
    library, source = kernels.library, make_source([numbers(100)])[0]
    memory = np.zeros(2000, np.uint8)
    at, spec = memory.ctypes.data, codecs.eden(bits=4).native_spec
    nbytes = codecs.eden(bits=4).payload_nbytes(100)
    with pytest.raises(WireFormatError, match="truncated or foreign"):
        library.encode(spec, source, 0, 100, KEYS, at, nbytes - 1, 0, at)
    for start, count in [(1, 100), (-1, 5), (101, 0)]:
        with pytest.raises(ArgumentError, match="not valid"):
            library.encode(spec, source, start, count, KEYS, at, codecs.eden(bits=4).payload_nbytes(count), 0, at)
    with pytest.raises(ArgumentError, match="not valid"):
        library.encode(spec._replace(bits=9), source, 0, 100, KEYS, at, nbytes, 0, at)
    with pytest.raises(ArgumentError, match="not valid"):
        library.encode(spec, source, 0, 100, KEYS, at, nbytes, 0, 0)
    sparse = codecs.topk(0.1)
    with pytest.raises(ArgumentError, match="not valid"):
        library.encode(sparse.native_spec, source, 0, 100, KEYS, at, sparse.payload_nbytes(100), 0, at)


def test_nvcc_has_compiled_them():
    """Where there is a compiler, and only there; the library can be loaded where there is no GPU."""
    nvcc = shutil.which("nvcc")
    assert cuda.is_built() == (nvcc is not None)
    if nvcc is None:
        with pytest.raises(NativeLibraryError, match="PQASGD_WITH_CUDA=1"):
            cuda.load()
        return
    text = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    known = sorted(int(name.removeprefix("compute_")) for name in text.split())
    expected = [str(number) for number in known if number >= 70]
    assert cuda.load().architectures == " ".join(expected) + "+PTX"


def build_with(monkeypatch, **environment):
    """Ask setup.py what it would build, without nvcc anywhere."""
    for variable in ("CUDA_HOME", "CUDA_PATH", "PQASGD_WITH_CUDA", "PQASGD_WITHOUT_CUDA"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    script = (
        "import setuptools; setuptools.setup = lambda **_: None; import setup;"
        "setup.find_nvcc = lambda: None; print(setup.with_cuda())"
    )
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)


def test_asking_for_them_without_a_compiler_is_an_error(monkeypatch):
    assert build_with(monkeypatch).stdout == "False\n"
    assert build_with(monkeypatch, PQASGD_WITHOUT_CUDA="1").stdout == "False\n"
    asked = build_with(monkeypatch, PQASGD_WITH_CUDA="1")
    assert asked.returncode == 1
    assert "PQASGD_WITH_CUDA=1, and nvcc was found neither in CUDA_HOME/bin nor in PATH" in asked.stderr


def test_a_library_that_is_not_there(tmp_path):
    with pytest.raises(NativeLibraryError, match="PQASGD_WITH_CUDA=1"):
        cuda.Library(tmp_path / "libpqasgd_cuda.so")
