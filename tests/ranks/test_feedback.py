"""Error feedback in PyTorch: what a codec drops arrives later, residuals are each rank's own, and they are saved."""

from __future__ import annotations

import pytest
import torch

import pqasgd_horovod.torch as hvd
from pqasgd_horovod.errors import ArgumentError, MismatchError

from .common import (
    assert_equal,
    assert_it_resumes,
    assert_raises_everywhere,
    everybody,
    make_model,
    several_ranks,
    train,
    two_ranks,
    wrap,
)

OPTIONS = {"compression": hvd.Compression.eden(2), "feedback": hvd.Feedback()}


def residual_of(optimizer, kind="residual"):
    return {name: values.numpy() for name, values in optimizer.state_dict()["pqasgd"][kind].items()}


@several_ranks
@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
@pytest.mark.parametrize("period", [1, 3])
def test_training_resumes_bit_exactly_with_its_residuals(period, exchange):
    saved = assert_it_resumes({**OPTIONS, "period": period, "exchange": exchange}, saved_after=5, steps=9)
    assert set(saved["residual"]) == {"fc1.weight", "fc2.weight"}
    # Allgather codes once: there is no residual of a mean.
    assert set(saved["mean_residual"]) == ({"fc1.weight", "fc2.weight"} if exchange == "two_phase" else set())


@several_ranks
@pytest.mark.parametrize("period", [1, 2])
def test_each_rank_has_its_own_and_a_broadcast_leaves_it(period):
    model = make_model()
    optimizer = wrap(model, **OPTIONS, period=period)
    train(model, optimizer, range(4))
    before = residual_of(optimizer)
    assert len({values["fc1.weight"].tobytes() for values in everybody(before)}) == hvd.size()
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert_equal(residual_of(optimizer), before)
    train(model, optimizer, range(4, 6))


@several_ranks
def test_the_states_of_all_ranks_combine_to_one_that_every_rank_loads():
    model = make_model()
    optimizer = wrap(model, **OPTIONS, period=2)
    train(model, optimizer, range(4))
    combined = hvd.combine_states(everybody(optimizer.state_dict()))
    resumed = make_model()
    resumed.load_state_dict(model.state_dict())
    again = wrap(resumed, **OPTIONS, period=2)
    again.load_state_dict(combined)
    mean = sum(values["fc1.weight"].astype("f8") for values in everybody(residual_of(optimizer))) / hvd.size()
    of_means = everybody(residual_of(optimizer, "mean_residual"))
    mean += sum(values["fc1.weight"].astype("f8") for values in of_means if values)
    torch.testing.assert_close(torch.from_numpy(residual_of(again)["fc1.weight"]).double(), torch.from_numpy(mean))
    train(resumed, again, range(4, 6))


@two_ranks
def test_feedback_on_one_rank_only_is_an_error_on_all():
    model = make_model()
    feedback = hvd.Feedback() if hvd.rank() else None
    options = {"compression": hvd.Compression.eden(2), "period": 2, "feedback": feedback}
    assert "feedback" in assert_raises_everywhere(MismatchError, lambda: wrap(model, **options))


@pytest.mark.parametrize("compression", [hvd.Compression.none, hvd.Compression.fp16], ids=repr)
def test_where_horovod_averages_there_is_nothing_to_feed_back(compression):
    with pytest.raises(ArgumentError, match="nothing is left to feed back"):
        wrap(make_model(), compression=compression, feedback=hvd.Feedback())
