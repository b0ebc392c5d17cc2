"""period=1 with a codec that does not commute with a sum, on real Horovod."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pqasgd_horovod.torch as hvd
from pqasgd_horovod import codecs
from pqasgd_horovod.averaging.statistics import ring_allreduce_nbytes
from pqasgd_horovod.errors import ArgumentError, DesynchronizedError, NonFiniteError
from pqasgd_horovod.exchange.rows import Table, payload_nbytes
from pqasgd_horovod.keys import derive_key, derive_shared_key
from tests.ranks.common import (
    WithSparseGradient,
    assert_equal,
    assert_raises_everywhere,
    assert_replicas_equal,
    batch,
    everybody,
    floats,
    loss_of,
    make_model,
    several_ranks,
    sgd,
    train,
    wrap,
)

MAXSCALE = hvd.Compression.maxscale(bits=4)

TOPK = hvd.Compression.chain(hvd.Compression.topk(density=0.1, block_size=512), hvd.Compression.eden(bits=4))
RANDOMK = hvd.Compression.randomk(density=0.1, scaled=True, block_size=512)


def rows_nbytes(count: int) -> int:
    """What a message of so many rows of an embedding of 50 words and 40 numbers takes."""
    return 64 + payload_nbytes(MAXSCALE.codec, Table(50, 40))(40 * count)


def gradients(model):
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}


def expected_means(local, codec, step, seed=0, factor=1.0):
    """The means of all ranks' gradients by the NumPy specification, one bucket for large tensors and one for small."""
    expected = {}
    large = [name for name, value in local[0].items() if value.size >= 1024]
    small = [name for name, value in local[0].items() if value.size < 1024]
    for channel, (names, codec_here) in enumerate(((large, codec), (small, codecs.none()))):
        vectors = [np.concatenate([gradient[name].ravel() for name in names]) for gradient in local]
        mean = np.zeros(vectors[0].size, np.float32)
        for rank, vector in enumerate(vectors):
            key, shared = derive_key(seed + channel, rank, step, 0, 0), derive_shared_key(seed + channel, step, 0)
            payload = codec_here.reference_encode(vector, key, shared_key=shared)
            codec_here.reference_decode_add(payload, mean, key, 1.0 / len(vectors), shared_key=shared)
        mean *= np.float32(factor)
        ends = np.cumsum([local[0][name].size for name in names])
        for name, part in zip(names, np.split(mean, ends[:-1]), strict=True):
            expected[name] = part.reshape(local[0][name].shape)
    return expected


@several_ranks
@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum], ids=["average", "sum"])
@pytest.mark.parametrize("compression", [MAXSCALE, TOPK, RANDOMK], ids=lambda value: value.codec.id)
def test_gradients_are_the_mean_of_the_decoded_gradients(compression, op):
    model, twin = make_model(), make_model()
    optimizer = wrap(model, compression=compression, exchange="allgather", op=op)
    for step in range(3):
        twin.load_state_dict(model.state_dict())
        twin.zero_grad()
        loss_of(twin, step).backward()
        local = everybody(gradients(twin))
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.synchronize()
        factor = hvd.size() if op == hvd.Sum else 1.0
        assert_equal(gradients(model), expected_means(local, compression.codec, step, factor=factor))
        with optimizer.skip_synchronize():
            optimizer.step()


@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
@pytest.mark.parametrize(
    "compression", [MAXSCALE, hvd.Compression.bf16, hvd.Compression.eden(bits=2), TOPK, RANDOMK], ids=str
)
def test_replicas_stay_bit_identical(compression, exchange):
    model = make_model(norm=False)
    optimizer = wrap(model, compression=compression, exchange=exchange, bucket_cap_mb=0.005)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        assert_replicas_equal(model)


def test_buckets_leave_while_backward_runs():
    model = make_model(norm=False)
    optimizer = wrap(model, compression=MAXSCALE, bucket_cap_mb=0.003)
    train(model, optimizer, range(1))
    if hvd.size() == 1:
        return
    begun = []
    for channel in optimizer._averager._channels:
        begin = channel.exchange.begin
        channel.exchange.begin = lambda *args, begin=begin, **options: (begun.append(args[0]), begin(*args, **options))
    loss_of(model, 1).backward()
    assert begun
    with pytest.raises(AssertionError, match="still being exchanged"):
        optimizer.zero_grad()
    before = len(begun)
    optimizer.step()
    assert len(begun) >= before
    assert_replicas_equal(model)


def test_accumulation_over_backward_passes():
    model, twin = make_model(), make_model()
    optimizer = wrap(model, compression=MAXSCALE, backward_passes_per_step=2, exchange="allgather")
    for step in range(2):
        twin.load_state_dict(model.state_dict())
        twin.zero_grad()
        optimizer.zero_grad()
        for part in (2 * step, 2 * step + 1):
            loss_of(twin, part).backward()
            loss_of(model, part).backward()
        local = everybody(gradients(twin))
        optimizer.synchronize()
        if hvd.size() > 1:
            assert_equal(gradients(model), expected_means(local, MAXSCALE.codec, step))
        with optimizer.skip_synchronize():
            optimizer.step()


@several_ranks
def test_one_backward_pass_too_many_is_an_error():
    model = make_model()
    optimizer = wrap(model, compression=MAXSCALE)
    loss_of(model, 0).backward()
    with pytest.raises(AssertionError, match="backward_passes_per_step"):
        loss_of(model, 0).backward()
    if hvd.size() > 1:
        assert "were changed after backward" in assert_raises_everywhere(ArgumentError, optimizer.synchronize)
    assert_replicas_equal_gradients(model)
    optimizer.zero_grad()
    train(model, optimizer, range(1))
    assert_replicas_equal_gradients(model)


def assert_replicas_equal_gradients(model):
    for other in everybody(gradients(model)):
        assert_equal(gradients(model), other)


def test_clipping_between_synchronize_and_step():
    model = make_model(norm=False)
    optimizer = wrap(model, compression=MAXSCALE)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.synchronize()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        assert len(set(everybody(float(norm)))) == 1
        with optimizer.skip_synchronize():
            optimizer.step()
    assert_replicas_equal(model)
    loss_of(model, 3).backward()
    optimizer.synchronize()
    with pytest.warns(UserWarning, match="twice"):
        optimizer.step()


@several_ranks
def test_a_clipped_mean_is_the_mean_clipped():
    model, twin = make_model(norm=False), make_model(norm=False)
    optimizer, other = (wrap(m, compression=MAXSCALE, exchange="allgather") for m in (model, twin))
    for m in (model, twin):
        loss_of(m, 0).backward()
    optimizer.synchronize()
    other.synchronize()
    means = gradients(twin)
    assert_equal(gradients(model), means)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    assert norm > 0.05
    assert norm.item() == pytest.approx(np.sqrt(sum(float((mean**2).sum()) for mean in means.values())), rel=1e-5)
    for name, clipped in gradients(model).items():
        np.testing.assert_allclose(clipped, means[name] * (0.05 / norm.item()), rtol=1e-4, atol=1e-9)
    before = floats(model)
    with optimizer.skip_synchronize():
        optimizer.step()
    for name, value in floats(model).items():  # the first step of SGD with momentum and weight decay
        step = 0.1 * (gradients(model)[name] + np.float32(1e-3) * before[name])
        np.testing.assert_allclose(value, before[name] - step, rtol=0, atol=1e-6)


@several_ranks
@pytest.mark.parametrize("steps", [0, 1])
def test_gradients_that_are_clipped_or_unscaled_before_they_are_averaged_are_an_error(steps):
    model = make_model(norm=False)
    optimizer = wrap(model, compression=MAXSCALE)
    train(model, optimizer, range(steps))
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    text = assert_raises_everywhere(ArgumentError, optimizer.step)
    assert "'fc1.weight'" in text
    assert "Call optimizer.synchronize() before" in text
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss_of(model, 2)).backward()
    before = floats(model)
    text = assert_raises_everywhere(ArgumentError, lambda: scaler.step(optimizer))
    assert "GradScaler has looked for Inf in gradients that are not averaged yet" in text
    assert_equal(floats(model), before)
    optimizer.zero_grad()
    train(model, optimizer, range(3, 4))
    assert_replicas_equal(model)


class Branches(torch.nn.Module):
    """Which branch is used depends on the rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.branches = torch.nn.ModuleList(torch.nn.Linear(30, 50) for _ in range(3))

    def forward(self, inputs: torch.Tensor, which: int) -> torch.Tensor:
        return self.branches[which](inputs)


def test_parameters_unused_on_some_ranks_or_on_all():
    model = Branches()
    optimizer = wrap(model, compression=MAXSCALE, exchange="allgather")
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 30), hvd.rank() % 2).square().sum().backward()
        optimizer.step()
    assert_replicas_equal(model)
    if hvd.size() > 1:
        assert model.branches[2].weight.grad is not None
        assert torch.count_nonzero(model.branches[2].weight.grad) == 0


@several_ranks
def test_a_parameter_frozen_on_one_rank_only_is_an_error_on_all():
    model = make_model()
    optimizer = wrap(model, compression=MAXSCALE)
    train(model, optimizer, range(2))
    parameter = next(model.parameters())
    parameter.requires_grad_(hvd.rank() != 0)
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    before = floats(model)
    text = assert_raises_everywhere(DesynchronizedError, optimizer.step)
    assert "With requires_grad=False there are 1 (checksum" in text
    assert_equal(before, floats(model))
    parameter.requires_grad_(True)
    train(model, optimizer, range(3, 5))
    everywhere = everybody({name: p.detach().numpy() for name, p in model.named_parameters()})
    assert_equal(everywhere[0], everywhere[-1])


def test_added_frozen_and_unfrozen_parameters():
    model, extra = make_model(norm=False), torch.nn.Linear(30, 50)
    hvd.broadcast_parameters(extra.state_dict(), root_rank=0)
    model.fc2.weight.requires_grad_(False)
    optimizer = wrap(model, compression=MAXSCALE)
    train(model, optimizer, range(1))
    optimizer.add_param_group({"params": list(extra.parameters())})
    model.fc2.weight.requires_grad_(True)
    model.fc1.weight.requires_grad_(False)
    frozen = model.fc1.weight.detach().clone()
    for step in range(1, 4):
        optimizer.zero_grad()
        (loss_of(model, step) + loss_of(extra, step)).backward()
        optimizer.step()
    assert_replicas_equal(model)
    assert_replicas_equal(extra)
    assert torch.equal(frozen, model.fc1.weight)


@pytest.mark.parametrize("sparse_as_dense", [False, True])
def test_sparse_gradients(sparse_as_dense):
    torch.manual_seed(1)
    model = torch.nn.ModuleDict({"words": torch.nn.Embedding(50, 40, sparse=True), "out": torch.nn.Linear(40, 40)})
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = wrap(model, inner, compression=MAXSCALE, sparse_as_dense=sparse_as_dense, exchange="allgather")
    for step in range(3):
        optimizer.zero_grad()
        if step < 2 or hvd.rank() == 0:  # at last some ranks use no word at all
            words = torch.tensor([hvd.rank(), step, 7])
            model["out"](model["words"](words)).square().sum().backward()
        else:
            model["out"](torch.ones(1, 40)).square().sum().backward()
        optimizer.synchronize()
        if step < 2:
            assert model["words"].weight.grad.is_sparse
        with optimizer.skip_synchronize():
            optimizer.step()
    assert_replicas_equal(model)


@several_ranks
def test_parameters_are_not_added_while_gradients_are_on_their_way():
    model = make_model(norm=False)
    optimizer = wrap(model, compression=MAXSCALE)
    extra = torch.nn.Linear(5, 300, bias=False)
    for step in range(2):
        optimizer.zero_grad()
        inputs, _ = batch(step)
        extra(model(inputs)).square().mean().backward()
        text = assert_raises_everywhere(
            ArgumentError, lambda: optimizer.add_param_group({"params": list(extra.parameters())})
        )
        assert "before optimizer.step()" in text
        optimizer.step()
        assert len(optimizer.param_groups) == 1
    assert_replicas_equal(model)


def test_a_name_that_is_taken_adds_nothing():
    model = make_model(norm=False)
    inner = torch.optim.SGD(list(model.named_parameters()), lr=0.1)
    optimizer = wrap(model, inner, compression=MAXSCALE)
    with pytest.raises(ArgumentError, match=r"'fc1\.weight' is taken"):
        optimizer.add_param_group({"params": [("fc1.weight", torch.nn.Parameter(torch.zeros(3)))]})
    train(model, optimizer, range(1))
    assert_replicas_equal(model)


def test_a_model_that_changes_its_type_or_order_is_laid_out_anew():
    """What was laid out as float32 must not be read as such when gradients have become bfloat16."""
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 300, 3), torch.nn.Flatten(), torch.nn.Linear(300, 5))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=1e-4), compression=MAXSCALE)
    for change in ({}, {"memory_format": torch.channels_last}, {"dtype": torch.bfloat16}, {"dtype": torch.float64}):
        model.to(**change)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.full((2, 4, 3, 3), 1.0 + hvd.rank()).to(model[0].weight.dtype)).square().mean().backward()
            optimizer.step()
        assert_replicas_equal(model)


@several_ranks
def test_a_sparse_gradient_without_loss_is_the_mean():
    model = torch.nn.Embedding(6, 40, sparse=True)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = wrap(model, inner, compression=MAXSCALE)
    model(torch.tensor([hvd.rank() % 6])).sum().backward()
    optimizer.synchronize()
    expected = torch.zeros(6, 40)
    for rank in range(hvd.size()):
        expected[rank % 6] += 1 / hvd.size()
    torch.testing.assert_close(model.weight.grad.to_dense(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bytes_of_sparse_gradients_are_those_of_their_rows(dtype):
    """A header, six bits for each row of fifty, and the codec's payload."""
    model = WithSparseGradient(dtype)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = wrap(model, inner, compression=MAXSCALE, exchange="allgather")
    for _ in range(3):
        model.train_one_step(optimizer)
    stats = optimizer.communication_stats()
    coded = sum(channel.exchange.predicted_bytes_per_round() for channel in optimizer._averager._channels)
    others = range(hvd.size())
    own, total = rows_nbytes(hvd.rank() + 1), sum(rows_nbytes(rank + 1) for rank in others) * (hvd.size() > 1)
    own *= hvd.size() > 1
    assert stats["bytes_sent"] == 3 * (coded + (hvd.size() - 1) * own)
    assert stats["bytes_received"] == 3 * (coded + total - own)
    assert stats["uncompressed_bytes"] == ring_allreduce_nbytes(3 * (50 * 40 + 40 * 40 + 40), hvd.size())


@several_ranks
def test_a_row_that_was_used_several_times_travels_once():
    def step(words):
        torch.manual_seed(1)
        model = torch.nn.Embedding(50, 40, sparse=True)
        optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), compression=MAXSCALE)
        (model(torch.tensor(words)) * torch.arange(1.0, 1 + len(words))[:, None]).sum().backward()
        optimizer.synchronize()
        return model.weight.grad.to_dense(), optimizer.communication_stats()["bytes_sent"]

    rank = hvd.rank()
    mean, sent = step([3, 7 + rank, 3, 3])
    expected = torch.zeros(50, 40)
    expected[3] = 1 + 3 + 4
    for other in range(hvd.size()):
        expected[7 + other] += 2 / hvd.size()
    torch.testing.assert_close(mean, expected, atol=8 / 14 + 1e-6, rtol=0)  # half a step of 4 bits, at most a whole one
    assert sent == (hvd.size() - 1) * rows_nbytes(2)


@several_ranks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_was_not_sent_of_a_row_is_sent_when_it_is_used_again(dtype):
    """All that a word was given has arrived, or is pending; through a checkpoint, too."""
    torch.manual_seed(1)
    model = torch.nn.Embedding(50, 40, sparse=True, dtype=dtype)
    options = {"compression": hvd.Compression.topk(0.1, block_size=64), "feedback": hvd.Feedback()}
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)
    arrived, exact = torch.zeros(50, 40, dtype=torch.float64), torch.zeros(50, 40, dtype=torch.float64)
    for step in range(6):
        if step == 3:
            saved = optimizer.state_dict()
            optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)
            optimizer.load_state_dict(saved)
        for rank in range(hvd.size()):
            words, weight = torch.tensor([rank, step, 20]), torch.Generator().manual_seed(10 * step + rank)
            weights = torch.randn(3, 40, generator=weight, dtype=torch.float32).to(dtype)
            if rank == hvd.rank():
                optimizer.zero_grad()
                (model(words) * weights).sum().backward()
            dense = torch.zeros(50, 40, dtype=dtype).index_add_(0, words, weights)
            exact += dense.double() / hvd.size()
        optimizer.synchronize()
        arrived += model.weight.grad.to_dense().double()
    rest = everybody(optimizer.state_dict()["pqasgd"]["residual"]["weight"].numpy())
    pending = sum(residual.astype(np.float64) for residual in rest).reshape(50, 40) / hvd.size()
    tolerance = 1e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(arrived + torch.from_numpy(pending), exact, atol=tolerance, rtol=tolerance)
    assert np.linalg.norm(pending) > 0.1


def test_a_rank_without_sparse_gradient_sends_nothing_of_it():
    model = torch.nn.Embedding(50, 40, sparse=True)
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), compression=MAXSCALE)
    for step in range(2):
        optimizer.zero_grad()
        if step == 0 or hvd.rank() == 0:  # later the others have no gradient at all
            model(torch.tensor([3, 4, 5])).sum().backward()
        optimizer.step()
    stats = optimizer.communication_stats()
    some, none = rows_nbytes(3), rows_nbytes(0)
    others = hvd.size() - 1
    assert stats["bytes_sent"] == others * (some + (some if hvd.rank() == 0 else none))
    assert stats["bytes_received"] == others * some + (others * none if hvd.rank() == 0 else some + (others - 1) * none)


def test_tied_channels_last_and_double_parameters():
    torch.manual_seed(1)
    model = torch.nn.Module()
    model.conv = torch.nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
    model.one = torch.nn.Linear(40, 40).double()
    model.two = torch.nn.Linear(40, 40).double()
    model.two.weight = model.one.weight
    model.brief = torch.nn.Linear(40, 40).bfloat16()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.01), compression=MAXSCALE)
    for step in range(2):
        optimizer.zero_grad()
        images = torch.randn(2, 8, 8, 8) + hvd.rank()
        if step == 0:
            images = images.to(memory_format=torch.channels_last)
        loss = model.conv(images).square().mean().double()
        loss = loss + model.two(model.one(torch.randn(4, 40).double() * hvd.rank())).square().mean()
        loss = loss + model.brief(torch.randn(4, 40).bfloat16()).square().mean().double()
        loss.backward()
        model.conv.weight.grad = model.conv.weight.grad.contiguous()  # an order in memory unlike the parameter's
        optimizer.step()
    assert_replicas_equal(model)
    if hvd.size() > 1:
        assert optimizer.communication_stats()["num_elements"] == 8 * 16 * 9 + 16 + 1600 + 80 + 1640


def test_gradients_in_another_order_on_another_rank_keep_their_values():
    weight = torch.nn.Parameter(torch.zeros(16, 8, 3, 3).to(memory_format=torch.channels_last))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([weight], lr=1.0), [("w", weight)], hvd.Compression.bf16)
    gradient = torch.arange(weight.numel(), dtype=torch.float32).reshape(weight.shape)
    weight.grad = gradient.clone() if hvd.rank() == 0 else gradient.to(memory_format=torch.channels_last)
    optimizer.synchronize()
    torch.testing.assert_close(weight.grad, gradient, rtol=2**-8, atol=0)


def test_closures_are_synchronized_each_time():
    model = make_model(norm=False)
    optimizer = wrap(model, compression=MAXSCALE)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert_replicas_equal(model)
    assert optimizer.communication_stats()["rounds"] == 3


@pytest.mark.parametrize("unscaled", [True, False])
def test_grad_scaler_skips_on_all_ranks_alike(unscaled):
    model = make_model(norm=False)
    optimizer = wrap(model, compression=MAXSCALE, nonfinite="propagate", check_consistency=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scales = []
    for step in range(4):
        optimizer.zero_grad()
        loss = scaler.scale(loss_of(model, step))
        if step == 1 and hvd.rank() == 0:
            loss = loss * torch.inf
        loss.backward()
        optimizer.synchronize()
        if unscaled:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = floats(model)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        moved = [float(np.abs(value - before[name]).max()) for name, value in floats(model).items()]
        assert max(moved) < 0.5
        assert (max(moved) == 0) == (step == 1)
        scales.append(scaler.get_scale())
    assert scales[1] == scales[0] / 2
    assert len({tuple(other) for other in everybody(scales)}) == 1
    assert_replicas_equal(model)


@several_ranks
def test_nan_raises_everywhere_and_leaves_gradients_and_parameters():
    model = make_model(norm=False)
    optimizer = wrap(model, compression=MAXSCALE)
    train(model, optimizer, range(1))
    optimizer.zero_grad()
    loss = loss_of(model, 1)
    (loss * torch.nan if hvd.rank() == 1 else loss).backward()
    before, mine = floats(model), gradients(model)
    assert "rank 1" in assert_raises_everywhere(NonFiniteError, optimizer.step)
    assert_equal(before, floats(model))
    assert_equal(mine, gradients(model))
    train(model, optimizer, range(2, 3))
    assert_replicas_equal(model)


def test_gradients_set_to_none_or_zero():
    model = make_model(norm=False)
    optimizer = wrap(model, compression=MAXSCALE)
    for step, to_none in enumerate((True, False, True)):
        optimizer.zero_grad(set_to_none=to_none)
        assert all((p.grad is None) == to_none or step == 0 for p in model.parameters())
        loss_of(model, step).backward()
        optimizer.step()
    assert_replicas_equal(model)


def test_a_rank_alone_keeps_its_own_gradients():
    if hvd.size() == 1:
        model, alone = make_model(), make_model()
        train(model, wrap(model, compression=MAXSCALE), range(3))
        train(alone, sgd(alone), range(3))
        assert_equal(floats(model), floats(alone))


@pytest.mark.skipif(hvd.size() < 3, reason="needs three ranks: make test-4")
def test_process_sets_train_apart():
    pair = hvd.add_process_set([0, 2])
    try:
        model = make_model(norm=False)
        train(model, wrap(model, compression=MAXSCALE, process_set=pair), range(2))
        replicas = everybody(floats(model))
        assert_equal(replicas[0], replicas[2])
        assert not np.array_equal(replicas[0]["fc1.weight"], replicas[1]["fc1.weight"])
    finally:
        hvd.remove_process_set(pair)


def test_groups_and_predivide_are_taken_and_change_nothing():
    models = [make_model(norm=False) for _ in range(2)]
    train(models[0], wrap(models[0], compression=MAXSCALE), range(2))
    train(models[1], wrap(models[1], compression=MAXSCALE, groups=2, gradient_predivide_factor=4.0), range(2))
    assert_equal(floats(models[0]), floats(models[1]))


def test_stats_are_the_bytes_predicted():
    model = make_model(norm=False)
    optimizer = wrap(model, compression=hvd.Compression.quantize(bits=4))
    train(model, optimizer, range(4))
    stats = optimizer.communication_stats()
    predicted = sum(channel.exchange.predicted_bytes_per_round() for channel in optimizer._averager._channels)
    assert (stats["steps"], stats["rounds"], stats["bytes_sent"]) == (4, 4, 4 * predicted)
    assert optimizer.flush() is None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"op": hvd.Adasum, "compression": MAXSCALE}, "op is .*Adasum"),
        ({"op": hvd.Max, "compression": MAXSCALE}, "op is"),
        ({"op": hvd.Sum, "period": 2}, "period=2.*averaged"),
        ({"period": 2, "averaging": hvd.PeriodicAveraging(period=3)}, "period is 2 and averaging is"),
        ({"averaging": "often"}, "averaging is 'often'"),
        ({"period": 0}, "period is 0"),
        ({"period": 1.5}, "period is 1.5"),
        ({"compression": "fp16"}, "compression is 'fp16'"),
        ({"compression": object(), "period": 2}, "compression is <object"),
        ({"exchange": "ring"}, "exchange is 'ring'"),
        ({"seed": -1}, "seed is -1"),
        ({"nonfinite": "skip"}, "nonfinite is 'skip'"),
        ({"bucket_cap_mb": -2}, "bucket_cap_mb is -2"),
        ({"small_tensor_threshold": 1.5}, "small_tensor_threshold is 1.5"),
        ({"backward_passes_per_step": 0}, "backward_passes_per_step is 0"),
        ({"op": hvd.Sum, "gradient_predivide_factor": 2.0}, "gradient_predivide_factor is 2.0"),
        ({"process_set": [0, 1]}, r"process_set is \[0, 1\]; it must be an hvd.ProcessSet"),
        ({"model": "resnet"}, "model is 'resnet'; it must be None or a torch.nn.Module"),
        ({"check_consistency": "no"}, "check_consistency is 'no'; it must be True or False"),
        ({"flush_timeout": "60"}, "flush_timeout is '60'; it must be a number of seconds"),
        ({"flush_timeout": -1}, "flush_timeout is -1"),
    ],
    ids=str,
)
def test_arguments_that_are_not_allowed(options, text):
    model = make_model()
    with pytest.raises(ArgumentError, match=text):
        hvd.DistributedOptimizer(sgd(model), model.named_parameters(), **options)


def test_numbers_of_numpy_are_numbers():
    model = make_model(norm=False)
    numbers = {"seed": np.int64(3), "small_tensor_threshold": np.int32(10), "bucket_cap_mb": np.float32(2)}
    optimizer = wrap(model, period=np.int64(2), compression=MAXSCALE, flush_timeout=np.float32(9), **numbers)
    train(model, optimizer, range(2))
    assert_replicas_equal(model)
    optimizer.flush(np.float32(9))
    with pytest.raises(ArgumentError, match="timeout is '3'; it must be a number of seconds, 0 or more, or None"):
        optimizer.flush("3")


def test_optimizers_that_are_not_allowed():
    model = make_model()
    with pytest.raises(ArgumentError, match="LBFGS"):
        wrap(model, torch.optim.LBFGS(model.parameters()), compression=MAXSCALE)
    with pytest.raises(ArgumentError, match="optimizer is a list"):
        wrap(model, [])
