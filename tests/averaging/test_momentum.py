"""Momentum correction: deep gradient compression by hand, nothing lost, clipping, warm-up, and what is saved."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pqasgd_horovod import codecs
from pqasgd_horovod.averaging import (
    ExchangeConfig,
    Feedback,
    GradientAverager,
    MomentumCorrection,
    PeriodicAverager,
    PeriodicAveraging,
)
from pqasgd_horovod.averaging.feedback import FEEDBACKS, feedback_from_config
from pqasgd_horovod.averaging.outer import Nesterov
from pqasgd_horovod.averaging.policy import Rule
from pqasgd_horovod.averaging.state import combine_states
from pqasgd_horovod.errors import ArgumentError, MismatchError, NonFiniteError
from pqasgd_horovod.exchange.carriers.threads import run_ranks
from pqasgd_horovod.keys import derive_key

from .arrays import make_views

SHAPES = {"a": (9000, "float32"), "b": (5, "float32"), "c": (3000, "float16"), "d": (2500, "float64")}
TOPK = codecs.topk(density=0.05, block_size=1024)
STEPS, SIZE = 6, 3


def config(**options):
    return ExchangeConfig(**{"codec": TOPK, "feedback": MomentumCorrection(0.5), **options})


def gradients(rank, step):
    return make_views(SHAPES, seed=100 * step + rank)


def average(carrier, steps, first=0, state=None, saved=(), **options):
    """Average gradients of some steps; return the means of each step, and the state then."""
    averager = GradientAverager(carrier, config(**options), name="test", check_consistency=carrier is not None)
    views = gradients(0 if carrier is None else carrier.rank, 0)
    averager.load_state_dict(state)
    averager.prepare(views)
    means = []
    for step in range(first, first + steps):
        for view, fresh in zip(views, gradients(0 if carrier is None else carrier.rank, step), strict=True):
            view.array[:] = fresh.array
        if step % 2:
            averager.ready("a")
        averager.finish()
        means.append({view.name: view.array.copy() for view in views})
    return means, averager.state_dict()


class DeepGradientCompression:
    """The paper's algorithm, on one rank: of all compressed tensors, laid end to end, or of those that are not."""

    def __init__(self, names, momentum, nesterov=False, masking=True, codec=None):
        self.names, self.momentum, self.nesterov, self.masking, self.codec = names, momentum, nesterov, masking, codec
        size = sum(SHAPES[name][0] for name in names)
        self.u, self.v = np.zeros(size, np.float32), np.zeros(size, np.float32)

    def send(self, rank, step, scale=1.0, codec=None):
        m, codec = np.float32(self.momentum), codec or self.codec
        arrays = {view.name: view.array.astype(np.float32) for view in gradients(rank, step)}
        g = np.concatenate([arrays[name] for name in self.names]) * np.float32(scale)
        self.u = m * self.u + g
        self.v = self.v + (g + m * self.u if self.nesterov else self.u)
        if codec is None:
            sent, self.v = self.v, np.zeros_like(self.v)
            return sent
        key = derive_key(0, rank, step, 0, 0)
        sent = codec.reference_decode(codec.reference_encode(self.v, key), self.v.size, key)
        self.v = self.v - sent
        if self.masking:
            self.u = np.where(sent != 0, np.float32(0), self.u)
        return sent


def by_hand(steps, make, **options):
    """Return the means of each step, and what each rank keeps then."""
    ranks = [make() for _ in range(SIZE)]
    means = []
    for step in range(steps):
        total = np.float32(0)
        for rank, own in enumerate(ranks):
            total = total + own.send(rank, step, **options) * np.float32(1 / SIZE)
        means.append(total)
    return means, ranks


@pytest.mark.parametrize(
    "codec", [TOPK, codecs.topk(0.1, codecs.eden(bits=4), 512), codecs.threshold(1.5, 0.1)], ids=repr
)
@pytest.mark.parametrize(("nesterov", "masking"), [(False, True), (True, True), (False, False)])
def test_it_is_the_paper_s_algorithm_bit_by_bit(codec, nesterov, masking):
    feedback = MomentumCorrection(0.9, nesterov=nesterov, masking=masking)
    options = {"feedback": feedback, "codec": codec, "method": "allgather"}
    results = run_ranks(SIZE, lambda carrier: average(carrier, STEPS, **options))
    large, ranks = by_hand(STEPS, lambda: DeepGradientCompression("acd", 0.9, nesterov, masking, codec))
    small, _ = by_hand(STEPS, lambda: DeepGradientCompression("b", 0.9, nesterov))
    for rank, (means, state) in enumerate(results):
        for step in range(STEPS):
            found = np.concatenate([means[step][name] for name in "ad"])
            expected = np.concatenate([large[step][:9000], large[step][12000:]])
            # A quantizer multiplies the weight of a rank into its scale.
            np.testing.assert_allclose(found, expected, rtol=0, atol=0 if codec.values.lossless else 1e-5)
            assert means[step]["b"].tobytes() == small[step].tobytes(), step
        kept = [np.concatenate([state[kind][name] for name in "acd"]) for kind in ("velocity", "residual")]
        assert kept[0].tobytes() == ranks[rank].u.tobytes()
        assert kept[1].tobytes() == ranks[rank].v.tobytes()


def test_small_buckets_and_a_policy_are_the_same_algorithm():
    """Of each codec's tensors by itself; one that sends everything does not lose its momentum."""
    dense = codecs.eden(bits=6)
    options = {"policy": (Rule("d", dense),), "bucket_cap_mb": 0.008}
    results = run_ranks(SIZE, lambda carrier: average(carrier, STEPS, **options))
    _, ranks = by_hand(STEPS, lambda: DeepGradientCompression("ac", 0.5, codec=TOPK))
    for rank, (_, state) in enumerate(results):
        kept = np.concatenate([state["velocity"][name] for name in "ac"])
        assert kept.tobytes() == ranks[rank].u.tobytes()
        assert np.count_nonzero(kept) < kept.size  # something was sent
        u = np.zeros(2500, np.float32)
        for step in range(STEPS):
            u = np.float32(0.5) * u + gradients(rank, step)[3].array.astype(np.float32)
        assert state["velocity"]["d"].tobytes() == u.tobytes()


@pytest.mark.parametrize("method", ["allgather", "two_phase"])
def test_all_velocity_has_arrived_or_is_pending(method):
    """Without masking: the sum of what was sent and of what is kept is that of all velocities."""
    feedback = MomentumCorrection(0.5, masking=False)
    results = run_ranks(SIZE, lambda carrier: average(carrier, STEPS, feedback=feedback, method=method))
    expected = np.zeros(9000)
    for rank in range(SIZE):
        u = np.zeros(9000)
        for step in range(STEPS):
            u = 0.5 * u + gradients(rank, step)[0].array
            expected += u / SIZE
    arrived = sum(means["a"].astype(np.float64) for means in results[0][0])
    pending = sum(
        state["residual"]["a"].astype(np.float64) / SIZE + state["mean_residual"].get("a", 0.0) for _, state in results
    )
    np.testing.assert_allclose(arrived + pending, expected, atol=1e-4)


def test_without_momentum_it_is_error_feedback():
    one, other = (
        run_ranks(SIZE, lambda carrier, f=f: average(carrier, STEPS, feedback=f, method="allgather"))
        for f in (MomentumCorrection(0.0), Feedback())
    )
    for (means, state), (others, plain) in zip(one, other, strict=True):
        assert means[-1]["a"].tobytes() == others[-1]["a"].tobytes()
        assert state["residual"]["a"].tobytes() == plain["residual"]["a"].tobytes()


def test_one_rank_alone_has_its_momentum():
    means, state = average(None, STEPS)
    u = np.zeros(9000, np.float32)
    for step in range(STEPS):
        u = np.float32(0.5) * u + gradients(0, step)[0].array
        assert means[step]["a"].tobytes() == u.tobytes()
    assert state["velocity"]["a"].tobytes() == u.tobytes()
    resumed, _ = average(None, 2, first=4, state=average(None, 4)[1])
    assert resumed[-1]["a"].tobytes() == u.tobytes()


def test_gradients_are_clipped_together_on_each_rank():
    limit = 40.0
    results = run_ranks(SIZE, lambda carrier: average(carrier, 1, feedback=MomentumCorrection(clip_norm=limit)))
    for rank, (_, state) in enumerate(results):
        arrays = {view.name: view.array.astype(np.float32) for view in gradients(rank, 0)}
        norm = math.sqrt(sum(float(np.sum(array.astype(np.float64) ** 2)) for array in arrays.values()))
        assert norm > limit
        scale = limit / math.sqrt(SIZE) / norm
        np.testing.assert_allclose(state["velocity"]["b"], arrays["b"] * scale, rtol=1e-6)
        np.testing.assert_allclose(
            np.where(state["velocity"]["a"] != 0, arrays["a"] * scale, 0), state["velocity"]["a"], rtol=1e-6
        )


def test_what_is_small_is_not_clipped():
    correction = MomentumCorrection(clip_norm=1.0)
    assert [correction.clipping(norm, 4) for norm in (0.0, 0.5, 1.0, math.inf)] == [1.0, 1.0, 0.5, 1.0]
    assert MomentumCorrection().clipping(1e30, 4) == 1.0


def test_density_warms_up_on_all_ranks_alike():
    """Each stage sends what its codec makes; every bucket is laid out anew, and nothing that was kept is lost."""
    codec = codecs.topk(density=0.01, block_size=1024)
    feedback = MomentumCorrection(0.5, masking=False, warmup_steps=4)
    densities = [0.25, 0.0625, 0.015625, 0.01, 0.01, 0.01]

    def program(carrier):
        averager = GradientAverager(
            carrier, config(codec=codec, feedback=feedback, method="allgather"), name="test", check_consistency=True
        )
        views = gradients(carrier.rank, 0)
        averager.prepare(views)
        sent, arrived = [0], np.zeros(9000)
        for step in range(STEPS):
            for view, fresh in zip(views, gradients(carrier.rank, step), strict=True):
                view.array[:] = fresh.array
            averager.ready("a")
            averager.finish()
            arrived += views[0].array
            sent.append(averager.communication_stats()["bytes_sent"])
        return np.diff(sent).tolist(), arrived, averager.state_dict()

    results = run_ranks(SIZE, program)
    large = [(SIZE - 1) * (64 + codecs.topk(d, block_size=1024).payload_nbytes(14500)) for d in densities]
    small = results[0][0][-1] - large[-1]
    assert 0 < small < 1000
    assert [sent for sent, _, _ in results] == [[nbytes + small for nbytes in large]] * SIZE
    expected = np.zeros(9000)
    for rank in range(SIZE):
        u = np.zeros(9000)
        for step in range(STEPS):
            u = 0.5 * u + gradients(rank, step)[0].array
            expected += u / SIZE
    pending = sum(state["residual"]["a"].astype(np.float64) / SIZE for _, _, state in results)
    np.testing.assert_allclose(results[0][1] + pending, expected, atol=1e-4)


@pytest.mark.parametrize("warmup_steps", [0, 5])
@pytest.mark.parametrize("saved_after", [2, 4])
def test_it_resumes_bit_exactly(saved_after, warmup_steps):
    feedback = MomentumCorrection(0.9, clip_norm=10.0, warmup_steps=warmup_steps)
    whole = run_ranks(SIZE, lambda carrier: average(carrier, STEPS, feedback=feedback))
    first = run_ranks(SIZE, lambda carrier: average(carrier, saved_after, feedback=feedback))
    second = run_ranks(
        SIZE,
        lambda carrier: average(carrier, STEPS - saved_after, saved_after, first[carrier.rank][1], feedback=feedback),
    )
    for rank in range(SIZE):
        assert whole[rank][0][-1]["a"].tobytes() == second[rank][0][-1]["a"].tobytes()
        for kind in ("velocity", "residual"):
            for name, values in whole[rank][1][kind].items():
                assert values.tobytes() == second[rank][1][kind][name].tobytes(), (kind, name)
    assert set(whole[0][1]["velocity"]) == set("abcd")  # what travels as it is has momentum too


def test_a_world_of_another_size_takes_over_the_mean_velocity():
    states = [state for _, state in run_ranks(SIZE, lambda carrier: average(carrier, 3))]
    combined = combine_states(states)
    mean = np.mean([state["velocity"]["a"].astype(np.float64) for state in states], axis=0)
    np.testing.assert_allclose(combined["velocity"]["a"], mean, rtol=2.0**-23)
    run_ranks(2, lambda carrier: average(carrier, 1, 3, combined))


def test_a_broadcast_state_leaves_every_rank_its_own_velocity():
    def program(carrier):
        averager = GradientAverager(carrier, config(), name="test")
        averager.prepare(gradients(carrier.rank, 0))
        averager.finish()
        before = averager.state_dict()
        roots = {name: np.full_like(values, 7) for name, values in before["velocity"].items()}
        averager.load_state_dict({**before, "velocity": roots, "owner": [0, 2]}, keep_residuals=True)
        return before["velocity"]["a"], averager.state_dict()["velocity"]["a"]

    both = run_ranks(2, program)
    assert both[0][0].tobytes() != both[1][0].tobytes()
    for before, after in both:
        assert before.any()
        assert before.tobytes() == after.tobytes()


@pytest.mark.parametrize("nonfinite", ["raise", "propagate"])
def test_a_round_that_fails_leaves_the_velocity(nonfinite):
    def program(carrier):
        averager = GradientAverager(carrier, config(nonfinite=nonfinite, bucket_cap_mb=0.02), name="test")
        views = gradients(carrier.rank, 0)
        averager.prepare(views)
        averager.finish()
        before = averager.state_dict()
        for view in views:
            view.array[:] = 1
        if carrier.rank == 1:
            views[0].array[0] = np.inf  # in the first bucket
        try:
            averager.finish()
        except NonFiniteError:
            assert nonfinite == "raise"
        return before, averager.state_dict()

    for before, after in run_ranks(2, program):
        for kind in ("velocity", "residual"):
            assert before[kind]["a"][:100].tobytes() == after[kind]["a"][:100].tobytes()
            assert (before[kind]["d"].tobytes() == after[kind]["d"].tobytes()) == (nonfinite == "raise")


def test_a_warm_up_on_one_rank_only_is_an_error_on_all():
    def program(carrier):
        feedback = MomentumCorrection(warmup_steps=5 * carrier.rank)
        GradientAverager(carrier, config(feedback=feedback), name="test").prepare(gradients(0, 0))

    errors = run_ranks(2, program, return_exceptions=True)
    assert [type(error) for error in errors] == [MismatchError] * 2
    assert "exchange.feedback.warmup_steps: it is 0 on rank 0; 5 on rank 1" in str(errors[0])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"momentum": 1.0}, "momentum is 1.0; it must be a number from 0 to below 1"),
        ({"momentum": True}, "momentum is True"),
        ({"nesterov": 1}, "nesterov is 1; it must be True or False"),
        ({"masking": None}, "masking is None; it must be True or False"),
        ({"clip_norm": 0}, "clip_norm is 0; it must be None or a number above 0"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
    ],
)
def test_wrong_arguments(options, text):
    with pytest.raises(ArgumentError, match=text):
        MomentumCorrection(**options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "two_phase"}, r"exchange is 'two_phase' with compression=TopK\(.*would clear all their momentum"),
        ({"codec": codecs.qsgd(bits=2)}, "would grow"),
        ({"hierarchy": "node"}, "hierarchy is 'node' with feedback=MomentumCorrection.*use one of them"),
    ],
)
def test_what_it_is_not_fit_for(options, text):
    with pytest.raises(ArgumentError, match=text):
        config(**options)


def test_it_is_for_gradients():
    for averaging in (PeriodicAveraging(2), PeriodicAveraging(1, outer=Nesterov())):
        with pytest.raises(ArgumentError, match=r"feedback is MomentumCorrection.*for gradients, period=1"):
            PeriodicAverager(None, averaging, config(), name="test")


def test_every_feedback_survives_its_configuration():
    for feedback in (Feedback(), MomentumCorrection(0.5, True, False, 2.0, 7)):
        assert feedback_from_config(feedback.config()) == feedback
        assert type(feedback) is FEEDBACKS[feedback.id]
    with pytest.raises(ArgumentError, match="its id must be one of residual, momentum_correction"):
        feedback_from_config({"id": "none"})
