"""A policy in PyTorch: by name, size or function, in both periods, checked at construction, saved and resumed."""

from __future__ import annotations

import pytest

import pqasgd_horovod.torch as hvd
from pqasgd_horovod.errors import ArgumentError, MismatchError

from .common import (
    assert_equal,
    assert_it_resumes,
    assert_raises_everywhere,
    assert_replicas_equal,
    floats,
    make_model,
    several_ranks,
    train,
    two_ranks,
    wrap,
)

EDEN2 = hvd.Compression.eden(2)
POLICY = [("*.bias", hvd.Compression.none), ("fc1*", hvd.Compression.topk(0.05)), (..., EDEN2)]


@several_ranks
@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
@pytest.mark.parametrize("period", [1, 3])
def test_training_resumes_bit_exactly(period, exchange):
    options = {"policy": POLICY, "feedback": hvd.Feedback(), "period": period, "exchange": exchange}
    saved = assert_it_resumes(options, saved_after=5, steps=9)
    # Small tensors are no exception where ... is.
    assert set(saved["residual"]) == {"fc1.weight", "norm.weight", "fc2.weight", "out.weight"}


@several_ranks
@pytest.mark.parametrize("period", [1, 2])
def test_it_sends_what_its_codecs_make(period):
    model = make_model(norm=False)
    patterns = [(hvd.larger_than(2000), EDEN2), (lambda name, shape: shape == (60, 30), hvd.Compression.bf16)]
    optimizer = wrap(model, policy=patterns, period=period, exchange="allgather")
    train(model, optimizer, range(2))
    assert_replicas_equal(model)
    stats = optimizer.communication_stats()
    small = sum(p.numel() for p in model.parameters() if p.numel() < 1800)
    coded = (EDEN2.codec, 2400), (hvd.Compression.bf16.codec, 1800), (hvd.Compression.none.codec, small)
    expected = (hvd.size() - 1) * sum(64 + codec.payload_nbytes(numel) for codec, numel in coded)
    # Small tensors are few: whichever way is shorter.
    assert stats["bytes_sent"] <= stats["rounds"] * expected
    assert stats["bytes_sent"] > stats["rounds"] * expected * 0.9


@several_ranks
@pytest.mark.parametrize("period", [1, 2])
def test_a_policy_that_says_the_same_is_the_same(period):
    models = []
    for options in ({"compression": EDEN2}, {"policy": [(hvd.smaller_than(1024), hvd.Compression.none), (..., EDEN2)]}):
        model = make_model(norm=False)
        # Rounding noise is that of the channel's number, and compression= is always the first.
        train(model, wrap(model, **options, period=period, small_tensor_threshold=1024), range(4))
        models.append(floats(model))
    assert_equal(*models)


@pytest.mark.parametrize("period", [1, 2])
def test_a_pattern_that_matches_nothing(period):
    text = assert_raises_everywhere(
        ArgumentError, lambda: wrap(make_model(), policy=[("*.bais", EDEN2)], period=period)
    )
    assert text.startswith("policy: '*.bais' matches none of the parameters, which are 'fc1.weight', 'fc1.bias', ")


def test_compressors_of_one_s_own_have_no_place_in_it():
    class Own:
        def compress(self, tensor):
            return tensor, None

        def decompress(self, tensor, ctx):
            return tensor

    with pytest.raises(ArgumentError, match=r"policy\[0\] has .*Own.*one of Compression"):
        wrap(make_model(), policy=[("*.bias", Own())])
    with pytest.raises(ArgumentError, match=r"compression is .*Own.*no policy only"):
        wrap(make_model(), compression=Own(), policy=[("*.bias", EDEN2)])


@two_ranks
def test_functions_that_decide_otherwise_on_one_rank_are_an_error_on_all():
    policy = [(lambda name, shape: hvd.rank() == 1 and name == "fc2.weight", EDEN2)]
    text = assert_raises_everywhere(MismatchError, lambda: wrap(make_model(), policy=policy, period=2))
    assert 'agree on codecs.fc2.weight.id: it is "none" on rank 0; "eden" on rank 1' in text
