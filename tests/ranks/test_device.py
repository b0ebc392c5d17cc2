"""Models on a GPU under Horovod: the bits of a CPU, on whichever ranks there are GPUs, and whatever carries messages.

NCCL is Horovod's CPU operations on copies. The GPU is a CPU that runs the kernels thread by thread
(tests/native/cuda_on_cpu); ``make gpu-check`` asks a real one.
"""

from __future__ import annotations

import horovod.torch as horovod
import pytest
import torch

import pqasgd_horovod.torch as hvd
from pqasgd_horovod.errors import ArgumentError, DeviceError, MismatchError, NonFiniteError, PqasgdError
from pqasgd_horovod.native.cuda import Device, Library
from pqasgd_horovod.torch import devices
from tests.native.cuda_on_cpu import build, upload
from tests.ranks.common import loss_of, make_model, two_ranks

pytestmark = two_ranks


@pytest.fixture(scope="module")
def kernels():
    """One rank compiles them for all."""
    path = build() if hvd.rank() == 0 else None
    return Library(hvd.broadcast_object(path, 0, name="kernels"))


@pytest.fixture
def pretend(monkeypatch, kernels):
    """Return a function after which CPU tensors count as on a GPU, on the ranks that are given, with NCCL or without.

    What it returns counts the messages that this rank has sent from its GPU.
    """

    def begin(ranks, nccl=0):
        sent = []
        has_gpu = hvd.rank() in ranks
        monkeypatch.setattr(horovod, "nccl_built", lambda: nccl)
        why = devices.why_host_messages()
        places = {
            place: Device(0, numbers_on_host=place == "cpu", library=kernels, host_messages=why)
            for place in (None, "cpu")
        }

        def to_tensor(memory):
            sent.append(memory.size)
            return torch.from_numpy(memory.to_host())

        monkeypatch.setattr(devices, "device_of", lambda _, place=None: places[place] if has_gpu else None)
        monkeypatch.setattr(devices, "to_tensor", to_tensor)
        monkeypatch.setattr(devices, "from_tensor", lambda tensor, device: upload(device, tensor.numpy()))
        return sent

    return begin


def train(period, place=None, **options):
    model = make_model()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9 if period > 1 else 0.0),
        named_parameters=model.named_parameters(),
        compression=hvd.Compression.eden(bits=4),
        period=period,
        anchor_device=place,
        **options,
    )
    for step in range(6):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        if step == 3:  # what is saved is in host memory, and resumes from there
            optimizer.load_state_dict(optimizer.state_dict())
    optimizer.flush()
    return {name: value.clone() for name, value in model.state_dict().items()}, optimizer.communication_stats()


@pytest.mark.parametrize(
    ("period", "place", "method"),
    [(1, None, "two_phase"), (1, "cpu", "auto"), (2, None, "auto"), (2, "cpu", "two_phase")],
)
def test_models_have_the_bits_of_cpus(period, place, method, pretend):
    options = {"exchange": method, "feedback": hvd.Feedback()}
    pretend([])
    expected, statistics = train(period, **options)
    every = range(hvd.size())
    for ranks, nccl in ((every, 0), (every, 22000), ([0], 22000)):
        sent = pretend(ranks, nccl)
        found, counted = train(period, place, **options)
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
        assert counted["bytes_sent"] == statistics["bytes_sent"]
        assert bool(sent) == (nccl > 0 and len(ranks) == hvd.size())


def test_a_delayed_average_has_the_bits_of_cpus(pretend):
    pretend([])
    averaging = hvd.PeriodicAveraging(period=2, delay=1)
    expected, _ = train(2, averaging=averaging)
    sent = pretend(range(hvd.size()), 22000)
    found, _ = train(2, averaging=averaging)
    assert sent
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_nan_is_the_same_error(pretend):
    def error(name):
        values = torch.ones(3000)
        if hvd.rank() == 1:
            values[7] = float("nan")
        with pytest.raises(NonFiniteError) as caught:
            hvd.compressed_allreduce(values, name=name, exchange="two_phase")
        return str(caught.value).replace(name, "")

    pretend([])
    expected = error("cpu")
    sent = pretend(range(hvd.size()), 22000)
    assert error("gpu") == expected
    assert sent


@pytest.mark.parametrize(
    ("nccl", "wanted", "why"),
    [(0, "", "built without HOROVOD_GPU"), (2604, "", "NCCL before 2.7"), (22000, "host", "is 'host'"), (2708, "", "")],
)
def test_why_messages_are_in_host_memory(nccl, wanted, why, monkeypatch):
    monkeypatch.setattr(horovod, "nccl_built", lambda: nccl)
    monkeypatch.setenv("PQASGD_GPU_MESSAGES", wanted)
    found = devices.why_host_messages()
    assert why in found
    assert bool(found) == bool(why)


def test_messages_elsewhere_are_refused(monkeypatch):
    monkeypatch.setenv("PQASGD_GPU_MESSAGES", "gpu")
    with pytest.raises(ArgumentError, match="PQASGD_GPU_MESSAGES is 'gpu'; it must be 'host', or not be set"):
        devices.why_host_messages()


def test_compressed_allreduce_has_the_bits_of_cpus(pretend):
    torch.manual_seed(hvd.rank())
    tensor = torch.randn(3000)
    pretend([])
    expected = hvd.compressed_allreduce(tensor, name="cpu")  # each name counts its calls, which key the noise
    pretend([hvd.size() - 1])
    assert torch.equal(hvd.compressed_allreduce(tensor, name="gpu"), expected)


@pytest.mark.parametrize("period", [1, 2])
def test_all_ranks_learn_of_one_whose_device_cannot_be_used(period, monkeypatch):
    def refuse(tensor, place=None):
        raise DeviceError("the kernels cannot run on this one")

    told = r'error: it is null on rank 0; "DeviceError: the kernels cannot run .*" on rank 1'
    if hvd.rank() == 1:
        monkeypatch.setattr(devices, "device_of", refuse)
    with pytest.raises(MismatchError, match=told):
        train(period)
    with pytest.raises(MismatchError, match=told):
        hvd.compressed_allreduce(torch.ones(30))
    monkeypatch.undo()
    train(period)
    hvd.compressed_allreduce(torch.ones(30))


def test_all_ranks_learn_of_one_that_has_no_memory(kernels, pretend):
    pretend([1])
    try:
        kernels._library.pq_cuda_on_cpu_limit(100)
        with pytest.raises(PqasgdError, match=r"of memory for averages on cuda:0: .*out of memory"):
            train(2)
        kernels._library.pq_cuda_on_cpu_limit(450_000)  # the mean, and not what it takes to code it
        with pytest.raises(PqasgdError, match=r"memory to code a bucket on cuda:0: .*out of memory.*bucket_cap_mb"):
            hvd.compressed_allreduce(torch.ones(100_000))
    finally:
        kernels._library.pq_cuda_on_cpu_limit(-1)


def test_an_anchor_device_that_there_is_not():
    model = make_model()
    with pytest.raises(ArgumentError, match="anchor_device is 'cuda'; it must be None"):
        hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), period=2, anchor_device="cuda")


def test_parameters_on_two_devices_are_refused_on_all_ranks():
    """There is a second device on every machine: one that has shapes and no numbers."""
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    if hvd.rank() == hvd.size() - 1:
        parameters.append(torch.nn.Parameter(torch.zeros(2, device="meta")))
    with pytest.raises(PqasgdError, match="parameter 0 is on cpu, parameter 1 is on meta; all parameters must be"):
        hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.1), period=2)
