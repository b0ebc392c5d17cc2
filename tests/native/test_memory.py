"""The native core reads and writes the caller's memory: segments of any dtype, anchors, means.

Each function is compared with the same thing said in NumPy, on every instruction set and with several threads.
"""

import numpy as np
import pytest

from pqasgd_horovod import native
from pqasgd_horovod.errors import ArgumentError, WireFormatError
from pqasgd_horovod.keys import Keys

DTYPES = [np.float32, np.float64, np.float16]


@pytest.fixture(params=native.available_isas())
def isa(request):
    native.force_isa(request.param)
    yield request.param
    native.force_isa(None)


@pytest.fixture(params=[1, 3])
def threads(request):
    before = native.get_num_threads()
    native.set_num_threads(request.param)
    yield request.param
    native.set_num_threads(before)


def to_bf16(x):
    """Round float32 to bfloat16, ties to even, as uint16."""
    u = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(h):
    return (h.astype(np.uint32) << 16).view(np.float32)


def make_arrays(rng, sizes):
    return [rng.standard_normal(size).astype(DTYPES[i % 3]) for i, size in enumerate(sizes)]


SIZES = [5, 1, 0, 2000, 700_001, 64, 3]


@pytest.mark.parametrize("anchor_dtype", [None, np.float32, np.float64])
@pytest.mark.parametrize("out_dtype", [np.float32, np.float64])
def test_gather_flattens_and_subtracts(isa, threads, anchor_dtype, out_dtype):
    rng = np.random.default_rng(1)
    arrays = make_arrays(rng, SIZES)
    total = sum(SIZES)
    anchor = None if anchor_dtype is None else rng.standard_normal(total).astype(anchor_dtype)
    source = native.Source.from_arrays(arrays, anchor)
    for start, count in [(0, total), (3, total - 7), (5, 1), (6, 2000), (total, 0)]:
        out = np.full(count, np.nan, out_dtype)
        native.gather(source, start, out)
        wide = np.concatenate([a.astype(np.float64) for a in arrays])[start : start + count]
        if anchor is not None:
            wide = wide - anchor[start : start + count].astype(np.float64)
        if out_dtype == np.float32 and anchor_dtype == np.float32:
            # Values become float32 first, then one float32 subtraction.
            narrow = np.concatenate([a.astype(np.float32) for a in arrays])[start : start + count]
            wide = narrow - anchor[start : start + count]
        if out_dtype == np.float32 and anchor_dtype == np.float64:
            wide = wide.astype(np.float32)
        np.testing.assert_array_equal(out, wide.astype(out_dtype))


@pytest.mark.parametrize("anchor_dtype", [np.float32, np.float64])
def test_apply_moves_the_anchor_and_the_segments(isa, threads, anchor_dtype):
    rng = np.random.default_rng(2)
    arrays = make_arrays(rng, SIZES)
    total = sum(SIZES)
    anchor = rng.standard_normal(total).astype(anchor_dtype)
    before, old = anchor.copy(), [a.copy() for a in arrays]
    start, count = 4, total - 6
    mean = rng.standard_normal(count).astype(np.float32)
    native.apply(mean, start, native.Source.from_arrays(arrays, anchor))
    want = before.copy()
    want[start : start + count] += mean
    np.testing.assert_array_equal(anchor, want)
    position = 0
    for array, untouched in zip(arrays, old, strict=True):
        inside = np.arange(position, position + array.size)
        touched = (inside >= start) & (inside < start + count)
        values = anchor[inside]
        if anchor_dtype == np.float64 and array.dtype == np.float16:
            values = values.astype(np.float32)  # fp16 is reached through float32
        np.testing.assert_array_equal(array, np.where(touched, values.astype(array.dtype), untouched))
        position += array.size


def test_apply_without_anchor_writes_the_mean(isa, threads):
    rng = np.random.default_rng(3)
    arrays = make_arrays(rng, SIZES)
    mean = rng.standard_normal(sum(SIZES)).astype(np.float32)
    native.apply(mean, 0, native.Source.from_arrays(arrays))
    position = 0
    for array in arrays:
        np.testing.assert_array_equal(array, mean[position : position + array.size].astype(array.dtype))
        position += array.size


def test_bfloat16_segments(isa):
    rng = np.random.default_rng(4)
    values = to_bf16(np.concatenate([rng.standard_normal(4999), [0.0, -0.0, 3e38, 1e-40]]))
    anchor = rng.standard_normal(values.size).astype(np.float32)
    source = native.Source(
        [(values.ctypes.data, native.DTYPE_BF16, values.size)], (anchor.ctypes.data, native.DTYPE_F32), (values, anchor)
    )
    delta = np.empty(values.size, np.float32)
    native.gather(source, 0, delta)
    np.testing.assert_array_equal(delta, from_bf16(values) - anchor)
    want = anchor + delta
    native.apply(delta, 0, source)
    np.testing.assert_array_equal(anchor, want)
    np.testing.assert_array_equal(values, to_bf16(want))


def test_half_precision_is_converted_as_numpy_does(isa):
    """All 65,536 fp16 numbers both ways, and float32 numbers around every rounding boundary."""
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    out = np.empty(halves.size, np.float32)
    native.gather(native.Source.from_arrays([halves]), 0, out)
    np.testing.assert_array_equal(out.view(np.uint32), halves.astype(np.float32).view(np.uint32))
    middles = (out[:-1].astype(np.float64) + out[1:]) / 2
    near = np.concatenate([np.nextafter(middles.astype(np.float32), side) for side in (-np.inf, np.inf)])
    floats = np.concatenate([out, middles.astype(np.float32), near, [1e-45, -1e-45, 2.9e-8, 3e-8, 65519.0]]).astype(
        np.float32
    )
    back = np.empty(floats.size, np.float16)
    native.apply(floats, 0, native.Source.from_arrays([back]))
    np.testing.assert_array_equal(back.view(np.uint16), floats.astype(np.float16).view(np.uint16))


def test_capture_copies_values_into_the_anchor(isa, threads):
    arrays = make_arrays(np.random.default_rng(5), SIZES)
    anchor = np.full(sum(SIZES), np.nan)
    native.capture(native.Source.from_arrays(arrays, anchor))
    np.testing.assert_array_equal(anchor, np.concatenate([a.astype(np.float64) for a in arrays]))


def test_a_caller_that_flushes_subnormals_gets_the_same_bytes():
    """torch.set_flush_denormal changes the thread's float environment; the payload must not notice."""
    import torch

    spec = native.CodecSpec(native.KIND_FP16, 16, 1024)
    x = np.full(64, 1e-7, np.float32)  # subnormal in fp16
    tiny = np.full(64, 1e-40, np.float32)  # subnormal in fp32
    payloads = []
    for flush in (False, True):
        supported = torch.set_flush_denormal(flush)
        try:
            for values in (x, tiny):
                out = np.empty(native.payload_nbytes(spec, 64), np.uint8)
                assert native.encode(spec, native.Source.from_arrays([values]), 0, 64, Keys(0), out)
                back = np.zeros(64, np.float32)
                native.decode_add(spec, out, 64, Keys(0), 1e-3, back)
                payloads.append((out.tobytes(), back.tobytes()))
        finally:
            torch.set_flush_denormal(False)
        assert supported
    assert payloads[:2] == payloads[2:]


def test_reduce_is_decode_add_in_order(isa, threads):
    rng = np.random.default_rng(6)
    n = 300_000
    spec = native.CodecSpec(native.KIND_EDEN, 3, 1024)
    vectors = [rng.standard_normal(n).astype(np.float32) for _ in range(3)]
    payloads = []
    for r, v in enumerate(vectors):
        out = np.empty(native.payload_nbytes(spec, n), np.uint8)
        assert native.encode(spec, native.Source.from_arrays([v]), 0, n, Keys(r), out)
        payloads.append(out)
    keys = [Keys(0), Keys(1), Keys(2)]
    weight = float(np.float32(1 / 3))
    own = native.Source.from_arrays([np.zeros(10, np.float32), vectors[1]])
    got = np.full(n, np.nan, np.float32)
    native.reduce(spec, [payloads[0], None, payloads[2]], keys, weight, own, 10, got)
    want = np.zeros(n, np.float32)
    native.decode_add(spec, payloads[0], n, keys[0], weight, want)
    want += vectors[1] * np.float32(weight)
    native.decode_add(spec, payloads[2], n, keys[2], weight, want)
    np.testing.assert_array_equal(got, want)
    base = rng.standard_normal(n).astype(np.float32)
    native.reduce(spec, [payloads[0], None, payloads[2]], keys, weight, own, 10, got, base)
    np.testing.assert_array_equal(got, base + want)  # the mean first, then one addition


class TestRefusals:
    spec = native.CodecSpec(native.KIND_MAXSCALE, 4, 512)

    def test_lengths(self):
        source = native.Source.from_arrays([np.zeros(100, np.float32)])
        out = np.empty(native.payload_nbytes(self.spec, 100), np.uint8)
        with pytest.raises(WireFormatError, match="truncated"):
            native.encode(self.spec, source, 0, 100, Keys(0), out[:-1])
        with pytest.raises(ArgumentError):
            native.encode(self.spec, source, 1, 100, Keys(0), out)  # one element past the end
        with pytest.raises(ArgumentError):
            native.encode(self.spec, source, -1, 100, Keys(0), out)
        with pytest.raises(WireFormatError):
            native.reduce(self.spec, [out[:-1].copy()], [Keys(0)], 1.0, None, 0, np.empty(100, np.float32))
        with pytest.raises(ArgumentError):
            native.reduce(self.spec, [None], [Keys(0)], 1.0, None, 0, np.empty(100, np.float32))

    @pytest.mark.parametrize(
        "spec",
        [
            (native.KIND_MAXSCALE, 1, 512),
            (native.KIND_MAXSCALE, 9, 512),
            (native.KIND_MAXSCALE, 4, 96),
            (native.KIND_MAXSCALE, 4, 16384),
            (native.KIND_EDEN, 0, 1024),
            (native.KIND_EDEN, 4, 1536),
            (native.KIND_EDEN, 4, 0),
            (native.KIND_FP16, 16, 512),
            (99, 4, 512),
            (-1, 4, 512),
        ],
    )
    def test_codecs_that_do_not_exist(self, spec):
        with pytest.raises(ArgumentError):
            native.payload_nbytes(native.CodecSpec(*spec), 100)

    def test_memory_of_the_wrong_kind(self):
        with pytest.raises(ArgumentError, match="float32"):
            native.Source.from_arrays([np.zeros(3, np.int32)])
        with pytest.raises(ArgumentError, match="contiguous"):
            native.Source.from_arrays([np.zeros((4, 4), np.float32)[:, 1]])
        with pytest.raises(ArgumentError, match="3 elements"):
            native.Source.from_arrays([np.zeros(3, np.float32)], np.zeros(2, np.float32))
        read_only = np.zeros(100, np.float32)
        read_only.flags.writeable = False
        with pytest.raises(ArgumentError, match="writable"):
            native.decode_add(self.spec, np.zeros(10, np.uint8), 100, Keys(0), 1.0, read_only)

    def test_threads_and_instruction_sets(self):
        with pytest.raises(ArgumentError, match="threads=0"):
            native.set_num_threads(0)
        with pytest.raises(ArgumentError, match="choose from"):
            native.force_isa("abacus")


@pytest.mark.parametrize("anchor_dtype", [np.float32, np.float64])
def test_rebase_carries_what_has_changed_to_another_base(isa, threads, anchor_dtype):
    rng = np.random.default_rng(1)
    total = sum(SIZES)
    halves = rng.standard_normal(300).astype(np.float32)
    for start, count in [(3, total + 290), (5, 1), (total + 300, 0)]:
        arrays = make_arrays(np.random.default_rng(2), SIZES)
        bf16 = to_bf16(halves)
        segments = [(a.ctypes.data, {2: native.DTYPE_F16, 4: native.DTYPE_F32, 8: native.DTYPE_F64}[a.itemsize], a.size)
                    for a in arrays]  # fmt: skip
        anchor = rng.standard_normal(total + 300).astype(anchor_dtype)
        base = rng.standard_normal(count).astype(anchor_dtype)
        target = native.Source(
            [*segments, (bf16.ctypes.data, native.DTYPE_BF16, bf16.size)],
            (anchor.ctypes.data, native.DTYPE_F64 if anchor_dtype == np.float64 else native.DTYPE_F32),
        )
        wanted, at = [], 0
        for before in [*(a.copy() for a in arrays), from_bf16(bf16.copy())]:
            # A segment wider than the anchor is read in the anchor's type first.
            narrow = before if before.dtype == anchor_dtype else before.astype(np.float32)
            place = slice(max(at, start), max(at, start, min(at + before.size, start + count)))
            inside = slice(place.start - at, place.stop - at)
            after = base[place.start - start : place.stop - start] + (
                narrow[inside].astype(anchor_dtype) - anchor[place]
            )
            wanted.append(before)
            wanted[-1][inside] = after if after.dtype == before.dtype else after.astype(np.float32)
            at += before.size
        native.rebase(base, start, target)
        for array, expected in zip(arrays, wanted, strict=False):
            np.testing.assert_array_equal(array, expected)
        np.testing.assert_array_equal(bf16, to_bf16(wanted[-1]))


def test_rebase_refuses_a_base_of_another_type_and_a_target_without_an_anchor():
    array = np.zeros(3, np.float32)
    with pytest.raises(ArgumentError, match="base has dtype float64"):
        native.rebase(np.zeros(3), 0, native.Source.from_arrays([array], array.copy()))
    with pytest.raises(ArgumentError, match="rebase"):
        native.rebase(np.zeros(3, np.float32), 0, native.Source.from_arrays([array]))
    with pytest.raises(ArgumentError, match="rebase"):
        native.rebase(np.zeros(3, np.float32), 1, native.Source.from_arrays([array], array.copy()))
