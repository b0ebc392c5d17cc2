"""On a real GPU: the bytes of every kernel, averages, and what goes wrong. ``make gpu-check`` runs them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pqasgd_horovod import codecs, native
from pqasgd_horovod.averaging import ArrayView, ExchangeConfig, Feedback, PeriodicAverager, PeriodicAveraging
from pqasgd_horovod.errors import DeviceError
from pqasgd_horovod.exchange.carriers.threads import run_ranks
from pqasgd_horovod.keys import Keys
from pqasgd_horovod.native import cuda

from ..codecs.cases import ALL_CODECS, name
from ..codecs.test_contract import numbers
from ..native.cuda_on_cpu import DeviceCarrier, upload

pytestmark = pytest.mark.gpu

KEYS = Keys(0x0123456789ABCDEF, 0xFEDCBA9876543210)
DTYPES = {
    torch.float32: native.DTYPE_F32,
    torch.float64: native.DTYPE_F64,
    torch.float16: native.DTYPE_F16,
    torch.bfloat16: native.DTYPE_BF16,
}


def on_device(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy()).cuda()


def make_source(tensors, residual=None):
    segments = [(tensor.data_ptr(), DTYPES[tensor.dtype], tensor.numel()) for tensor in tensors]
    table = on_device(cuda.DeviceSource.table(segments))
    pointers = None if residual is None else tuple(tensor.data_ptr() for tensor in residual)
    source = cuda.DeviceSource(segments, table.data_ptr(), None, pointers)
    source.owner = (table, tensors, residual)
    return source


class Kernels:
    def __init__(self, codec, count):
        self.library, self.codec, self.count = cuda.load(), codec, count
        self.nbytes = codec.payload_nbytes(count)
        self.payload = torch.zeros(max(self.nbytes, 1), dtype=torch.uint8, device="cuda")
        workspace = self.library.workspace_nbytes(codec.native_spec, count)
        self.workspace = torch.zeros(max(workspace, 8), dtype=torch.uint8, device="cuda")
        self.status = torch.zeros(1, dtype=torch.int32, device="cuda")

    def encode(self, source):
        self.library.encode(
            self.codec.native_spec, source, 0, self.count, KEYS, self.payload.data_ptr(), self.nbytes,
            self.workspace.data_ptr(), self.status.data_ptr(), torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
        return self.payload[: self.nbytes].cpu().numpy()

    def decode_add(self, destination, weight):
        self.library.decode_add(
            self.codec.native_spec, self.payload.data_ptr(), self.nbytes, self.count, KEYS, weight,
            destination.data_ptr(), self.workspace.data_ptr(), self.status.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
        return destination.cpu().numpy()


def test_the_kernels_run_on_this_device():
    cuda.load().check_device(torch.cuda.get_device_name())


@pytest.mark.parametrize("codec", ALL_CODECS, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bytes_and_floats_are_those_of_the_core(codec, dtype):
    for size in (1, 65, 1025, 20003, 1 << 20):
        values = torch.from_numpy(numbers(size)).to(dtype)
        wide = values.float().numpy()
        residual = np.random.default_rng(1).standard_normal(size).astype(np.float32)
        rest, own = torch.zeros(size, device="cuda"), np.zeros(size, np.float32)
        kernels = Kernels(codec, size)
        payload = kernels.encode(make_source([values.cuda()], (on_device(residual), rest)))
        expected = np.empty(codec.payload_nbytes(size), np.uint8)
        source = native.Source.from_arrays([wide], residual=(residual, own))
        assert native.encode(codec.native_spec, source, 0, size, KEYS, expected)
        assert payload.tobytes() == expected.tobytes(), size
        assert rest.cpu().numpy().tobytes() == own.tobytes(), size
        total = wide.copy()
        native.decode_add(codec.native_spec, expected, size, KEYS, 1 / 3, total)
        assert kernels.decode_add(on_device(wide), 1 / 3).tobytes() == total.tobytes(), size
        assert int(kernels.status) == 0


@pytest.mark.parametrize("codec", [codecs.eden(bits=2), codecs.maxscale(bits=4), codecs.topk(0.01)], ids=name)
def test_numbers_that_are_not_finite_are_found(codec):
    values = numbers(5000)
    values[4999] = np.nan
    kernels = Kernels(codec, 5000)
    kernels.encode(make_source([on_device(values)]))
    assert not kernels.library.check_found(int(kernels.status), "encode")


EDEN = codecs.eden(bits=2)


def train(carrier, place, codec=EDEN):
    device = None if place == "host" else cuda.Device(0, numbers_on_host=place == "cpu")
    averager = PeriodicAverager(
        carrier,
        PeriodicAveraging(period=2),
        ExchangeConfig(codec, feedback=Feedback()),
        name="test",
        check_consistency=True,
    )
    views = []
    for rows, cols in ((300, 100), (1, 7)):
        array = native.zeros(rows * cols, device=device).reshape(rows, cols)
        array[:] = np.random.default_rng(rows).standard_normal((rows, cols))
        views.append(ArrayView(f"w{rows}", array, device))
    averager.prepare(views)
    for step in range(5):
        for view in views:
            view.array += np.random.default_rng([carrier.rank, step]).standard_normal(view.shape).astype(np.float32)
        averager.count_step()
    averager.flush()
    return [view.array.tobytes() for view in views]


@pytest.mark.parametrize("codec", [EDEN, codecs.powersgd(2)], ids=str)
@pytest.mark.parametrize("place", ["gpu", "cpu"])
def test_averages_have_the_bits_of_cpus(place, codec):
    expected = run_ranks(2, lambda carrier: train(carrier, "host", codec))
    assert run_ranks(2, lambda carrier: train(carrier, place, codec)) == expected
    assert run_ranks(2, lambda carrier: train(carrier, place if carrier.rank else "host", codec)) == expected


def test_messages_stay_on_the_gpu(monkeypatch):
    """Both ranks have the same one here, which averaging must not know: NCCL would refuse it."""
    monkeypatch.setattr(cuda.Device, "identity", property(lambda device: id(device).to_bytes(16, "little")))
    sent = []

    def program(carrier):
        carrier = DeviceCarrier(carrier)
        found = train(carrier, "gpu")
        sent.append(len(carrier.names))
        return found

    assert run_ranks(2, program) == run_ranks(2, lambda carrier: train(carrier, "host"))
    assert len(sent) == 2
    assert min(sent) > 0


def test_messages_are_tensors_for_horovod():
    """The same memory; and what Horovod has let the default stream wait for is waited for on any other."""
    pytest.importorskip("horovod", reason="gpu-check --without-horovod")
    from pqasgd_horovod.torch import devices

    side = torch.cuda.Stream()
    device = cuda.Device(0, lambda: torch.cuda.current_stream().cuda_stream)
    values = np.arange(1000, dtype=np.uint8)
    memory = upload(device, values)
    tensor = devices.to_tensor(memory)
    assert (tensor.data_ptr(), tensor.is_cuda) == (memory.pointer, True)
    assert tensor.cpu().numpy().tobytes() == values.tobytes()
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)
    tensor.fill_(7)
    with torch.cuda.stream(side):
        assert devices.from_tensor(tensor, device).to_host().tolist() == [7] * 1000


def test_a_device_that_is_not_there():
    with pytest.raises(DeviceError):
        cuda.Device(torch.cuda.device_count()).zeros(10)
