"""Sparse codecs in PyTorch, on real Horovod: gradients and changes of a period, with error feedback."""

from __future__ import annotations

import pytest
import torch

import pqasgd_horovod.torch as hvd
from pqasgd_horovod.errors import ArgumentError

from .common import (
    assert_raises_everywhere,
    assert_replicas_equal,
    everybody,
    loss_of,
    make_model,
    several_ranks,
    train,
    wrap,
)

Compression = hvd.Compression
SPARSE = {
    "topk": Compression.topk(density=0.05, block_size=1024),
    "topk-eden": Compression.chain(Compression.topk(density=0.1, block_size=1024), Compression.eden(bits=4)),
    "randomk": Compression.randomk(density=0.1, block_size=1024),
    "threshold": Compression.threshold(0.01, density=0.1, block_size=1024),
}


def loss_everywhere(model: torch.nn.Module) -> float:
    """Return the mean loss of all ranks on examples that nobody trains with."""
    model.eval()
    with torch.no_grad():
        losses = everybody(sum(float(loss_of(model, step)) for step in range(90, 94)))
    return sum(losses) / len(losses) / 4


@several_ranks
@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
@pytest.mark.parametrize("period", [1, 4])
@pytest.mark.parametrize("name", SPARSE)
def test_replicas_are_identical_and_what_was_not_sent_is_kept(name, period, exchange):
    model = make_model(norm=False)
    optimizer = wrap(
        model, compression=SPARSE[name], period=period, exchange=exchange, feedback=hvd.Feedback(), bucket_cap_mb=0.01
    )
    train(model, optimizer, range(2 * period))
    assert_replicas_equal(model)
    residuals = optimizer.state_dict()["pqasgd"]["residual"]
    owners = optimizer.state_dict()["pqasgd"]["mean_residual"]
    assert set(residuals) == {"fc1.weight", "fc2.weight"}
    assert any(bool(values.any()) for values in residuals.values())
    kept = any(everybody(any(bool(values.any()) for values in owners.values())))
    assert kept == (exchange == "two_phase" and name != "randomk")  # nothing is lost of a mean that has nothing else


@several_ranks
@pytest.mark.parametrize("period", [1, 4])
def test_with_feedback_a_twentieth_of_the_numbers_is_enough_to_fit(period):
    """The same few batches again and again; without feedback most numbers would never be sent."""

    def fitted(**options: object) -> float:
        model = make_model(norm=False)
        optimizer = wrap(model, period=period, check_consistency=False, **options)
        for _ in range(40):
            train(model, optimizer, range(4))
        optimizer.flush()
        return sum(everybody(sum(float(loss_of(model, step).detach()) for step in range(4)))) / 4 / hvd.size()

    compressed = fitted(compression=SPARSE["topk"], feedback=hvd.Feedback())
    assert compressed < 0.5 * fitted_by_nobody()
    assert compressed < 2 * fitted(compression=Compression.none) + 0.1


def fitted_by_nobody() -> float:
    model = make_model(norm=False)
    return sum(everybody(sum(float(loss_of(model, step).detach()) for step in range(4)))) / 4 / hvd.size()


def test_unbiased_random_k_is_no_contraction():
    with pytest.raises(ArgumentError, match=r"feedback is .* with compression RandomK\(.*scaled=True"):
        wrap(make_model(), compression=Compression.randomk(scaled=True), period=2, feedback=hvd.Feedback())


@several_ranks
def test_a_second_compression_that_draws_again_is_an_error_on_all():
    options = {"compression": SPARSE["randomk"], "second_compression": Compression.randomk(density=0.2), "period": 2}
    assert "second_compression is RandomK" in assert_raises_everywhere(
        ArgumentError, lambda: wrap(make_model(), **options)
    )
