"""Saving, resuming, broadcasting."""

from __future__ import annotations

import copy
import io
import time

import horovod.torch as horovod
import pytest
import torch

import pqasgd_horovod.torch as hvd
from pqasgd_horovod.errors import ArgumentError, CollectiveTimeoutError, MismatchError
from tests.ranks.common import (
    assert_equal,
    assert_raises_everywhere,
    assert_replicas_equal,
    everybody,
    floats,
    loss_of,
    make_model,
    several_ranks,
    sgd,
    train,
    wrap,
)

EDEN2 = hvd.Compression.eden(bits=2)


def saved(value):
    """A round trip through torch.save, with the safe loader."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("period", [1, 3])
def test_resuming_is_bit_exact(period, dtype):
    options = {"compression": EDEN2, "period": period}
    straight = make_model(dtype, norm=dtype == torch.float32)
    optimizer = wrap(straight, sgd(straight, lr=0.01), **options)
    train(straight, optimizer, range(4))
    # In the middle of a period: the model is saved after the optimizer has averaged it.
    state = optimizer.state_dict()
    checkpoint = saved({"model": straight.state_dict(), "optimizer": state})
    train(straight, optimizer, range(4, 9))
    resumed = make_model(dtype, norm=dtype == torch.float32)
    resumed.load_state_dict(checkpoint["model"])
    other = wrap(resumed, sgd(resumed, lr=0.01), **options)
    other.load_state_dict(checkpoint["optimizer"])
    train(resumed, other, range(4, 9))
    assert_equal(floats(straight), floats(resumed))
    assert other.state_dict()["pqasgd"]["steps"] == optimizer.state_dict()["pqasgd"]["steps"] == 9


def test_the_counter_matters_for_resuming():
    """Without the counter the noise repeats: the check above would notice."""
    models = [make_model(), make_model()]
    for model, skipped in zip(models, (0, 1), strict=True):
        optimizer = wrap(model, compression=hvd.Compression.maxscale(bits=2), period=1)
        optimizer._averager.steps = skipped
        train(model, optimizer, range(2))
    same = torch.equal(models[0].fc1.weight, models[1].fc1.weight)
    assert same == (hvd.size() == 1)


def test_a_plain_checkpoint_starts_a_new_period():
    model = make_model()
    plain = sgd(model)
    train(model, plain, range(2), rank=0)
    optimizer = wrap(model, compression=EDEN2, period=3)
    optimizer.load_state_dict(plain.state_dict())
    momenta = [each.state[model.fc1.weight]["momentum_buffer"] for each in (optimizer, plain)]
    assert torch.equal(*momenta)
    train(model, optimizer, range(3))
    assert_replicas_equal(model)
    plain.load_state_dict(optimizer.state_dict())  # and back


@pytest.mark.parametrize("options", [{}, {"compression": EDEN2}, {"compression": EDEN2, "period": 3}], ids=str)
def test_state_from_before_the_wrapping_is_kept(options):
    model = make_model()
    plain = sgd(model)
    train(model, plain, range(2), rank=0)
    momentum = plain.state[model.fc1.weight]["momentum_buffer"].clone()
    optimizer = wrap(model, plain, **options)
    assert torch.equal(optimizer.state[model.fc1.weight]["momentum_buffer"], momentum)
    train(model, optimizer, range(3))
    optimizer.flush()
    inner = torch.optim.Adagrad(model.parameters(), initial_accumulator_value=0.5)
    optimizer = wrap(model, inner, **options)
    assert bool((optimizer.state[model.fc1.weight]["sum"] == 0.5).all())


@pytest.mark.parametrize("period", [1, 2])
def test_an_optimizer_that_was_made_in_another_world_says_so(period, monkeypatch):
    model = make_model()
    optimizer = wrap(model, compression=EDEN2, period=period)
    train(model, optimizer, range(1))
    monkeypatch.setattr(optimizer._settings.membership, "_world", (0, 9, 9))  # as before elastic mode has lost ranks
    text = f"was made as rank 0 of 9, and this is rank {hvd.rank()} of {hvd.size()} now.*hvd.elastic.run"
    with pytest.raises(ArgumentError, match=text):
        train(model, optimizer, range(1, 2))
    if period > 1:
        with pytest.raises(ArgumentError, match=text):
            optimizer.flush()


@several_ranks
def test_an_optimizer_whose_process_set_is_gone_says_so():
    alone = hvd.add_process_set([0])
    model = make_model()
    optimizer = wrap(model, compression=EDEN2, period=2, process_set=alone)
    train(model, optimizer, range(1))
    hvd.remove_process_set(alone)
    with pytest.raises(ArgumentError, match=r"process_set is .*, which is not registered"):
        train(model, optimizer, range(1, 2))


def test_another_configuration_or_model_is_refused_and_nothing_changes():
    model = make_model()
    optimizer = wrap(model, compression=EDEN2, period=2)
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    other = wrap(make_model(), compression=EDEN2, period=3)
    with pytest.raises(ArgumentError, match=r"averaging\.period was 2 and is 3.*remove the key 'pqasgd'"):
        other.load_state_dict(state)
    assert other._averager.steps == 0
    assert not other.state
    state["pqasgd"]["anchor"]["fc9.weight"] = torch.zeros(3)
    with pytest.raises(ArgumentError, match=r"fc9\.weight"):
        optimizer.load_state_dict(state)
    del state["pqasgd"]["anchor"]["fc9.weight"]
    state["pqasgd"]["anchor"]["fc1.weight"] = torch.zeros(3)
    if hvd.size() > 1:
        with pytest.raises(ArgumentError, match="has 3 elements, with this model it has 1800"):
            optimizer.load_state_dict(state)
    del state["pqasgd"]
    other.load_state_dict(state)


@several_ranks
def test_one_rank_may_save_alone_after_flush_and_is_told_so_before():
    model = make_model()
    optimizer = wrap(model, compression=EDEN2, period=4, flush_timeout=1.0)
    train(model, optimizer, range(2))
    before = floats(model)
    if hvd.rank() == 0:
        started = time.monotonic()
        with pytest.raises(CollectiveTimeoutError, match=r"optimizer.flush\(\) on every rank first"):
            optimizer.state_dict()
        assert time.monotonic() - started < 5
    assert_equal(before, floats(model))
    hvd.barrier()
    optimizer.flush()
    if hvd.rank() == 0:
        assert optimizer.state_dict()["pqasgd"]["steps"] == 2
    train(model, optimizer, range(2, 6))
    if hvd.rank() == 0:  # a period has just ended
        assert optimizer.state_dict()["pqasgd"]["rounds"] == 2
    assert_replicas_equal(model)


def test_flush_is_nothing_after_an_average_and_averages_what_is_left_otherwise():
    model = make_model()
    optimizer = wrap(model, compression=EDEN2, period=3)
    optimizer.flush()
    train(model, optimizer, range(3))
    rounds = optimizer.communication_stats()["rounds"]
    optimizer.flush()
    assert optimizer.communication_stats()["rounds"] == rounds == 1
    train(model, optimizer, range(3, 4))
    optimizer.flush()
    optimizer.flush()
    assert optimizer.communication_stats()["rounds"] == 2
    assert_replicas_equal(model)


@pytest.mark.parametrize("options", [{}, {"compression": EDEN2}, {"compression": EDEN2, "period": 2}], ids=str)
@pytest.mark.parametrize("functions", [horovod, hvd], ids=["horovod", "ours"])
def test_broadcast_parameters_and_optimizer_state(functions, options):
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += hvd.rank()
    optimizer = wrap(model, sgd(model, lr=0.1 * (1 + hvd.rank())), **options)
    functions.broadcast_parameters(model.state_dict(), root_rank=0)
    functions.broadcast_optimizer_state(optimizer, root_rank=0)
    functions.broadcast_parameters(model.state_dict(), root_rank=0)  # Horovod decayed weights while it made the state
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    train(model, optimizer, range(2))
    parameters = {name: p.detach().numpy() for name, p in model.named_parameters()}
    for other in everybody(parameters):
        assert_equal(parameters, other)


@several_ranks
@pytest.mark.parametrize("period", [1, 3])
def test_a_checkpoint_loaded_on_one_rank_is_broadcast(period):
    source = make_model()
    optimizer = wrap(source, compression=EDEN2, period=period)
    train(source, optimizer, range(period))
    state = copy.deepcopy(optimizer.state_dict())
    model = make_model()
    resumed = wrap(model, compression=EDEN2, period=period)
    if hvd.rank() == 0:
        model.load_state_dict(source.state_dict())
        resumed.load_state_dict(state)
    hvd.broadcast_optimizer_state(resumed, root_rank=0)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    assert resumed._averager.steps == period
    train(model, resumed, range(period))
    optimizer_steps = {entry["pqasgd"]["steps"] for entry in everybody(resumed.state_dict())}
    assert optimizer_steps == {2 * period}


@several_ranks
def test_a_checkpoint_loaded_on_one_rank_only_is_the_same_error_everywhere():
    model = make_model()
    optimizer = wrap(model, compression=EDEN2, period=3)
    train(model, optimizer, range(3))
    state = optimizer.state_dict()
    resumed = wrap(model, compression=EDEN2, period=3)
    if hvd.rank() == 0:
        resumed.load_state_dict(state)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    resumed.zero_grad()
    loss_of(model, 0).backward()
    text = assert_raises_everywhere(MismatchError, resumed.step)
    assert "broadcast_optimizer_state" in text
    assert "steps" in text


def test_state_of_a_stock_run_is_stock_state():
    model = make_model()
    optimizer = wrap(model)
    train(model, optimizer, range(1))
    assert set(optimizer.state_dict()) == {"state", "param_groups"}
