"""Which codec for which tensor: the first rule that matches, one channel for each codec, the same on every rank."""

from __future__ import annotations

import numpy as np
import pytest

from pqasgd_horovod import codecs
from pqasgd_horovod.averaging import (
    ExchangeConfig,
    Feedback,
    GradientAverager,
    PeriodicAverager,
    PeriodicAveraging,
    larger_than,
    smaller_than,
)
from pqasgd_horovod.averaging.policy import Rule, Shaped, check_names, make_policy
from pqasgd_horovod.errors import ArgumentError, MismatchError
from pqasgd_horovod.exchange.carriers.threads import run_ranks
from pqasgd_horovod.keys import derive_key

from .arrays import decoded_mean, make_views

SHAPES = {
    "embed.weight": (9000, "float32"),
    "fc.weight": (3000, "float64"),
    "fc.bias": (40, "float32"),
    "out.weight": (2500, "float32"),
    "out.bias": (1500, "float32"),
}
TOPK, EDEN = codecs.topk(density=0.05, block_size=1024), codecs.eden(bits=2)
POLICY = (Rule("*.bias", codecs.none()), Rule("embed*", TOPK), Rule(..., EDEN))
"""By it three channels: embed.weight; fc.weight and out.weight; both biases."""


def config(**options):
    return ExchangeConfig(**{"codec": codecs.none(), "policy": POLICY, **options})


def pairs(policy):
    return make_policy(policy, lambda codec, argument: codec)


@pytest.mark.parametrize(
    ("rules", "codec", "expected"),
    [
        (POLICY, codecs.none(), ["topk", "eden", "none", "eden", "none"]),
        (POLICY[1:], codecs.none(), ["topk", "eden", "eden", "eden", "eden"]),
        # Without ... the rest is the business of compression= and small_tensor_threshold=.
        (POLICY[:1], codecs.fp16(), ["fp16", "fp16", "none", "fp16", "none"]),
        (POLICY[1:2], codecs.fp16(), ["topk", "fp16", "none", "fp16", "fp16"]),
        ((Rule(larger_than(2500), EDEN),), codecs.fp16(), ["eden", "eden", "none", "fp16", "fp16"]),
        ((Rule(smaller_than(2500), EDEN),), codecs.fp16(), ["fp16", "fp16", "eden", "fp16", "eden"]),
        (
            (Rule(lambda name, shape: len(shape) == 1 and "out" in name, EDEN),),
            codecs.fp16(),
            ["fp16", "fp16", "none", "eden", "eden"],
        ),
        ((), codecs.fp16(), ["fp16", "fp16", "none", "fp16", "fp16"]),
    ],
)
def test_the_first_rule_that_matches_decides(rules, codec, expected):
    chosen = ExchangeConfig(codec, policy=rules)
    views = make_views(SHAPES, seed=0)
    assert [chosen.way_for(view).codec.id for view in views] == expected
    together = {way.codec.id: [view.name for view in members] for way, members in chosen.by_way(views)}
    assert together == {
        kind: [name for name, own in zip(SHAPES, expected, strict=True) if own == kind] for kind in set(expected)
    }


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        ("*.bias", r"policy is '\*\.bias'; it must be a list of pairs"),
        ([("*.bias",)], r"policy\[0\] is \('\*\.bias',\); it must be a list of pairs"),
        ([(3, EDEN)], r"policy\[0\] has the pattern 3; it must be a glob"),
        ([(..., EDEN), ("*.bias", EDEN)], r"policy has rules after \.\.\."),
    ],
)
def test_what_is_no_policy(policy, text):
    with pytest.raises(ArgumentError, match=text):
        pairs(policy)


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        ([("*.biass", EDEN)], r"'\*\.biass' matches none of the parameters, which are 'embed.weight', 'fc.weight', "),
        ([("*", EDEN), ("fc*", TOPK)], r"all that 'fc\*' matches, such as 'fc.weight', is matched by .* '\*'; "),
        ([(larger_than(1), EDEN), ("fc*", TOPK)], r"is matched by an earlier rule, {'larger_than': 1}"),
        ([(lambda name, shape: 1, EDEN)], r"<lambda>'} returned 1 for 'embed.weight' of shape \(9000,\)"),
    ],
)
def test_a_pattern_that_decides_nothing_is_an_error(policy, text):
    with pytest.raises(ArgumentError, match=text):
        check_names(pairs(policy), make_views(SHAPES, seed=0))


def test_conditions_on_size_may_match_nothing():
    check_names(pairs([(larger_than(10**9), EDEN), (lambda name, shape: False, EDEN)]), make_views(SHAPES, seed=0))


def test_a_long_list_of_names_is_cut():
    with pytest.raises(ArgumentError, match=r"'p7' and 92 more$"):
        check_names(pairs([("q*", EDEN)]), [Shaped(f"p{i}", (1,)) for i in range(100)])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"codec": EDEN}, r"compression is Eden\(.* and policy ends with \.\.\., which leaves nothing for it"),
        (
            {"feedback": Feedback(), "policy": (Rule("a", codecs.qsgd(bits=2)),)},
            r"feedback is .* with policy\[0\] Qsgd\(.*would grow",
        ),
        (
            {"method": "allgather", "policy": (Rule("a", codecs.signsgd(majority_vote=True)),)},
            r"exchange is 'allgather' with policy\[0\]=SignSgd",
        ),
        (
            {"second_codec": codecs.randomk(0.5), "policy": (Rule("a", codecs.randomk(0.1)),)},
            r"second_compression is RandomK\(.* with policy\[0\]=RandomK",
        ),
    ],
)
def test_each_rule_s_codec_is_checked(options, text):
    with pytest.raises(ArgumentError, match=text):
        config(**options)


def test_each_rule_s_codec_has_to_be_fit_for_parameters():
    with pytest.raises(ArgumentError, match=r"policy\[0\] is SignSgd.*for gradients"):
        config(policy=(Rule("a", codecs.signsgd(scaled=False)),)).check_for_parameters(PeriodicAveraging(period=2))


@pytest.mark.parametrize("period", [1, 2])
def test_each_codec_averages_its_own_tensors(period):
    """By hand from the specification, channel by channel."""
    chosen = config(method="allgather")
    steps = 1 if period == 1 else 2

    def program(carrier):
        views = make_views(SHAPES, seed=100 if period > 1 else carrier.rank)
        if period == 1:
            averager = GradientAverager(carrier, chosen, name="test", check_consistency=True)
            averager.prepare(views)
            averager.finish()
        else:
            averager = PeriodicAverager(carrier, PeriodicAveraging(period), chosen, name="test", check_consistency=True)
            averager.prepare(views)
            for view, change in zip(views, make_views(SHAPES, seed=carrier.rank), strict=True):
                view.array += change.array
            for _ in range(period):
                averager.count_step()
        return {view.name: view.array for view in views}, len(list(averager._channels))

    results = run_ranks(3, program)
    start = {view.name: view.array for view in make_views(SHAPES, seed=100)}
    index = 0
    channels = [(way.codec, [view.name for view in views]) for way, views in chosen.by_way(make_views(SHAPES, 0))]
    for dtype in [None] if period == 1 else ["float32", "float64"]:  # anchors of one type are a channel
        for codec, members in channels:
            names = [name for name in members if dtype in (None, SHAPES[name][1])]
            if not names:
                continue
            vectors = []
            for rank in range(3):
                changes = {view.name: view.array for view in make_views(SHAPES, seed=rank)}
                if period > 1:
                    changes = {name: (start[name] + change) - start[name] for name, change in changes.items()}
                vectors.append(np.concatenate([changes[name].astype(np.float32) for name in names]))
            keys = [derive_key(index, rank, 0 if period == 1 else steps, 0, 0) for rank in range(3)]
            mean = decoded_mean(vectors, None, ExchangeConfig(codec), keys)
            at = 0
            for name in names:
                part = mean[at : at + SHAPES[name][0]]
                at += len(part)
                expected = part if period == 1 else start[name] + part
                for arrays, _ in results:
                    np.testing.assert_array_equal(arrays[name], expected.astype(arrays[name].dtype), err_msg=name)
            index += 1
    assert {count for _, count in results} == {index}


def test_a_codec_is_one_message_however_many_tensors_it_has():
    shapes = {f"layer{i}.{kind}": (2000, "float32") for i in range(50) for kind in ("weight", "bias")}

    def program(carrier):
        averager = GradientAverager(carrier, config(policy=(POLICY[0], POLICY[2])), name="test")
        averager.prepare(make_views(shapes, seed=carrier.rank))
        averager.finish()
        return [channel.num_buckets for channel in averager._channels]

    assert run_ranks(2, program) == [[1, 1]] * 2


@pytest.mark.parametrize("period", [1, 2])
def test_functions_that_decide_otherwise_on_one_rank_are_an_error_on_all(period):
    def program(carrier):
        rule = Rule(lambda name, shape: shape[0] > 2700 + 1000 * carrier.rank, EDEN)
        chosen = ExchangeConfig(codecs.bf16(), policy=(rule,))
        if period == 1:
            averager = GradientAverager(carrier, chosen, name="test")
        else:
            averager = PeriodicAverager(carrier, PeriodicAveraging(period), chosen, name="test")
        averager.prepare(make_views(SHAPES, seed=0))

    errors = run_ranks(2, program, return_exceptions=True)
    assert [type(error) for error in errors] == [MismatchError] * 2
    assert str(errors[0]) == str(errors[1])
    assert 'agree on codecs.fc.weight.id: it is "eden" on rank 0; "bf16" on rank 1' in str(errors[0])


@pytest.mark.parametrize("method", ["allgather", "two_phase"])
def test_with_feedback_all_has_arrived_or_is_pending_and_it_resumes(method):
    def program(carrier, steps, first=0, state=None):
        averager = GradientAverager(carrier, config(method=method, feedback=Feedback()), name="test")
        averager.load_state_dict(state)
        views = make_views(SHAPES, seed=0)
        averager.prepare(views)
        total = {name: np.zeros(numel) for name, (numel, _) in SHAPES.items()}
        for step in range(first, first + steps):
            for view, fresh in zip(views, make_views(SHAPES, seed=100 * step + carrier.rank), strict=True):
                view.array[:] = fresh.array
            averager.finish()
            for view in views:
                total[view.name] += view.array
        return total, averager.state_dict()

    whole = run_ranks(3, lambda carrier: program(carrier, 6))
    states = [state for _, state in whole]
    for name in SHAPES:
        given = sum(
            view.array.astype(np.float64) / 3
            for step in range(6)
            for rank in range(3)
            for view in make_views(SHAPES, seed=100 * step + rank)
            if view.name == name
        )
        pending = sum(
            np.float64(state["residual"].get(name, 0)) / 3 + np.float64(state["mean_residual"].get(name, 0))
            for state in states
        )
        assert np.any(pending) == (not name.endswith("bias"))
        np.testing.assert_allclose(whole[0][0][name] + pending, given, atol=1e-4)
    half = run_ranks(3, lambda carrier: program(carrier, 3))
    resumed = run_ranks(3, lambda carrier: program(carrier, 3, 3, half[carrier.rank][1]))
    for rank in range(3):
        for kind in ("residual", "mean_residual"):
            for name, values in states[rank][kind].items():
                assert values.tobytes() == resumed[rank][1][kind][name].tobytes(), (kind, name)


def test_a_state_of_another_policy_is_refused():
    averager = GradientAverager(None, config(), name="test")
    with pytest.raises(ArgumentError, match=r"exchange\.policy was .*'embed\*'.* and is \[\]"):
        GradientAverager(None, config(policy=()), name="test").load_state_dict(averager.state_dict())


def test_what_a_rule_leaves_uncompressed_stays_so():
    """Whatever the means of the others are coded by; only compression=none itself has its means coded."""
    views = make_views(SHAPES, seed=0)
    chosen = config(second_codec=EDEN, method="two_phase")
    assert [chosen.way_for(view).second_codec for view in views] == [EDEN, EDEN, None, EDEN, None]
    chosen = config(policy=(), second_codec=EDEN, method="two_phase")
    assert [chosen.way_for(view).second_codec for view in views] == [EDEN, EDEN, None, EDEN, EDEN]
