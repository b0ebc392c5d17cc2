"""PowerSGD in PyTorch: gradients and changes of a period as factors of low rank, with state that is saved."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pqasgd_horovod.torch as hvd
from pqasgd_horovod.errors import ArgumentError, MismatchError, NonFiniteError

from .common import (
    assert_equal,
    assert_it_resumes,
    assert_raises_everywhere,
    assert_replicas_equal,
    everybody,
    loss_of,
    make_model,
    several_ranks,
    train,
    wrap,
)

OPTIONS = {"compression": hvd.Compression.powersgd(approximation_rank=2), "feedback": hvd.Feedback()}
MATRICES = {"fc1.weight": (60, 30), "fc2.weight": (40, 60)}


def state_of(optimizer, kind):
    return {name: values.numpy() for name, values in optimizer.state_dict()["pqasgd"][kind].items()}


@several_ranks
def test_gradients_become_a_mean_of_low_rank_and_the_rest_is_pending():
    """Mean and mean residual are the exact mean; with what is pending so is the second step's."""
    model, alone = make_model(norm=False), make_model(norm=False)
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0), **OPTIONS)
    pending = dict.fromkeys(MATRICES, 0.0)
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
        exact = {name: np.zeros(parameter.shape) for name, parameter in alone.named_parameters()}
        for rank in range(hvd.size()):
            alone.zero_grad()
            loss_of(alone, step, rank).backward()
            for name, parameter in alone.named_parameters():
                exact[name] += parameter.grad.double().numpy() / hvd.size()
        rest = everybody(state_of(optimizer, "residual"))
        for name, parameter in model.named_parameters():
            mean = parameter.grad.double().numpy()
            if name in MATRICES:
                assert np.linalg.matrix_rank(mean, tol=1e-5 * np.linalg.norm(mean)) == 2
                kept = sum(residual[name].astype(np.float64) for residual in rest).reshape(mean.shape) / hvd.size()
                mean, exact[name] = mean + kept, exact[name] + pending[name]
                pending[name] = kept
                assert np.linalg.norm(kept) > 0.01 * np.linalg.norm(exact[name])
            np.testing.assert_allclose(mean, exact[name], atol=1e-6 * np.abs(exact[name]).max(), err_msg=name)
    for other in everybody({name: parameter.grad.numpy() for name, parameter in model.named_parameters()}):
        assert_equal(other, {name: parameter.grad.numpy() for name, parameter in model.named_parameters()})


@several_ranks
@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
@pytest.mark.parametrize("period", [1, 3])
def test_training_resumes_bit_exactly(period, exchange):
    saved = assert_it_resumes({**OPTIONS, "period": period, "exchange": exchange}, saved_after=5, steps=9)
    assert {name: factor.numel() for name, factor in saved["factor"].items()} == {
        name: 2 * cols for name, (_, cols) in MATRICES.items()
    }
    assert set(saved["residual"]) == set(MATRICES)
    assert not saved["mean_residual"]


@several_ranks
@pytest.mark.parametrize("period", [1, 2])
def test_factors_are_broadcast_and_residuals_are_not(period):
    model = make_model(norm=False)
    optimizer = wrap(model, **OPTIONS, period=period)
    train(model, optimizer, range(4))
    factors, residuals = state_of(optimizer, "factor"), state_of(optimizer, "residual")
    assert len({values["fc1.weight"].tobytes() for values in everybody(factors)}) == 1
    assert len({values["fc1.weight"].tobytes() for values in everybody(residuals)}) == hvd.size()
    fresh = make_model(norm=False)
    fresh.load_state_dict(model.state_dict())
    again = wrap(fresh, **OPTIONS, period=period)
    if hvd.rank() == 0:
        again.load_state_dict(optimizer.state_dict())
    hvd.broadcast_optimizer_state(again, root_rank=0)
    hvd.broadcast_parameters(fresh.state_dict(), root_rank=0)  # Horovod steps where there is no state yet
    train(fresh, again, range(4, 4 + period))
    assert_replicas_equal(fresh)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert_equal(state_of(optimizer, "residual"), residuals)


@several_ranks
@pytest.mark.parametrize("period", [1, 2])
def test_factors_that_only_one_rank_has_loaded_are_an_error_on_all(period):
    model = make_model()
    optimizer = wrap(model, **OPTIONS, period=period)
    train(model, optimizer, range(4))
    state = optimizer.state_dict()
    if hvd.rank() == 0:
        state["pqasgd"]["factor"]["fc1.weight"] = -state["pqasgd"]["factor"]["fc1.weight"]
    optimizer = wrap(model, **OPTIONS, period=period)
    optimizer.load_state_dict(state)
    text = assert_raises_everywhere(MismatchError, lambda: train(model, optimizer, range(4, 5)))
    assert "factors.fc1.weight" in text


@several_ranks
@pytest.mark.parametrize("period", [1, 2])
def test_nan_is_one_error_and_training_goes_on(period):
    model = make_model(norm=False)
    optimizer = wrap(model, **OPTIONS, period=period)
    train(model, optimizer, range(2))
    before = state_of(optimizer, "factor")
    optimizer.zero_grad()
    loss = loss_of(model, 2)
    if hvd.rank() == hvd.size() - 1:
        model.fc2.weight.register_hook(lambda gradient: gradient * float("nan"))
    loss.backward()
    if period == 1:
        assert_raises_everywhere(NonFiniteError, optimizer.step)
        assert_equal(state_of(optimizer, "factor"), before)
    else:
        optimizer.step()
        assert_raises_everywhere(NonFiniteError, optimizer.flush)


@several_ranks
def test_layouts_in_memory_and_gradients_that_come_late():
    """Channels-last and transposed weights, a parameter without a gradient, and one that is frozen for a while."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.conv = torch.nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
            self.turned = torch.nn.Parameter(torch.randn(40, 30).t() / 8)
            self.unused = torch.nn.Linear(40, 40)
            self.out = torch.nn.Linear(40, 30)

    model = Model()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.05), **OPTIONS)
    generator = torch.Generator().manual_seed(hvd.rank())
    for step in range(6):
        model.out.weight.requires_grad_(step % 3 != 1)
        optimizer.zero_grad()
        images = torch.randn(4, 8, 5, 5, generator=generator)
        hidden = model.conv(images).mean((2, 3)).repeat(1, 2)[:, :30]
        (model.out(hidden @ model.turned)).square().mean().backward()
        optimizer.step()
        assert_replicas_equal(model)
    assert set(state_of(optimizer, "factor")) == {"conv.weight", "turned", "unused.weight", "out.weight"}
    assert optimizer.communication_stats()["compression_ratio"] > 2


@several_ranks
def test_a_factor_of_another_model_is_refused_and_nothing_changes():
    model = make_model()
    optimizer = wrap(model, **OPTIONS)
    train(model, optimizer, range(2))
    before, state = state_of(optimizer, "factor"), optimizer.state_dict()
    state["pqasgd"]["factor"]["fc1.weight"] = torch.zeros(59)
    with pytest.raises(ArgumentError, match=r"saved factor of parameter 'fc1\.weight' has 59 elements, .* has 60"):
        optimizer.load_state_dict(state)
    assert_equal(state_of(optimizer, "factor"), before)


def test_what_it_needs():
    model = make_model()
    with pytest.raises(ArgumentError, match=r"feedback is None with compression.*feedback=hvd.Feedback\(\)"):
        wrap(model, compression=hvd.Compression.powersgd())
    with pytest.raises(ArgumentError, match="approximation_rank is 0"):
        hvd.Compression.powersgd(approximation_rank=0)
    with pytest.raises(ArgumentError, match=r"second_compression is Compression.powersgd.*flat vectors"):
        wrap(model, compression=hvd.Compression.eden(2), second_compression=hvd.Compression.powersgd())
    with pytest.raises(ArgumentError, match=r"compression is Compression.powersgd.*flat vectors"):
        hvd.compressed_allreduce(torch.ones(3, 4), compression=hvd.Compression.powersgd())
    with pytest.raises(ArgumentError, match="needs whole matrices"):
        wrap(model, **OPTIONS, averaging=hvd.SparseAveraging(period=4))


def test_the_compressor_has_a_configuration():
    compression = hvd.Compression.powersgd(approximation_rank=4)
    assert repr(compression) == "Compression.powersgd(approximation_rank=4)"
    assert type(compression).from_config(compression.config()) == compression
