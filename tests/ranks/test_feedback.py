"""Error feedback in PyTorch: what a codec drops arrives later, residuals are each rank's own, and they are saved."""

from __future__ import annotations

import copy

import pytest
import torch

import pqasgd_horovod.torch as hvd
from pqasgd_horovod.errors import ArgumentError, MismatchError

from .common import (
    assert_equal,
    assert_raises_everywhere,
    everybody,
    floats,
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
    options = {**OPTIONS, "period": period, "exchange": exchange}
    whole = make_model()
    train(whole, wrap(whole, **options), range(9))
    part = make_model()
    optimizer = wrap(part, **options)
    train(part, optimizer, range(6))
    model_state, state = copy.deepcopy(part.state_dict()), optimizer.state_dict()
    assert set(state["pqasgd"]["residual"]) == {"fc1.weight", "fc2.weight"}
    resumed = make_model()
    resumed.load_state_dict(model_state)
    optimizer = wrap(resumed, **options)
    optimizer.load_state_dict(state)
    train(resumed, optimizer, range(6, 9))
    assert_equal(floats(resumed), floats(whole))


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
    mean += sum(values["fc1.weight"].astype("f8") for values in everybody(residual_of(optimizer, "mean_residual")))
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
