"""PowerSGD between replicas: nothing is lost, all ranks stay alike, and a saved state goes on bit-exactly."""

from __future__ import annotations

import dataclasses

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
    SlowMo,
    SparseAveraging,
)
from pqasgd_horovod.averaging.config import AS_IT_IS
from pqasgd_horovod.averaging.policy import Rule
from pqasgd_horovod.averaging.state import combine_states
from pqasgd_horovod.errors import ArgumentError, MismatchError, NonFiniteError
from pqasgd_horovod.exchange.carriers.threads import run_ranks

from .arrays import ArrayView, make_views
from .test_feedback import pending, relative

# Two matrices in float32, one that is narrower than its factors, a vector, and matrices of other types.
SHAPES = {
    "a": ((60, 40), "float32"),
    "b": ((30, 8, 5), "float32"),
    "c": ((2, 900), "float32"),
    "d": ((1500,), "float32"),
    "e": ((50, 30), "float16"),
    "f": ((40, 64), "float64"),
}
MATRICES = {"a", "b", "e", "f"}
SCHEME = codecs.powersgd(approximation_rank=2)


def flat(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([arrays[name].astype(np.float64).reshape(-1) for name in sorted(arrays)])


def config(**options: object) -> ExchangeConfig:
    return ExchangeConfig(**{"codec": SCHEME, "feedback": Feedback(), **options})  # type: ignore[arg-type]


def gradients(rank: int, step: int) -> list[ArrayView]:
    return make_views(SHAPES, seed=100 * step + rank)  # type: ignore[arg-type]


def average_gradients(carrier, steps: int, first: int = 0, state=None, **options):
    """Average gradients of some steps; return the sum of the means that arrived, the state then, and the averager."""
    averager = GradientAverager(carrier, config(**options), name="test", check_consistency=True)
    views = gradients(carrier.rank, 0)
    averager.load_state_dict(state)
    averager.prepare(views)
    total = {view.name: np.zeros(view.array.shape) for view in views}
    for step in range(first, first + steps):
        for view, fresh in zip(views, gradients(carrier.rank, step), strict=True):
            view.array[:] = fresh.array
        averager.finish()
        for view in views:
            total[view.name] += view.array
    return total, averager.state_dict(), averager.communication_stats()


@pytest.mark.parametrize("bucket_cap_mb", [8.0, 0.008])
@pytest.mark.parametrize("method", ["allgather", "two_phase"])
def test_all_that_was_given_has_arrived_or_is_pending(method, bucket_cap_mb):
    options = {"method": method, "bucket_cap_mb": bucket_cap_mb}
    results = run_ranks(3, lambda carrier: average_gradients(carrier, 6, **options))
    rest = pending([state for _, state, _ in results])
    assert set(rest) == MATRICES  # the others travel as they are
    for name in SHAPES:
        exact = sum(
            view.array.astype(np.float64) / 3
            for step in range(6)
            for rank in range(3)
            for view in gradients(rank, step)
            if view.name == name
        )
        kept = rest[name].reshape(exact.shape) if name in rest else 0
        # Half precision loses what the mean has beyond it; nothing remembers that.
        assert relative(results[0][0][name] + kept - exact, exact) < (1e-3 if name == "e" else 1e-6), name
        assert name not in rest or relative(kept, exact) > 0.1  # it is not that nothing is kept


def test_how_tensors_are_put_in_buckets_does_not_matter():
    wholes, parts = (
        run_ranks(2, lambda carrier, cap=cap: average_gradients(carrier, 3, method="allgather", bucket_cap_mb=cap))
        for cap in (8.0, 0.008)
    )
    for (whole, of_whole, _), (part, of_part, _) in zip(wholes, parts, strict=True):
        assert flat(whole).tobytes() == flat(part).tobytes()
        for kind in ("residual", "factor"):
            assert flat(of_whole[kind]).tobytes() == flat(of_part[kind]).tobytes()


def test_a_mean_of_low_rank_arrives_at_once():
    """Of the mean only: each rank's own matrix has full rank."""

    def program(carrier):
        averager = GradientAverager(carrier, config(), name="test")
        noise = np.random.default_rng(1).standard_normal((60, 40))
        u, v = np.random.default_rng(2).standard_normal((2, 60)), np.random.default_rng(3).standard_normal((2, 40))
        view = ArrayView("w", (u.T @ v + (noise if carrier.rank else -noise)).astype(np.float32))
        averager.prepare([view])
        averager.finish()
        return relative(view.array - u.T @ v, u.T @ v), averager.state_dict()["residual"]["w"]

    results = run_ranks(2, program)
    assert max(error for error, _ in results) < 1e-5
    assert all(np.linalg.norm(residual) > 40 for _, residual in results)


@pytest.mark.parametrize("method", ["allgather", "two_phase"])
def test_it_resumes_bit_exactly(method):
    whole = run_ranks(3, lambda carrier: average_gradients(carrier, 6, method=method))
    first = run_ranks(3, lambda carrier: average_gradients(carrier, 3, method=method))
    second = run_ranks(
        3, lambda carrier: average_gradients(carrier, 3, first=3, state=first[carrier.rank][1], method=method)
    )
    for rank in range(3):
        for kind in ("residual", "factor"):
            assert whole[rank][1][kind].keys() == MATRICES
            assert flat(whole[rank][1][kind]).tobytes() == flat(second[rank][1][kind]).tobytes()
            assert flat(whole[rank][1][kind]).tobytes() != flat(first[rank][1][kind]).tobytes()
        assert flat(whole[rank][1]["factor"]).tobytes() == flat(whole[0][1]["factor"]).tobytes()
    assert {name: factor.size for name, factor in whole[0][1]["factor"].items()} == {
        "a": 80,
        "b": 80,
        "e": 60,
        "f": 128,
    }


def test_a_world_of_another_size_takes_over_what_was_pending():
    states = [state for _, state, _ in run_ranks(3, lambda carrier: average_gradients(carrier, 3))]
    combined, before = combine_states(states), pending(states)
    second = run_ranks(2, lambda carrier: average_gradients(carrier, 2, first=3, state=combined))
    rest = pending([state for _, state, _ in second])["a"]
    exact = sum(gradients(rank, step)[0].array.astype(np.float64) / 2 for step in (3, 4) for rank in (0, 1))
    expected = exact.reshape(-1) + before["a"]
    assert relative(second[0][0]["a"].reshape(-1) + rest - expected, expected) < 1e-6


def test_ranks_that_start_elsewhere_are_an_error():
    state = run_ranks(2, lambda carrier: average_gradients(carrier, 2))[0][1]

    def program(carrier):
        mine = {**state, "owner": None, "factor": {name: values.copy() for name, values in state["factor"].items()}}
        if carrier.rank:
            mine["factor"]["a"][0] += 1
        average_gradients(carrier, 1, first=2, state=mine)

    errors = run_ranks(2, program, return_exceptions=True)
    assert [type(error) for error in errors] == [MismatchError] * 2
    assert str(errors[0]) == str(errors[1])
    assert "the ranks have to agree on factors.a: it is" in str(errors[0])


def test_a_factor_of_another_size_is_refused():
    state = run_ranks(2, lambda carrier: average_gradients(carrier, 1))[0][1]
    state = {**state, "owner": None, "factor": {**state["factor"], "a": np.zeros(81, np.float32)}}
    errors = run_ranks(2, lambda carrier: average_gradients(carrier, 1, state=state), return_exceptions=True)
    assert [type(error) for error in errors] == [ArgumentError] * 2
    assert "has 81 numbers, here it has 80" in str(errors[0])


@pytest.mark.parametrize("nonfinite", ["raise", "propagate"])
def test_a_round_that_fails_leaves_factors_and_residuals(nonfinite):
    def program(carrier):
        averager = GradientAverager(carrier, config(nonfinite=nonfinite, bucket_cap_mb=0.008), name="test")
        views = gradients(carrier.rank, 0)
        averager.prepare(views)
        averager.finish()
        before = averager.state_dict()
        for view, fresh in zip(views, gradients(carrier.rank, 1), strict=True):
            view.array[:] = fresh.array
        if carrier.rank == 1:
            views[0].array[3, 3] = np.nan
        try:
            averager.finish()
        except NonFiniteError:
            assert nonfinite == "raise"
        return before, averager.state_dict()

    for before, after in run_ranks(2, program):
        for kind in ("residual", "factor"):
            assert before[kind]["a"].tobytes() == after[kind]["a"].tobytes()
            assert (before[kind]["f"].tobytes() == after[kind]["f"].tobytes()) == (nonfinite == "raise")


def test_bytes_are_those_of_the_factors():
    """Two messages of a header and float32 factors, and one of what travels as it is; stock sends 4 bytes for each."""
    _, _, stats = run_ranks(2, lambda carrier: average_gradients(carrier, 3))[0]
    factors = 2 * sum(n + m for n, m in ((60, 40), (30, 40), (50, 30), (40, 64)))
    rest = 2 * 900 + 1500
    assert stats["bytes_sent"] == 3 * (4 * (factors + rest) + 3 * 64)
    assert stats["uncompressed_bytes"] == 3 * 4 * (2400 + 1200 + 1800 + 1500 + 1500 + 2560)


def test_how_a_model_is_cut():
    with_rank = dataclasses.replace(config(), codec=codecs.powersgd(approximation_rank=20))
    for name, matrix, compressed, with_more in (
        ("a", (60, 40), True, True),
        ("c", (2, 900), False, False),
        ("d", (1, 1500), False, False),
        ("f", (40, 64), True, True),
        ("e", (50, 30), True, False),
    ):
        view = next(view for view in gradients(0, 0) if view.name == name)
        assert view.matrix == matrix
        assert (config().way_for(view).codec == SCHEME) == compressed
        assert (with_rank.way_for(view).codec == with_rank.codec) == with_more
        assert config(small_tensor_threshold=view.numel + 1).way_for(view) == AS_IT_IS


def test_a_rule_gives_it_some_tensors_and_another_codec_the_rest():
    """What does not fit travels as it is; one averager with all three ways resumes, and loses nothing."""
    options = {"codec": codecs.topk(density=0.1), "policy": (Rule("[abc]", SCHEME),), "method": "allgather"}
    ways = {view.name: config(**options).way_for(view).codec.id for view in gradients(0, 0)}
    assert ways == {"a": "powersgd", "b": "powersgd", "c": "none", "d": "topk", "e": "topk", "f": "topk"}
    results = run_ranks(2, lambda carrier: average_gradients(carrier, 4, **options))
    rest = pending([state for _, state, _ in results])
    for name in ("a", "d"):
        exact = sum(
            view.array.astype(np.float64) / 2
            for step in range(4)
            for rank in range(2)
            for view in gradients(rank, step)
            if view.name == name
        )
        assert relative(results[0][0][name] + rest[name].reshape(exact.shape) - exact, exact) < 1e-6
    first = run_ranks(2, lambda carrier: average_gradients(carrier, 2, **options))
    second = run_ranks(
        2, lambda carrier: average_gradients(carrier, 2, first=2, state=first[carrier.rank][1], **options)
    )
    for kind in ("residual", "factor"):
        assert flat(results[0][1][kind]).tobytes() == flat(second[0][1][kind]).tobytes()


def test_with_momentum_correction_velocities_are_what_arrives_or_is_pending():
    """After s steps a gradient of step t has arrived, or is pending, 1 + m + .. + m^(s-1-t) times."""
    feedback = MomentumCorrection(momentum=0.5)
    results = run_ranks(2, lambda carrier: average_gradients(carrier, 4, feedback=feedback))
    rest = pending([state for _, state, _ in results])
    for name in MATRICES - {"e"}:
        exact = sum(
            (2 - 0.5 ** (3 - step)) * view.array.astype(np.float64) / 2
            for step in range(4)
            for rank in range(2)
            for view in gradients(rank, step)
            if view.name == name
        )
        assert relative(results[0][0][name] + rest[name].reshape(exact.shape) - exact, exact) < 1e-6
        assert relative(rest[name], exact) > 0.1


@pytest.mark.parametrize(
    ("outer", "delay"),
    [(None, 0), (SlowMo(beta=0.5), 0), (None, 1)],
    ids=["replace", "slowmo", "delayed"],
)
@pytest.mark.parametrize("method", ["allgather", "two_phase"])
def test_changes_of_a_period(method, outer, delay):
    """Parameters are what was moved, on average, minus what is pending; and training resumes bit-exactly."""
    shapes = {"w": ((70, 50), "float32"), "v": ((40, 30), "float64"), "b": ((30,), "float32")}
    averaging = PeriodicAveraging(period=2, delay=delay, **({} if outer is None else {"outer": outer}))

    def program(carrier, steps, state=None, start=None):
        averager = PeriodicAverager(carrier, averaging, config(method=method), name="test", check_consistency=True)
        views = make_views(shapes, seed=1) if start is None else [ArrayView(n, a.copy()) for n, a in start.items()]
        averager.load_state_dict(state)
        averager.prepare(views)
        moved = {view.name: np.zeros(view.array.shape) for view in views}
        for step in steps:
            for i, view in enumerate(views):
                change = 0.01 * np.random.default_rng([carrier.rank, step, i]).standard_normal(view.array.shape)
                change = change.astype(np.float32)
                view.array += change
                moved[view.name] += change
            averager.count_step(0.1)
        if delay:
            averager.flush()
        return moved, {view.name: view.array for view in views}, averager.state_dict()

    whole = run_ranks(3, lambda carrier: program(carrier, range(8)))
    if outer is None:
        rest = pending([state for _, _, state in whole])
        for view in make_views(shapes, seed=1)[:2]:
            moved = sum(result[0][view.name] for result in whole) / 3
            arrived = whole[0][1][view.name] - view.array.astype(np.float64)
            assert relative(arrived + rest[view.name].reshape(moved.shape) - moved, moved) < 1e-4
            assert relative(rest[view.name], moved) > 0.1
    if delay:
        return  # a flush between is an average more
    first = run_ranks(3, lambda carrier: program(carrier, range(4)))
    second = run_ranks(3, lambda carrier: program(carrier, range(4, 8), first[carrier.rank][2], first[carrier.rank][1]))
    for one, other in zip(whole, second, strict=True):
        assert flat(one[1]).tobytes() == flat(other[1]).tobytes()
        for kind in ("anchor", "momentum", "residual", "factor"):
            assert (
                flat(one[2][kind]).tobytes() == flat(other[2][kind]).tobytes() if one[2][kind] else not other[2][kind]
            )


def test_what_is_refused():
    with pytest.raises(ArgumentError, match=r"feedback is None with compression PowerSgd\(approximation_rank=2\)"):
        ExchangeConfig(SCHEME)
    with pytest.raises(ArgumentError, match=r"second_compression is Eden.*with compression=PowerSgd.*leave"):
        config(second_codec=codecs.eden(bits=8))
    with pytest.raises(ArgumentError, match=r"compression is PowerSgd.*needs whole matrices"):
        PeriodicAverager(None, SparseAveraging(period=4), config(), name="test")
    with pytest.raises(ArgumentError, match=r"hierarchy is 'node' with compression=PowerSgd"):
        config(hierarchy="node")
    with pytest.raises(ArgumentError, match="exchange is 'ring'"):
        config(method="ring")
