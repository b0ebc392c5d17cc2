"""Averages that are applied some steps after they began."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest

from pqasgd_horovod import codecs
from pqasgd_horovod.averaging import (
    AdaptivePeriod,
    ExchangeConfig,
    Feedback,
    GrowingPeriod,
    Nesterov,
    PeriodicAverager,
    PeriodicAveraging,
    PostLocal,
    Rotation,
    SlowMo,
)
from pqasgd_horovod.averaging.background import Background
from pqasgd_horovod.averaging.outer import outer_step
from pqasgd_horovod.errors import (
    ArgumentError,
    CollectiveTimeoutError,
    DesynchronizedError,
    MismatchError,
    NonFiniteError,
)
from pqasgd_horovod.exchange.carriers.threads import run_ranks
from pqasgd_horovod.keys import derive_key

from .arrays import ArrayView, decoded_mean, make_views
from .late import LateCarrier
from .test_periodic import SHAPES, move

LARGE = {"w": (5000, "float32"), "h": (3000, "float16")}


def make_averager(carrier, period=4, delay=2, outer=None, selection=None, check_consistency=True, **options):
    chosen = {} if outer is None else {"outer": outer}
    chosen |= {} if selection is None else {"selection": selection}
    averaging = PeriodicAveraging(period, delay=delay, **chosen)
    config = ExchangeConfig(**{"codec": codecs.maxscale(bits=4), **options})
    return PeriodicAverager(carrier, averaging, config, name="test", check_consistency=check_consistency)


def arrays(views: list[ArrayView]) -> dict[str, np.ndarray]:
    return {view.name: view.array.copy() for view in views}


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


def by_hand(size, steps, *, period, delay, config, outer=None):
    """The replicas of all ranks after each step: what is compressed of LARGE."""
    dtypes = [(name, count, np.dtype(dtype)) for name, (count, dtype) in LARGE.items()]
    replicas = [make_views(LARGE, seed=1) for _ in range(size)]
    flat = lambda views: np.concatenate([view.array.astype(np.float32) for view in views])  # noqa: E731
    anchor, snapshots, history = flat(replicas[0]), [], []
    momentum = np.zeros_like(anchor)
    for step in range(1, steps + 1):
        for rank, views in enumerate(replicas):
            move(views, rank, step - 1)
        if step % period == 0:
            snapshots = [flat(views) for views in replicas]
        if snapshots and step % period == delay % period:
            keys = [derive_key(0, rank, step - delay, 0, 0) for rank in range(size)]
            mean = decoded_mean(snapshots, anchor, config, keys)
            if outer is not None:
                outer_step(outer.coefficients(1.0), momentum, mean)
            anchor = anchor + mean
            for views, snapshot in zip(replicas, snapshots, strict=True):
                moved, start = anchor + (flat(views) - snapshot), 0
                for view, (_, count, dtype) in zip(views, dtypes, strict=True):
                    view.array[:] = moved[start : start + count].astype(dtype)
                    start += count
        history.append([arrays(views) for views in replicas])
    return history


CODECS = [codecs.none(), codecs.bf16(), codecs.maxscale(bits=4), codecs.eden(bits=2), codecs.topk(0.1)]


def history_of(carrier, steps, **options):
    averager = make_averager(carrier, method="allgather", **options)
    views = make_views(LARGE, seed=1)
    averager.prepare(views)
    history = []
    for step in range(steps):
        move(views, carrier.rank, step)
        averager.count_step(0.1)
        history.append(arrays(views))
    return history


@pytest.mark.parametrize("outer", [None, SlowMo(0.5, 0.7), Nesterov(0.7, 0.9)], ids=str)
@pytest.mark.parametrize("delay", [1, 3])
def test_it_is_the_recursion_to_the_bit(delay, outer):
    for codec in CODECS if outer is None else CODECS[2:3]:
        config = ExchangeConfig(codec, method="allgather")
        wanted = by_hand(3, 13, period=4, delay=delay, config=config, outer=outer)
        histories = run_ranks(3, lambda c, q=codec: history_of(c, 13, codec=q, delay=delay, outer=outer))
        for step in range(13):
            for rank in range(3):
                assert_equal(histories[rank][step], wanted[step][rank])


@pytest.mark.parametrize("other", [1, 3])
def test_the_recursion_would_notice_another_delay(other):
    config = ExchangeConfig(CODECS[2], method="allgather")
    right, wrong = (by_hand(2, 9, period=4, delay=delay, config=config) for delay in (2, other))
    assert not np.array_equal(right[8][0]["w"], wrong[8][0]["w"])


def test_float64_keeps_all_its_bits():
    """Local progress is not rounded to float32 on its way to the new anchor."""

    def program(carrier):
        averager = make_averager(carrier, codec=codecs.none(), delay=1)
        views = make_views({"d": (2500, "float64")}, seed=1)
        averager.prepare(views)
        before = views[0].array.copy()
        for step in range(5):
            views[0].array += 1e-12 * (step == 4)  # after the snapshot; less than float32 has digits for
            averager.count_step()
        return before, views[0].array

    for before, after in run_ranks(2, program):
        np.testing.assert_array_equal(after, before + ((before + 1e-12) - before))


def train(carrier, steps=14, flush_after=None, **options):
    """Train; return everything that could depend on timing."""
    averager = make_averager(carrier, bucket_cap_mb=0.01, **options)
    views = make_views(SHAPES, seed=1)
    buffer = ArrayView("running", np.ones(40, np.float32))
    averager.prepare(views, [buffer])
    seen = []
    for step in range(steps):
        move([*views, buffer], carrier.rank, step)
        averager.count_step(0.1)
        seen.append((arrays([*views, buffer]), averager.rounds, averager.communication_stats()["bytes_sent"]))
        if step == flush_after:
            averager.flush(20.0)
    averager.flush(20.0)
    seen.append((arrays([*views, buffer]), averager.rounds, averager.communication_stats()["bytes_sent"]))
    return seen, averager.state_dict()


VARIANTS = {
    "allgather": {"method": "allgather"},
    "two_phase": {"method": "two_phase"},
    "long": {"method": "two_phase", "delay": 3, "codec": codecs.eden(bits=2)},
    "feedback": {"method": "two_phase", "codec": codecs.topk(0.1), "feedback": Feedback()},
    "slowmo": {"method": "two_phase", "outer": SlowMo(0.5, 0.7)},
    "streaming": {"outer": Nesterov(0.7, 0.9), "selection": Rotation(3), "codec": codecs.eden(bits=4), "delay": 1},
    "blocks": {"selection": Rotation(2, 1024), "method": "two_phase"},
    "growing": {"period": GrowingPeriod(3, 6, 4)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_do_not_depend_on_timing(variant):
    """Messages that come at once, or late, or each at another time: the same bits after every step."""
    options = VARIANTS[variant]
    late = []

    def slow(carrier, seed, longest):
        times = random.Random(f"{seed} {carrier.rank}")

        def arrived(name, since):
            if since < longest * times.random() ** 3:
                late.append(name)
                return False
            return True

        return train(LateCarrier(carrier, arrived), **options)

    prompt = run_ranks(3, lambda carrier: train(carrier, **options))
    for seed, longest in ((1, 0.01), (2, 0.05)):
        for (seen, state), (seen_late, state_late) in zip(
            prompt, run_ranks(3, lambda c, s=seed, t=longest: slow(c, s, t)), strict=True
        ):
            for (one, rounds, sent), (other, rounds_late, sent_late) in zip(seen, seen_late, strict=True):
                assert_equal(one, other)
                assert (rounds, sent) == (rounds_late, sent_late)
            for kind in ("anchor", "momentum", "residual", "mean_residual"):
                assert_equal(state[kind], state_late[kind])
    assert {"test.meeting", "test.0.b0.p1"} <= set(late)
    final = [seen[-1][0] for seen, _ in prompt]
    for other in final[1:]:
        assert_equal(final[0], other)
    assert not np.array_equal(prompt[0][0][-2][0]["w"], prompt[1][0][-2][0]["w"])  # before the flush


@pytest.mark.parametrize("method", ["allgather", "two_phase"])
def test_steps_go_on_while_messages_are_on_their_way(method):
    """No message arrives before every rank has come to the step that applies the average."""
    prepared = [False, False]
    last_step = threading.Barrier(2, timeout=20.0)
    let_through = threading.Event()

    def program(carrier):
        late = LateCarrier(carrier, lambda name, since: not prepared[carrier.rank] or let_through.is_set())
        averager = make_averager(late, method=method, check_consistency=False)
        views = make_views(SHAPES, seed=1)
        averager.prepare(views)
        prepared[carrier.rank] = True
        for step in range(6):
            move(views, carrier.rank, step)
            if step == 5:
                assert averager._pending is not None
                last_step.wait()
                let_through.set()
            averager.count_step()
            assert averager.rounds == (step == 5)
        return True

    assert run_ranks(2, program, timeout=30.0) == [True, True]


@pytest.mark.parametrize("variant", ["two_phase", "feedback", "slowmo"])
def test_a_flush_right_at_the_snapshot_is_an_average_without_delay(variant):
    def program(carrier, delay):
        averager = make_averager(carrier, **{**VARIANTS[variant], "delay": delay})
        views = make_views(SHAPES, seed=1)
        averager.prepare(views)
        for step in range(12):
            move(views, carrier.rank, step)
            averager.count_step(0.1)
            if step % 4 == 3:
                averager.flush()
        return arrays(views), averager.state_dict()

    plain, delayed = (run_ranks(2, lambda carrier, d=delay: program(carrier, d)) for delay in (0, 3))
    for (one, state), (other, delayed_state) in zip(plain, delayed, strict=True):
        assert_equal(one, other)
        for kind in ("anchor", "momentum", "residual", "mean_residual"):
            assert_equal(state[kind], delayed_state[kind])
        assert state["rounds"] == delayed_state["rounds"] == 3
    assert bool(plain[0][1]["residual"]) == (variant == "feedback")


def test_the_local_progress_is_averaged_too():
    """Without loss nothing that any rank did is lost: the mean of the replicas is that of ranks that never talked."""
    final = run_ranks(3, lambda carrier: train(carrier, codec=codecs.none()))[0][0][-1][0]["w"]
    alone = [make_views(SHAPES, seed=1) for _ in range(3)]
    for rank, views in enumerate(alone):
        for step in range(14):
            move([*views, ArrayView("running", np.ones(40, np.float32))], rank, step)
    np.testing.assert_allclose(final, np.mean([views[0].array for views in alone], axis=0), rtol=0, atol=2e-6)


@pytest.mark.parametrize("where", ["w", "b", "d"])
def test_nan_is_the_same_error_at_the_same_step_and_nothing_is_lost(where):
    def program(carrier):
        averager = make_averager(carrier, codec=codecs.none())
        views = make_views(SHAPES, seed=0)
        by_name = {view.name: view for view in views}
        averager.prepare(views)
        errors = []
        for step in range(9):
            move(views, carrier.rank, step)
            good = by_name[where].array[3]
            if step == 3 and carrier.rank == 1:
                by_name[where].array[3] = np.nan
            before = arrays(views)
            try:
                averager.count_step()
            except NonFiniteError as error:
                errors.append((step, str(error)))
                assert_equal(before, arrays(views))
            if step == 3:
                by_name[where].array[3] = good
            anchor = averager._arrays()["anchor"]["w"]
            assert np.array_equal(anchor, make_views(SHAPES, seed=0)[0].array) == (step < 8)
        averager.flush()
        return errors, averager.rounds, arrays(views)

    (errors, rounds, first), (errors1, rounds1, second) = run_ranks(2, program)
    assert errors == errors1
    assert [step for step, _ in errors] == [5]
    assert "rank 1" in errors[0][1]
    assert rounds == rounds1 == 2  # begun again after step 6, applied two steps later
    assert_equal(first, second)
    expected = [make_views(SHAPES, seed=0) for _ in range(2)]
    for rank, views in enumerate(expected):
        for step in range(9):
            move(views, rank, step)
    np.testing.assert_allclose(first["w"], (expected[0][0].array + expected[1][0].array) / 2, rtol=0, atol=2e-6)


def test_an_error_under_way_is_what_a_flush_raises_and_the_next_flush_works():
    def program(carrier):
        averager = make_averager(carrier)
        views = make_views(SHAPES, seed=0)
        averager.prepare(views)
        for step in range(5):
            move(views, carrier.rank, step)
            good = views[0].array[0]
            if step == 3 and carrier.rank == 1:
                views[0].array[0] = np.inf
            averager.count_step()
            views[0].array[0] = good
        with pytest.raises(NonFiniteError) as caught:
            averager.flush()
        averager.flush()
        return str(caught.value), arrays(views), averager.rounds

    (text, one, rounds), (text1, other, rounds1) = run_ranks(2, program)
    assert text == text1
    assert rounds == rounds1 == 1
    assert_equal(one, other)


def test_a_flush_alone_of_an_average_that_failed_does_not_wait_for_the_others():
    def program(carrier):
        averager = make_averager(carrier)
        views = make_views(SHAPES, seed=0)
        averager.prepare(views)
        views[0].array[0] = np.nan
        for _ in range(5):
            averager.count_step()
        with pytest.raises(NonFiniteError):
            (averager.flush if carrier.rank == 0 else averager.count_step)()
        return True

    assert run_ranks(2, program, timeout=20.0) == [True, True]


@pytest.mark.parametrize("period", [3, GrowingPeriod(3, 6, 4)], ids=str)
def test_averages_begin_after_the_same_steps_whatever_the_delay(period):
    def program(carrier, delay):
        averager, begun = make_averager(carrier, period, delay), []
        views = make_views(LARGE, seed=1)
        averager.prepare(views)
        for step in range(1, 25):
            averager.count_step()
            if averager._steps_since_round == 0:
                begun.append(step)
        return begun, averager.rounds

    (plain, rounds), *others = (run_ranks(2, lambda carrier, d=delay: program(carrier, d))[0] for delay in (0, 1, 2))
    assert plain == ([3, 6, 9, 12, 15, 18, 21, 24] if period == 3 else [3, 6, 12, 18, 24])
    assert others == [(plain, rounds - 1)] * 2  # the last one is under way


def test_the_outer_step_is_at_the_learning_rate_of_the_snapshot():
    def program(carrier, other_rate):
        averager = make_averager(carrier, outer=SlowMo(0.5, 0.7))
        views = make_views(LARGE, seed=1)
        averager.prepare(views)
        for step in range(1, 15):
            move(views, carrier.rank, step)
            averager.count_step(0.1 if step % 4 == 0 else other_rate)
        return arrays(views)

    constant, changing = (run_ranks(2, lambda carrier, r=rate: program(carrier, r)) for rate in (0.1, 0.3))
    for one, other in zip(constant, changing, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("steps", [2, 4, 5], ids=["before", "at the snapshot", "in the window"])
def test_a_rank_that_flushes_alone_is_an_error_on_all(steps):
    def program(carrier):
        averager = make_averager(carrier, check_consistency=False)
        views = make_views(SHAPES, seed=0)
        averager.prepare(views)
        with pytest.raises(DesynchronizedError) as caught:  # noqa: PT012
            for step in range(13):
                if step == steps and carrier.rank == 0:
                    averager.flush()
                move(views, carrier.rank, step)
                averager.count_step()
        return str(caught.value), averager.steps

    results = run_ranks(3, program)
    assert len({text for text, _ in results}) == 1
    assert f"flushing after {steps} steps" in results[0][0]
    # The others hear of it where they apply the average in which they meet.
    assert [steps for _, steps in results[1:]] == [6 if steps < 4 else 10] * 2


def test_a_flush_that_was_given_up_changes_nothing():
    given_up = threading.Event()

    def program(carrier, gives_up):
        averager = make_averager(carrier)
        views = make_views(SHAPES, seed=0)
        averager.prepare(views)
        for step in range(11):
            if step == 5 and gives_up:
                if carrier.rank == 0:
                    before = arrays(views)
                    with pytest.raises(CollectiveTimeoutError, match="5 steps were made"):
                        averager.flush(timeout=0.2)
                    assert_equal(before, arrays(views))
                    given_up.set()
                assert given_up.wait(20.0)
            move(views, carrier.rank, step)
            averager.count_step()
        averager.flush(20.0)
        return arrays(views), averager.rounds

    calm, disturbed = (run_ranks(2, lambda carrier, g=gives_up: program(carrier, g)) for gives_up in (False, True))
    for (one, rounds), (other, rounds1) in zip(calm, disturbed, strict=True):
        assert_equal(one, other)
        assert rounds == rounds1 == 3


def test_new_tensors_in_the_window_wait_for_the_average_under_way():
    def program(carrier):
        averager = make_averager(carrier, codec=codecs.none())
        first, second = make_views({"w": (2000, "float32")}, seed=0), make_views({"v": (1500, "float32")}, seed=1)
        averager.prepare(first)
        for step in range(5):
            move(first, carrier.rank, step)
            averager.count_step()
        assert averager.rounds == 0
        averager.prepare(first + second)
        assert averager.rounds == 1
        for step in range(5, 9):
            move(first + second, carrier.rank, step)
            averager.count_step()
        averager.flush()
        return arrays(first + second), averager.communication_stats()["bytes_sent"]

    results = run_ranks(2, program)
    assert_equal(results[0][0], results[1][0])
    # Three rounds: of w, then of both twice, at the next snapshot and in the flush.
    assert results[0][1] == (64 + 4 * 2000) + 2 * (64 + 4 * 3500)


def test_a_rank_that_lays_out_alone_is_an_error_on_all():
    def program(carrier):
        averager = make_averager(carrier)
        views = make_views(LARGE, seed=0)
        averager.prepare(views)
        with pytest.raises(DesynchronizedError) as caught:  # noqa: PT012
            for step in range(13):
                if step == 5 and carrier.rank == 1:
                    averager.prepare([*views, *make_views({"v": (1500, "float32")}, seed=1)])
                move(views, carrier.rank, step)
                averager.count_step()
        return str(caught.value)

    texts = run_ranks(2, program)
    assert texts[0] == texts[1]
    assert "laying out its tensors after 5 steps and 1 averages" in texts[0]
    assert "averaging after 8 steps and 1 averages" in texts[0]


def test_a_rank_with_another_number_of_steps_is_an_error_on_all():
    def program(carrier):
        averager = make_averager(carrier)
        averager.prepare(make_views(SHAPES, seed=0))
        for _ in range(3):
            averager.count_step()
        averager.steps += carrier.rank  # as if a step had been counted on rank 1 only
        averager.count_step()
        averager.count_step()
        with pytest.raises(DesynchronizedError, match="step is 4 on rank 0; 5 on rank 1"):
            averager.count_step()
        return averager.rounds

    assert run_ranks(2, program) == [0, 0]


def test_resuming_from_a_state_is_bit_exact():
    def program(carrier, resume):
        options = {"outer": SlowMo(0.5, 0.7), "codec": codecs.topk(0.1), "feedback": Feedback(), "method": "two_phase"}
        averager = make_averager(carrier, **options)
        views = make_views(SHAPES, seed=0)
        averager.prepare(views)
        for step in range(12):
            if step == 5:  # in the window
                averager.flush()
                state = averager.state_dict()
                if resume:
                    averager = make_averager(carrier, **options)
                    averager.load_state_dict(state)
                    averager.prepare(views)
            move(views, carrier.rank, step)
            averager.count_step(0.1)
        averager.flush()
        return arrays(views), averager.steps, averager.rounds

    straight, resumed = (run_ranks(2, lambda carrier, r=resume: program(carrier, r)) for resume in (False, True))
    for (one, *counts), (other, *counts1) in zip(straight, resumed, strict=True):
        assert_equal(one, other)
        assert counts == counts1 == [12, 4]


def test_a_state_may_be_loaded_in_the_window():
    def program(carrier):
        averager = make_averager(carrier)
        views = make_views(SHAPES, seed=0)
        averager.prepare(views)
        state = averager.state_dict()
        results = []
        for attempt in range(2):
            for step in range(5 if attempt == 0 else 9):
                move(views, carrier.rank, step)
                averager.count_step()
                if step == 3 and attempt == 0:
                    with pytest.raises(ArgumentError, match="call flush"):
                        averager.state_dict()
            if attempt == 0:
                averager.load_state_dict(state)
                for view, fresh in zip(views, make_views(SHAPES, seed=0), strict=True):
                    view.array[:] = fresh.array
                averager.prepare(views)
        averager.flush()
        results.append(arrays(views))
        return results[0], averager.rounds

    (one, rounds), (other, _) = run_ranks(2, program)
    assert_equal(one, other)
    assert rounds == 3


def test_buffers_become_the_mean_of_the_snapshots():
    """Their progress since is dropped: added to the mean it could make a variance negative, as here."""

    def program(carrier):
        averager = make_averager(carrier, codec=codecs.none(), period=3, delay=2)
        views = make_views({"w": (2000, "float32")}, seed=1)
        variance = ArrayView("running_var", np.full(5, 1.0, np.float32))
        averager.prepare(views, [variance])
        seen = []
        for value in (3.0, 5.0, 8.0, 2.0, 1.0, 1.0, 6.0, 7.0):
            variance.array[:] = value if carrier.rank == 0 else 0.0
            averager.count_step()
            seen.append(float(variance.array[0]))
        averager.flush()
        return seen, float(variance.array[0])

    (seen, last), (seen1, last1) = run_ranks(2, program)
    assert seen == [3.0, 5.0, 8.0, 2.0, 4.0, 1.0, 6.0, 0.5]
    assert seen1 == [0.0, 0.0, 0.0, 0.0, 4.0, 0.0, 0.0, 0.5]
    assert last == last1 == 0.5


def test_a_tensor_that_changed_its_type_is_refused_and_nothing_is_lost():
    def program(carrier):
        averager = make_averager(carrier)
        views = make_views(LARGE, seed=0)
        averager.prepare(views)
        for step in range(5):
            move(views, carrier.rank, step)
            averager.count_step()
        kept, views[1].array = views[1].array, views[1].array.astype(np.float32)
        with pytest.raises(ArgumentError, match="h was float16"):
            averager.count_step()
        views[1].array = kept
        averager.count_step()
        return averager.rounds

    assert run_ranks(2, program) == [1, 1]


def test_a_rank_alone_keeps_its_own_values_to_the_bit():
    averager = make_averager(None)
    views, untouched = make_views(SHAPES, seed=0), make_views(SHAPES, seed=0)
    averager.prepare(views)
    for step in range(9):
        move(views, 0, step)
        move(untouched, 0, step)
        averager.count_step()
    averager.flush()
    assert_equal(arrays(views), arrays(untouched))
    assert averager.rounds == 3


def test_the_consistency_check_sees_anchors_that_differ():
    def program(carrier):
        averager = make_averager(carrier)
        views = make_views(SHAPES, seed=0)
        averager.prepare(views)
        for step in range(5):
            move(views, carrier.rank, step)
            averager.count_step()
        averager._pending.exchange.wait()
        if carrier.rank == 1:
            next(iter(averager._channels))._arriving[17:18].view(np.uint32)[0] ^= 1
        averager.count_step()

    errors = run_ranks(2, program, return_exceptions=True)
    assert [type(error) for error in errors] == [MismatchError] * 2


def test_what_a_thread_raises_is_raised_where_it_is_asked_for():
    def fail():
        raise KeyError("x")

    background = Background(fail)
    background.wait()
    for _ in range(2):
        with pytest.raises(KeyError, match="x"):
            background.result()
    never = threading.Event()
    with pytest.raises(CollectiveTimeoutError, match=r"within 0\.01 s"):
        Background(never.wait).wait(0.01)
    never.set()


@pytest.mark.parametrize(
    ("period", "delay", "text"),
    [
        (8, -1, "delay is -1"),
        (8, 1.5, r"delay is 1\.5"),
        (8, 8, "delay is 8; it must be below the fewest steps between two averages, which with period=8 are 8"),
        (1, 1, "with period=1 are 1"),
        (PostLocal(8, 100), 1, r"with period=PostLocal\(period=8, first_steps=100\) are 1"),
        (PostLocal(8), 1, "are 1"),
        (AdaptivePeriod(first=4), 2, r"with period=AdaptivePeriod\(.*\) are 1"),
        (GrowingPeriod(first=3, last=16), 3, "are 3"),
    ],
)
def test_delays_that_are_not_allowed(period, delay, text):
    with pytest.raises(ArgumentError, match=text):
        PeriodicAveraging(period, delay=delay)


@pytest.mark.parametrize("moments", ["average", "reset"])
def test_moments_that_go_on_meanwhile_are_not_averaged(moments):
    with pytest.raises(ArgumentError, match=rf"delay is 2 with moments='{moments}'; moments go on"):
        PeriodicAveraging(8, moments=moments, delay=2)


@pytest.mark.parametrize(("period", "delay"), [(8, 7), (GrowingPeriod(first=3), 2), (PostLocal(8, 0), 7), (1, 0)])
def test_delays_that_are(period, delay):
    averaging = PeriodicAveraging(period, delay=delay)
    assert PeriodicAveraging.from_config(averaging.config()) == averaging
