"""period>1 on real Horovod."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

import pqasgd_horovod.torch as hvd
from pqasgd_horovod import codecs
from pqasgd_horovod.errors import ArgumentError, MismatchError, NonFiniteError
from pqasgd_horovod.keys import derive_key, derive_shared_key
from tests.ranks.common import (
    ByHand,
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


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


@pytest.mark.parametrize(
    ("inner", "dtype"),
    [(sgd, torch.float32), (sgd, torch.float64), (sgd, torch.float16), (adamw, torch.float32)],
    ids=["sgd-float32", "sgd-float64", "sgd-float16", "adamw-float32"],
)
def test_without_loss_it_is_local_sgd_by_hand(inner, dtype):
    model = make_model(dtype, norm=dtype != torch.float16)
    optimizer = wrap(model, inner(model), period=3, small_tensor_threshold=100)
    if hvd.size() == 1:
        alone = make_model(dtype, norm=dtype != torch.float16)
        train(model, optimizer, range(7))
        train(alone, inner(alone), range(7))
        assert_equal(floats(model), floats(alone))
        return
    by_hand = ByHand(model, inner)
    for step in range(7):
        train(model, optimizer, range(step, step + 1))
        by_hand.step(step)
        if step in (2, 5):
            by_hand.average()
    optimizer.flush()
    by_hand.average()
    if dtype == torch.float16:
        assert_replicas_equal(model)  # the anchor keeps float32, which by_hand does not
    else:
        assert_equal(floats(model), floats(by_hand.models[hvd.rank()]))
    assert optimizer.communication_stats()["rounds"] == 3


@several_ranks
@pytest.mark.parametrize(
    "compression",
    [
        EDEN2,
        hvd.Compression.maxscale(bits=4),
        hvd.Compression.bf16,
        hvd.Compression.qsgd(bits=8),
        hvd.Compression.terngrad(),
        hvd.Compression.topk(density=0.1, values=hvd.Compression.eden(bits=4), block_size=512),
        hvd.Compression.randomk(density=0.1, block_size=512),
    ],
    ids=str,
)
def test_the_anchor_moves_by_the_mean_of_the_decoded_changes(compression):
    model = make_model()
    optimizer = wrap(model, compression=compression, period=2, exchange="allgather", seed=7)
    before = floats(model)
    train(model, optimizer, range(1))
    # The second step, without the average: the same step of a plain optimizer on a copy.
    twin, state = make_model(), optimizer.param_groups and [optimizer.state[p] for p in model.parameters()]
    twin.load_state_dict(model.state_dict())
    plain = sgd(twin)
    for parameter, entry in zip(twin.parameters(), state, strict=True):
        plain.state[parameter] = {"momentum_buffer": entry["momentum_buffer"].clone()}
    train(twin, plain, range(1, 2))
    train(model, optimizer, range(1, 2))
    local = everybody(floats(twin))
    names = [name for name, _ in model.named_parameters()]
    large = [name for name in names if before[name].size >= 1024]
    small = [name for name in names if before[name].size < 1024]
    assert large
    assert small
    for channel, (members, codec) in enumerate(((large, compression.codec), (small, codecs.none()))):
        anchor = np.concatenate([before[name].ravel() for name in members])
        mean = np.zeros_like(anchor)
        for rank in range(hvd.size()):
            values = np.concatenate([local[rank][name].ravel() for name in members])
            padding = 0 if members is large else sum(b.numel() for b in model.buffers() if b.is_floating_point())
            key, shared = derive_key(7 + channel, rank, 2, 0, 0), derive_shared_key(7 + channel, 2, 0)
            payload = codec.reference_encode(
                np.pad(values, (0, padding)), key, shared_key=shared, anchor=np.pad(anchor, (0, padding))
            )
            decoded = np.pad(mean, (0, padding))
            codec.reference_decode_add(payload, decoded, key, 1 / hvd.size(), shared_key=shared)
            mean = decoded[: mean.size]
        after = np.concatenate([floats(model)[name].ravel() for name in members])
        np.testing.assert_array_equal(after, anchor + mean)
    assert_replicas_equal(model)


@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_replicas_are_bit_identical_after_an_average(dtype, exchange):
    model = make_model(dtype, norm=False)
    optimizer = wrap(model, sgd(model, lr=0.01), compression=EDEN2, period=2, exchange=exchange, bucket_cap_mb=0.01)
    train(model, optimizer, range(3))
    if hvd.size() > 1:
        mine = floats(model)["fc1.weight"]
        assert not all(np.array_equal(mine, other["fc1.weight"]) for other in everybody(floats(model)))
    optimizer.flush()
    assert_replicas_equal(model)


def test_statistics_of_batch_norm_are_averaged_and_counters_are_not():
    model = make_model()
    optimizer = wrap(model, period=2, compression=EDEN2)
    train(model, optimizer, range(1))
    local = everybody(floats(model)["norm.running_mean"])
    optimizer.flush()
    np.testing.assert_allclose(floats(model)["norm.running_mean"], np.mean(local, axis=0), atol=1e-7)
    assert model.norm.num_batches_tracked == 1
    assert_replicas_equal(model)


@several_ranks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_statistics_of_the_rank_with_the_most_batches(dtype):
    """Data that is spread unevenly: rank 1 sees two batches in a step, which rank 0 sees only at the end."""
    model = make_model(dtype)
    averaging = hvd.PeriodicAveraging(period=2, buffers="max_count")
    optimizer = wrap(model, compression=EDEN2, averaging=averaging)
    for step in range(5):
        if hvd.rank() == (1 if step < 4 else 0):
            loss_of(model, 100 + step)
        train(model, optimizer, range(step, step + 1))
        if step % 2 == 0:
            local = everybody((floats(model), int(model.norm.num_batches_tracked)))
            if step < 4:
                assert [count for _, count in local][:2] == [2 * step + 1, 2 * step + 2]
    optimizer.flush()
    assert model.norm.num_batches_tracked == 10
    for name in ("norm.running_mean", "norm.running_var"):
        np.testing.assert_array_equal(floats(model)[name], local[0][0][name])
    assert_replicas_equal(model)


@several_ranks
def test_buffers_may_stay_local_or_all_be_averaged():
    for policy, averaged in (("local", False), ("statistics", False), ("all", True)):
        model = make_model(norm=False)
        model.register_buffer("mask", torch.full((3,), float(hvd.rank())))
        optimizer = wrap(model, period=None, averaging=hvd.PeriodicAveraging(period=2, buffers=policy))
        train(model, optimizer, range(2))
        expected = (hvd.size() - 1) / 2 if averaged else float(hvd.rank())
        assert model.mask.tolist() == pytest.approx([expected] * 3), policy


def test_a_mask_of_infinities_is_no_obstacle():
    model = make_model()
    model.register_buffer("mask", torch.full((3,), -torch.inf))
    train(model, wrap(model, period=2, compression=EDEN2), range(2))


def test_a_model_that_cannot_be_found_is_a_warning(caplog):
    model = make_model()
    with caplog.at_level(logging.WARNING, logger="pqasgd_horovod"):
        hvd.DistributedOptimizer(sgd(model), list(model.named_parameters()), period=2)
    assert ("pass model=model" in caplog.text) == (hvd.rank() == 0)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="pqasgd_horovod"):
        hvd.DistributedOptimizer(sgd(model), list(model.named_parameters()), period=2, model=model)
        hvd.DistributedOptimizer(sgd(model), model.named_parameters(), period=2)
    assert not caplog.text


def test_grad_scaler_counts_steps_it_skips():
    model = make_model()
    optimizer = wrap(model, compression=EDEN2, period=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    reference, plain = make_model(), None
    plain = sgd(reference)
    for step in range(8):
        poisoned = step == 1 and hvd.rank() == hvd.size() - 1
        optimizer.zero_grad()
        loss = loss_of(model, step)
        scaler.scale(loss * torch.inf if poisoned else loss).backward()
        if step == 2:
            scaler.unscale_(optimizer)
        before = model.fc1.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, model.fc1.weight) == poisoned
        if step == 0:  # the first step is the plain one, scaled and unscaled by a power of two
            train(reference, plain, range(1))
            assert_equal(floats(model), floats(reference))
    stats = everybody(optimizer.communication_stats())
    assert {(entry["steps"], entry["rounds"]) for entry in stats} == {(8, 2)}
    assert not hasattr(optimizer, "found_inf")
    assert_replicas_equal(model)


def test_closures():
    model = make_model()
    optimizer = wrap(model, compression=EDEN2, period=2)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert isinstance(first, torch.Tensor)
    optimizer.step(closure)
    assert_replicas_equal(model)


def test_lbfgs_may_be_the_inner_optimizer():
    model = make_model(norm=False)
    optimizer = wrap(model, torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2), compression=EDEN2, period=2)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step(closure)
    assert_replicas_equal(model)


def test_added_and_unfrozen_parameters_join_in_the_middle_of_a_period():
    model, extra = make_model(), torch.nn.Linear(30, 50)
    hvd.broadcast_parameters(extra.state_dict(), root_rank=0)
    model.fc2.weight.requires_grad_(False)
    optimizer = wrap(model, compression=EDEN2, period=3)
    train(model, optimizer, range(1))
    elements = optimizer.communication_stats()["num_elements"]
    optimizer.add_param_group({"params": list(extra.parameters()), "lr": 0.05})
    model.fc2.weight.requires_grad_(True)
    for step in range(1, 3):
        optimizer.zero_grad()
        (loss_of(model, step) + loss_of(extra, step)).backward()
        optimizer.step()
    assert optimizer.communication_stats()["num_elements"] == elements + 30 * 50 + 50 + model.fc2.weight.numel()
    assert_replicas_equal(model)
    assert_replicas_equal(extra)


def test_a_parameter_frozen_in_the_middle_of_a_period_is_averaged_once_more_then_left_alone():
    model = make_model()
    optimizer = wrap(model, compression=EDEN2, period=2)
    train(model, optimizer, range(1))
    model.fc1.weight.requires_grad_(False)
    train(model, optimizer, range(1, 2))
    assert_replicas_equal(model)
    frozen = model.fc1.weight.detach().clone()
    elements = optimizer.communication_stats()["num_elements"]
    train(model, optimizer, range(2, 4))
    assert torch.equal(frozen, model.fc1.weight)  # not even the codec's noise
    assert optimizer.communication_stats()["num_elements"] == elements - frozen.numel()
    assert_replicas_equal(model)


def test_tied_weights_travel_once():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(40, 40), "b": torch.nn.Linear(40, 40)})
    model["b"].weight = model["a"].weight
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model.named_parameters(remove_duplicate=False),
        compression=EDEN2,
        period=2,
        check_consistency=True,
    )
    for _ in range(2):
        optimizer.zero_grad()
        model["b"](model["a"](torch.randn(4, 40) + hvd.rank())).square().mean().backward()
        optimizer.step()
    assert optimizer.communication_stats()["num_elements"] == 1600 + 80
    assert_replicas_equal(model)


def test_channels_last_and_transposed_parameters():
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3), torch.nn.Conv2d(16, 16, 3)).to(
        memory_format=torch.channels_last
    )
    transposed = torch.nn.Parameter(torch.randn(40, 50).t())
    model.register_parameter("transposed", transposed)
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.01), compression=EDEN2, period=2)
    for _ in range(2):
        optimizer.zero_grad()
        inputs = (torch.randn(2, 8, 8, 8) + hvd.rank()).to(memory_format=torch.channels_last)
        (model[1](model[0](inputs)).square().mean() + (transposed * hvd.rank()).sum()).backward()
        optimizer.step()
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert_replicas_equal(model)


@several_ranks
def test_ranks_with_another_order_in_memory_are_refused():
    torch.manual_seed(1)
    model = torch.nn.Conv2d(8, 16, 3)
    if hvd.rank() == 0:
        model = model.to(memory_format=torch.channels_last)
    text = assert_raises_everywhere(MismatchError, lambda: wrap(model, period=2))
    assert "parameters.weight" in text
    assert "strides" in text


def test_parameters_with_gaps_are_refused():
    wide = torch.nn.Parameter(torch.randn(40, 40)[:, ::2])
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([wide], lr=0.1), [("wide", wide)], period=2, model=make_model()
    )
    (wide * 2).sum().backward()
    with pytest.raises(ArgumentError, match="wide has shape"):
        optimizer.step()


@several_ranks
def test_nan_is_the_same_error_everywhere_and_the_anchor_survives():
    model = make_model()
    optimizer = wrap(model, compression=EDEN2, period=2)
    train(model, optimizer, range(1))
    before = floats(model)
    anchor = {name: values.copy() for name, values in optimizer._averager._arrays()["anchor"].items()}
    if hvd.rank() == 1:
        with torch.no_grad():
            model.fc2.weight[0, 0] = torch.nan
    optimizer.zero_grad()
    text = assert_raises_everywhere(NonFiniteError, optimizer.step)
    assert "rank 1" in text
    for name, values in optimizer._averager._arrays()["anchor"].items():
        np.testing.assert_array_equal(values, anchor[name])
    with torch.no_grad():
        model.fc2.weight.copy_(torch.from_numpy(before["fc2.weight"]))
        if hvd.rank() == 1:
            optimizer.state[model.fc2.weight]["momentum_buffer"].zero_()
    train(model, optimizer, range(2, 3))
    assert_replicas_equal(model)


def test_stats_are_the_bytes_predicted():
    model = make_model()
    optimizer = wrap(model, compression=hvd.Compression.quantize(bits=4), period=2)
    train(model, optimizer, range(6))
    stats = optimizer.communication_stats()
    predicted = sum(channel.exchange.predicted_bytes_per_round() for channel in optimizer._averager._channels)
    assert (stats["steps"], stats["rounds"]) == (6, 3)
    assert stats["bytes_sent"] == 3 * predicted
    if hvd.size() == 2:
        large = 30 * 60 + 60 * 40
        small = 60 + 60 + 60 + 40 + 200 + 5
        assert stats["num_elements"] == large + small
        # 4200 elements in blocks of 1024, the last of 104 padded to 128; running statistics travel with the small ones.
        assert stats["bytes_sent"] == 3 * ((64 + 4 * (4 + 512) + 4 + 64) + (64 + 4 * (small + 120)))
        assert stats["compression_ratio"] == stats["uncompressed_bytes"] / stats["bytes_sent"]


@pytest.mark.skipif(hvd.size() < 3, reason="needs three ranks: make test-4")
def test_process_sets_train_apart():
    pair = hvd.add_process_set([0, 2])
    try:
        model = make_model()
        optimizer = wrap(model, compression=EDEN2, period=2, process_set=pair)
        train(model, optimizer, range(3))
        optimizer.flush()
        replicas = everybody(floats(model))
        assert_equal(replicas[0], replicas[2])
        assert not np.array_equal(replicas[0]["fc1.weight"], replicas[1]["fc1.weight"])
        if hvd.rank() == 1:
            alone = make_model()
            train(alone, sgd(alone), range(3))
            assert_equal(floats(model), floats(alone))
    finally:
        hvd.remove_process_set(pair)


@pytest.mark.parametrize("synchronized", [True, False])
def test_clipping_is_local(synchronized):
    """With or without Horovod's idiom: the rank's own gradient is clipped, as by a plain optimizer."""
    model, alone = make_model(norm=False), make_model(norm=False)
    optimizer, plain = wrap(model, compression=EDEN2, period=3), sgd(alone)

    def step(number):
        for m, o in ((model, optimizer), (alone, plain)):
            o.zero_grad()
            loss_of(m, number).backward()
            if o is optimizer and synchronized:
                o.synchronize()
            assert torch.nn.utils.clip_grad_norm_(m.parameters(), 0.01) > 0.01
        if synchronized:
            with optimizer.skip_synchronize():
                optimizer.step()
        else:
            optimizer.step()
        plain.step()

    for number in range(2):
        step(number)
        assert_equal(floats(model), floats(alone))
    step(2)
    assert optimizer.communication_stats()["rounds"] == 1
    assert_replicas_equal(model)


@pytest.mark.parametrize("moments", ["local", "average"])
def test_a_rank_that_skips_its_first_steps_has_no_moments_yet(moments):
    """A loss scale that is too large at first: counters stay in step, and so does what is averaged."""
    model = make_model()
    averaging = hvd.PeriodicAveraging(period=2, moments=moments)
    optimizer = wrap(model, compression=EDEN2, averaging=averaging)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    for step in range(6):
        optimizer.zero_grad()
        poisoned = step < 3 and hvd.rank() == hvd.size() - 1
        scaler.scale(loss_of(model, step) * (torch.inf if poisoned else 1.0)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        assert bool(optimizer.state[model.fc1.weight]) != (poisoned and step < 3)
    stats = everybody(optimizer.communication_stats())
    assert {(entry["steps"], entry["rounds"]) for entry in stats} == {(6, 3)}
    assert_replicas_equal(model)
    momentum = everybody(optimizer.state[model.fc1.weight]["momentum_buffer"].numpy().tobytes())
    assert (len(set(momentum)) == 1) == (moments == "average" or hvd.size() == 1)


@several_ranks
def test_another_start_is_the_same_error_everywhere():
    model = make_model()
    with torch.no_grad():
        model.fc2.weight += hvd.rank()
    optimizer = wrap(model, compression=EDEN2, period=2)
    loss_of(model, 0).backward()
    before = floats(model)
    text = assert_raises_everywhere(MismatchError, optimizer.step)
    assert "broadcast_parameters" in text
    assert "fc2.weight" in text
    assert_equal({name: before[name] for name in ("fc2.weight",)}, {"fc2.weight": floats(model)["fc2.weight"]})
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer.step()
