"""Error feedback between ranks: what is not sent arrives later, in every exchange and through every checkpoint."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from pqasgd_horovod import codecs
from pqasgd_horovod.averaging import ExchangeConfig, Feedback, GradientAverager, PeriodicAverager, PeriodicAveraging
from pqasgd_horovod.averaging.state import combine_states
from pqasgd_horovod.errors import ArgumentError, NonFiniteError
from pqasgd_horovod.exchange.carriers.threads import run_ranks

from ..codecs import cases
from .arrays import ArrayView, make_views

SHAPES = {"a": (9000, "float32"), "b": (5, "float32"), "c": (3000, "float16"), "d": (2500, "float64")}
CODEC = codecs.eden(bits=2)
STEPS = 12


def config(**options: object) -> ExchangeConfig:
    return ExchangeConfig(**{"codec": CODEC, "feedback": Feedback(), **options})  # type: ignore[arg-type]


def gradients(rank: int, step: int) -> list[ArrayView]:
    return make_views(SHAPES, seed=100 * step + rank)


def flat(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([arrays[name].astype(np.float64) for name in sorted(arrays)])


def average_gradients(carrier, steps: int, first: int = 0, state=None, **options):
    """Average gradients of some steps; return the sum of the means that arrived, and the state then."""
    averager = GradientAverager(carrier, config(**options), name="test", check_consistency=True)
    views = gradients(carrier.rank, 0)
    averager.load_state_dict(state)
    averager.prepare(views)
    total = {view.name: np.zeros(view.numel) for view in views}
    for step in range(first, first + steps):
        for view, fresh in zip(views, gradients(carrier.rank, step), strict=True):
            view.array[:] = fresh.array
        averager.finish()
        for view in views:
            total[view.name] += view.array
    return total, averager.state_dict()


def true_total(size: int, first: int, stop: int) -> dict[str, np.ndarray]:
    """Return the sum over steps of the exact means."""
    total = {name: np.zeros(numel) for name, (numel, _) in SHAPES.items()}
    for step in range(first, stop):
        for rank in range(size):
            for view in gradients(rank, step):
                total[view.name] += view.array.astype(np.float64) / size
    return total


def pending(states: list[dict]) -> dict[str, np.ndarray]:
    """Return what the mean is still to get: the mean of the ranks' residuals, and the sum of the owners'."""
    return {
        name: sum(state["residual"][name].astype(np.float64) / len(states) for state in states)
        + sum(np.float64(state["mean_residual"].get(name, 0)) for state in states)
        for name in states[0]["residual"]
    }


def relative(difference: np.ndarray, whole: np.ndarray) -> float:
    return float(np.linalg.norm(difference) / np.linalg.norm(whole))


SPARSE = [
    codecs.topk(density=0.05, block_size=1024),
    codecs.topk(density=0.1, values=codecs.eden(bits=4), block_size=512),
    codecs.randomk(density=0.1, block_size=1024),
    codecs.randomk(density=0.2, values=codecs.bf16(), block_size=512),
    codecs.threshold(1.0, density=0.1, block_size=1024),
]


@pytest.mark.parametrize("bucket_cap_mb", [8.0, 0.008])
@pytest.mark.parametrize("method", ["allgather", "two_phase"])
@pytest.mark.parametrize("codec", [CODEC, *SPARSE], ids=cases.name)
def test_all_that_was_given_has_arrived_or_is_pending(codec, method, bucket_cap_mb):
    options = {"codec": codec, "method": method, "bucket_cap_mb": bucket_cap_mb}
    results = run_ranks(3, lambda carrier: average_gradients(carrier, STEPS, **options))
    expected, rest = true_total(3, 0, STEPS), pending([state for _, state in results])
    assert set(rest) == {"a", "c", "d"}  # small tensors travel as they are
    arrived = results[0][0]
    for name, numbers in rest.items():
        # Half precision loses what the mean has beyond it; nothing remembers that.
        tolerance = 1e-3 if name == "c" else 1e-6
        assert relative(arrived[name] + numbers - expected[name], expected[name]) < tolerance, name


@pytest.mark.parametrize("method", ["allgather", "two_phase"])
def test_without_it_the_same_codec_loses_for_good(method):
    def lost(feedback: Feedback | None) -> float:
        results = run_ranks(
            3, lambda carrier: average_gradients(carrier, STEPS, method=method, codec=CODEC, feedback=feedback)
        )
        expected = true_total(3, 0, STEPS)
        return relative(results[0][0]["a"] - expected["a"], expected["a"])

    assert lost(None) > 2 * lost(Feedback())


def test_the_owner_keeps_what_the_second_coding_loses():
    """Each rank of the shard that it owns: of 14,500 compressed numbers, of which a is the first 9,000, one half."""
    results = run_ranks(
        2,
        lambda carrier: average_gradients(
            carrier, 1, method="two_phase", codec=codecs.fp16(), second_codec=codecs.eden(bits=2)
        ),
    )
    means = [state["mean_residual"]["a"] for _, state in results]
    owned = [np.flatnonzero(mean) for mean in means]
    assert [(int(part.min()), int(part.max())) for part in owned] == [(0, 8191), (8192, 8999)]


@pytest.mark.parametrize("method", ["allgather", "two_phase"])
def test_it_resumes_bit_exactly(method):
    whole = run_ranks(3, lambda carrier: average_gradients(carrier, 6, method=method))
    first = run_ranks(3, lambda carrier: average_gradients(carrier, 3, method=method))
    second = run_ranks(
        3, lambda carrier: average_gradients(carrier, 3, first=3, state=first[carrier.rank][1], method=method)
    )
    for rank in range(3):
        for kind in ("residual", "mean_residual"):
            for name, values in whole[rank][1][kind].items():
                assert values.tobytes() == second[rank][1][kind][name].tobytes(), (kind, name)


def test_other_buckets_and_shards_lose_nothing():
    """Which rank owns which part of a mean depends on how buckets are cut; what was not sent is sent all the same."""
    first = run_ranks(3, lambda carrier: average_gradients(carrier, 3, method="two_phase"))
    second = run_ranks(
        3,
        lambda carrier: average_gradients(
            carrier, 3, first=3, state=first[carrier.rank][1], method="two_phase", bucket_cap_mb=0.008
        ),
    )
    expected, rest = true_total(3, 0, 6)["a"], pending([state for _, state in second])["a"]
    assert relative(first[0][0]["a"] + second[0][0]["a"] + rest - expected, expected) < 1e-6


@pytest.mark.parametrize("new_size", [2, 5])
@pytest.mark.parametrize("method", ["allgather", "two_phase"])
def test_a_world_of_another_size_takes_over_what_was_pending(method, new_size):
    states = [state for _, state in run_ranks(3, lambda carrier: average_gradients(carrier, 3, method=method))]
    combined, before = combine_states(states), pending(states)
    for name, numbers in before.items():
        np.testing.assert_allclose(combined["residual"][name], numbers, rtol=2.0**-23)  # rounded once
    second = run_ranks(new_size, lambda carrier: average_gradients(carrier, 2, first=3, state=combined, method=method))
    rest = pending([state for _, state in second])["a"]
    expected = true_total(new_size, 3, 5)["a"] + before["a"]
    assert relative(second[0][0]["a"] + rest - expected, expected) < 1e-6


def test_states_that_cannot_be_combined():
    states = [state for _, state in run_ranks(3, lambda carrier: average_gradients(carrier, 1))]
    for wrong in ([], states[:2], [states[0], states[0], states[2]], [combine_states(states)]):
        with pytest.raises(ArgumentError, match="states"):
            combine_states(wrong)
    with pytest.raises(ArgumentError, match="steps"):
        combine_states([states[0], states[1], {**states[2], "steps": 7}])


def test_another_rank_s_residual_is_not_taken_over(caplog):
    first = run_ranks(2, lambda carrier: average_gradients(carrier, 2))

    def program(carrier):
        averager = GradientAverager(carrier, config(), name="test")
        averager.load_state_dict(first[0][1])
        averager.prepare(gradients(carrier.rank, 0))
        return averager.state_dict()["residual"]["a"]

    with caplog.at_level(logging.WARNING, "pqasgd_horovod"):
        residuals = run_ranks(2, program)
    assert residuals[0].tobytes() == first[0][1]["residual"]["a"].tobytes()
    assert not residuals[1].any()
    assert [record.getMessage() for record in caplog.records] == [
        "the residual in the saved state is that of rank 0 of 2; rank 1 of 2 begins without one. Save on every rank, "
        "and load each rank's own state, or all of them through hvd.combine_states"
    ]


def test_a_broadcast_state_leaves_every_rank_its_own_residual():
    def program(carrier):
        averager = GradientAverager(carrier, config(), name="test")
        views = gradients(carrier.rank, 0)
        averager.prepare(views)
        averager.finish()
        before = averager.state_dict()
        roots = {name: np.full_like(values, 7) for name, values in before["residual"].items()}
        averager.load_state_dict({**before, "residual": roots, "owner": [0, 2]}, keep_residuals=True)
        return before["residual"]["a"], averager.state_dict()["residual"]["a"]

    for before, after in run_ranks(2, program):
        assert before.any()
        assert before.tobytes() == after.tobytes()


@pytest.mark.parametrize("nonfinite", ["raise", "propagate"])
@pytest.mark.parametrize("method", ["allgather", "two_phase"])
def test_a_round_that_fails_leaves_the_residuals(method, nonfinite):
    """Of the buckets that failed, on every rank: what they had to send is gone with the NaN, what was kept is not."""

    def program(carrier):
        options = {"method": method, "nonfinite": nonfinite, "bucket_cap_mb": 0.02}
        averager = GradientAverager(carrier, config(**options), name="test")
        views = gradients(carrier.rank, 0)
        averager.prepare(views)
        averager.finish()
        before = averager.state_dict()
        for view in views:
            view.array[:] = 1
        if carrier.rank == 1:
            views[0].array[0] = np.nan  # in the first bucket
        try:
            averager.finish()
        except NonFiniteError:
            assert nonfinite == "raise"
        return before, averager.state_dict()

    for before, after in run_ranks(2, program):
        assert bool(before["mean_residual"]) == (method == "two_phase")
        for kind in ("residual", *(["mean_residual"] if method == "two_phase" else [])):
            failed, passed = ((before[kind][name], after[kind][name]) for name in ("a", "d"))
            assert failed[0][:100].tobytes() == failed[1][:100].tobytes()
            assert np.isfinite(failed[1]).all()
            if nonfinite == "raise":
                assert passed[0].tobytes() == passed[1].tobytes()
            elif kind == "residual":
                assert passed[0].tobytes() != passed[1].tobytes()


@pytest.mark.parametrize("method", ["allgather", "two_phase"])
def test_qsparse_local_sgd_by_hand(method):
    """Changes of a period: delta + memory is sent, and what is not sent is the memory (Basu et al., algorithm 1)."""
    shapes = {"w": (6000, "float32")}

    def program(carrier):
        averager = PeriodicAverager(
            carrier, PeriodicAveraging(period=2), config(method=method), name="test", check_consistency=True
        )
        views = make_views(shapes, seed=1)
        averager.prepare(views)
        moved = np.zeros(6000)
        for step in range(8):
            change = np.random.default_rng([carrier.rank, step]).standard_normal(6000).astype(np.float32) * 0.01
            views[0].array += change
            moved += change
            averager.count_step()
        return moved, views[0].array, averager.state_dict()

    results = run_ranks(3, program)
    start = make_views(shapes, seed=1)[0].array.astype(np.float64)
    moved = sum(moved for moved, _, _ in results) / 3
    rest = pending([state for _, _, state in results])["w"]
    assert relative(results[0][1] - start + rest - moved, moved) < 1e-4
    assert relative(rest, moved) > 1e-2  # it is not that nothing is kept


def test_expansive_quantizers_are_refused():
    with pytest.raises(ArgumentError, match=r"with compression MaxScale\(bits=3.*would grow"):
        ExchangeConfig(codecs.maxscale(bits=3), feedback=Feedback())
    with pytest.raises(ArgumentError, match=r"with second_compression TernGrad"):
        ExchangeConfig(CODEC, codecs.terngrad(), feedback=Feedback())
    with pytest.raises(ArgumentError, match="feedback is True; it must be None or"):
        ExchangeConfig(CODEC, feedback=True)  # type: ignore[arg-type]


def test_an_expansive_quantizer_s_residual_would_grow():
    """Why they are refused: the negative control, with the guard circumvented."""

    def growth(codec: codecs.Codec) -> float:
        residual = np.zeros(5120, np.float32)
        values = np.random.default_rng(1).standard_normal(5120).astype(np.float32)
        norms = []
        for step in range(60):
            _, residual = codec.encode_with_feedback(values, residual, step)
            norms.append(float(np.linalg.norm(residual) / np.linalg.norm(values)))
        return norms[-1]

    assert growth(codecs.eden(bits=2)) < 1
    assert growth(codecs.qsgd(bits=2)) > 100
