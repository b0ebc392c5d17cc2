"""Models on a GPU under Horovod: the bits of a CPU, on whichever ranks there are GPUs.

The GPU is a CPU that runs the kernels thread by thread (tests/native/cuda_on_cpu); ``make gpu-check`` asks a real one.
"""

from __future__ import annotations

import pytest
import torch

import pqasgd_horovod.torch as hvd
from pqasgd_horovod.errors import ArgumentError, PqasgdError
from pqasgd_horovod.native.cuda import Device, Library
from pqasgd_horovod.torch import devices
from tests.native.cuda_on_cpu import build
from tests.ranks.common import loss_of, make_model, two_ranks

pytestmark = two_ranks


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """One rank compiles them for all."""
    path = build(tmp_path_factory.mktemp("cuda_on_cpu")) if hvd.rank() == 0 else None
    return Library(hvd.broadcast_object(path, 0, name="kernels"))


@pytest.fixture
def pretend(monkeypatch, kernels):
    """Return a function after which CPU tensors count as on a GPU, on the ranks that are given."""
    places = {place: Device(0, numbers_on_host=place == "cpu", library=kernels) for place in (None, "cpu")}

    def begin(ranks):
        has_gpu = hvd.rank() in ranks
        monkeypatch.setattr(devices, "device_of", lambda _, place=None: places[place] if has_gpu else None)

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


@pytest.mark.parametrize("place", [None, "cpu"])
@pytest.mark.parametrize("period", [1, 2])
def test_models_have_the_bits_of_cpus(period, place, pretend):
    pretend([])
    expected, statistics = train(period, feedback=hvd.Feedback())
    for ranks in (range(hvd.size()), [0]):
        pretend(ranks)
        found, counted = train(period, place, feedback=hvd.Feedback())
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
        assert counted["bytes_sent"] == statistics["bytes_sent"]


def test_compressed_allreduce_has_the_bits_of_cpus(pretend):
    torch.manual_seed(hvd.rank())
    tensor = torch.randn(3000)
    pretend([])
    expected = hvd.compressed_allreduce(tensor, name="cpu")  # each name counts its calls, which key the noise
    pretend([hvd.size() - 1])
    assert torch.equal(hvd.compressed_allreduce(tensor, name="gpu"), expected)


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
