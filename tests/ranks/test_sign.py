"""Signs as gradients in PyTorch: scaled with error feedback, and as votes, on real Horovod."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pqasgd_horovod.torch as hvd
from pqasgd_horovod.errors import ArgumentError
from tests.ranks.common import (
    assert_equal,
    assert_raises_everywhere,
    assert_replicas_equal,
    everybody,
    loss_of,
    make_model,
    several_ranks,
    wrap,
)

VOTES = {"compression": hvd.Compression.signsgd(majority_vote=True), "small_tensor_threshold": 0}


def gradients(model):
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters()}


@several_ranks
def test_gradients_become_the_sign_of_the_sum_of_the_ranks_signs():
    model, twin = make_model(norm=False), make_model(norm=False)
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.01), **VOTES)
    for step in range(3):
        twin.load_state_dict(model.state_dict())
        twin.zero_grad()
        loss_of(twin, step).backward()
        votes = everybody({name: np.where(g < 0, -1, 1) for name, g in gradients(twin).items()})
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.synchronize()
        sums = {name: sum(vote[name] for vote in votes) for name in votes[0]}
        assert_equal(gradients(model), {name: np.where(s < 0, -1, 1).astype("f4") for name, s in sums.items()})
        with optimizer.skip_synchronize():
            optimizer.step()
    assert_replicas_equal(model)
    assert optimizer.communication_stats()["compression_ratio"] > 5  # headers of 64 bytes count in a model this small


@several_ranks
@pytest.mark.parametrize(
    ("options", "rate"),
    [
        (VOTES, 0.01),
        ({"compression": hvd.Compression.signsgd(scaled=False), "small_tensor_threshold": 0}, 0.01),
        ({"compression": hvd.Compression.signsgd(), "feedback": hvd.Feedback()}, 0.3),
        ({"compression": hvd.Compression.onebit(), "feedback": hvd.Feedback()}, 0.3),
        ({"compression": hvd.Compression.natural()}, 0.3),
    ],
    ids=["votes", "signs", "signsgd", "onebit", "natural"],
)
def test_training(options, rate):
    """The same batch again and again: every rank's loss falls, in replicas of the same bits."""
    model = make_model(norm=False)
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=rate), **options)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert_replicas_equal(model)
    mean = np.mean(everybody(losses), axis=0)
    assert mean[-1] < 0.3 * mean[0]


@several_ranks
def test_what_votes_are_not_for_is_refused_on_every_rank():
    model = make_model()
    text = assert_raises_everywhere(ArgumentError, lambda: wrap(model, **VOTES, exchange="allgather"))
    assert "exchange is 'allgather' with compression=SignSgd(" in text
    assert "counts the votes" in text
    text = assert_raises_everywhere(ArgumentError, lambda: wrap(model, **VOTES, period=4))
    assert "is for gradients, period=1" in text
    text = assert_raises_everywhere(ArgumentError, lambda: wrap(model, **VOTES, feedback=hvd.Feedback()))
    assert "feedback" in text
