"""PQASGD on arrays, many ranks in one process."""

from __future__ import annotations

import logging
import threading

import numpy as np
import pytest

from pqasgd_horovod import codecs
from pqasgd_horovod.averaging import ExchangeConfig, PeriodicAverager, PeriodicAveraging, SparseAveraging
from pqasgd_horovod.errors import (
    ArgumentError,
    CollectiveTimeoutError,
    DesynchronizedError,
    MismatchError,
    NonFiniteError,
)
from pqasgd_horovod.exchange.carriers.threads import ThreadCarrier, run_ranks
from pqasgd_horovod.keys import derive_key
from tests.averaging.arrays import ArrayView, decoded_mean, make_views

SHAPES = {
    "w": (5000, "float32"),
    "b": (7, "float32"),
    "h": (3000, "float16"),
    "d": (2500, "float64"),
    "e": (0, "float32"),
}
CODECS = [codecs.none(), codecs.fp16(), codecs.bf16(), codecs.maxscale(bits=4), codecs.eden(bits=2), codecs.terngrad()]


def make_averager(carrier: ThreadCarrier | None, period: int = 2, **options: object) -> PeriodicAverager:
    config = ExchangeConfig(**{"codec": codecs.maxscale(bits=4), **options})  # type: ignore[arg-type]
    return PeriodicAverager(carrier, PeriodicAveraging(period=period), config, name="test", check_consistency=True)


def move(views: list[ArrayView], rank: int, step: int, scale: float = 0.01) -> None:
    """A local update, different on every rank."""
    generator = np.random.default_rng([rank, step])
    for view in views:
        view.array += (scale * generator.standard_normal(view.numel)).astype(view.array.dtype)


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("size", [2, 3])
def test_new_anchor_is_anchor_plus_mean_of_decoded_deltas(codec, size):
    config = ExchangeConfig(codec, method="allgather", small_tensor_threshold=1024)

    def program(carrier):
        averager = make_averager(carrier, codec=codec, method="allgather")
        views = make_views(SHAPES, seed=1)
        before = {view.name: view.array.copy() for view in views}
        averager.prepare(views)
        for step in (0, 1):
            move(views, carrier.rank, step)
            local = {view.name: view.array.copy() for view in views}
            averager.count_step()
        return before, local, {view.name: view.array for view in views}, averager.state_dict()["anchor"]

    results = run_ranks(size, program)
    before = results[0][0]
    locals_ = [result[1] for result in results]
    # Channel 0: float32 anchors, compressed; 1: small tensors, as they are; 2: float64 anchors.
    for index, names, compressed in ((0, ("w", "h"), True), (1, ("b", "e"), False), (2, ("d",), True)):
        wide = np.float64 if "d" in names else np.float32
        anchor = np.concatenate([before[name].astype(wide) for name in names])
        changed = [np.concatenate([local[name].astype(wide) for name in names]) for local in locals_]
        keys = [derive_key(index, rank, 2, 0, 0) for rank in range(size)]
        mean = decoded_mean(changed, anchor, config if compressed else ExchangeConfig(codecs.none()), keys)
        expected = anchor + mean
        start = 0
        for name in names:
            part = expected[start : start + before[name].size]
            start += before[name].size
            for rank, (_, _, after, anchors) in enumerate(results):
                np.testing.assert_array_equal(anchors[name], part, err_msg=f"anchor of {name} on rank {rank}")
                np.testing.assert_array_equal(
                    after[name], part.astype(before[name].dtype), err_msg=f"{name}, rank {rank}"
                )


def test_the_identity_would_notice_another_key_or_order():
    """The check above compares bits: another key must break it."""
    config = ExchangeConfig(codecs.maxscale(bits=4))
    values = [np.random.default_rng(rank).standard_normal(2000).astype(np.float32) for rank in (0, 1)]
    right = decoded_mean(values, None, config, [derive_key(0, rank, 2, 0, 0) for rank in (0, 1)])
    assert not np.array_equal(
        right, decoded_mean(values, None, config, [derive_key(0, rank, 3, 0, 0) for rank in (0, 1)])
    )


def test_without_loss_it_is_local_sgd_computed_by_hand():
    def program(carrier):
        averager = make_averager(carrier, period=3, codec=codecs.none())
        views = make_views({"w": (3000, "float32")}, seed=1)
        averager.prepare(views)
        for step in range(7):
            move(views, carrier.rank, step)
            averager.count_step()
        averager.flush()
        return views[0].array, averager.rounds

    results = run_ranks(2, program)
    replicas = [make_views({"w": (3000, "float32")}, seed=1) for _ in range(2)]
    for step in range(7):
        for rank in range(2):
            move(replicas[rank], rank, step)
        if step in (2, 5, 6):
            mean = (replicas[0][0].array.astype(np.float64) + replicas[1][0].array) / 2
            for replica in replicas:
                replica[0].array[:] = mean
    assert [rounds for _, rounds in results] == [3, 3]
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_allclose(results[0][0], replicas[0][0].array, rtol=0, atol=1e-6)


def test_buffers_become_the_mean_of_their_values():
    def program(carrier):
        averager = make_averager(carrier, period=1)
        views = make_views({"w": (2000, "float32")}, seed=1)
        buffer = ArrayView("running", np.full(5, 10.0 * carrier.rank, np.float32))  # not the same at the start
        averager.prepare(views, [buffer])
        seen = []
        for value in (1.0, 5.0):
            buffer.array[:] = value + carrier.rank
            averager.count_step()
            seen.append(buffer.array.copy())
        return seen, list(averager.state_dict()["anchor"])

    for seen, anchor in run_ranks(2, program):
        np.testing.assert_array_equal(seen, [np.full(5, 1.5), np.full(5, 5.5)])
        assert anchor == ["w"]


def test_the_mean_of_a_buffer_does_not_depend_on_what_it_was_before():
    """To the bit: the earlier mean is not saved, so a resumed run would differ otherwise."""

    def program(carrier, rounds):
        averager = make_averager(carrier, period=1)
        views = make_views({"w": (2000, "float32")}, seed=1)
        buffer = ArrayView("running", np.zeros(1000, np.float32))
        averager.prepare(views, [buffer])
        for round_ in rounds:
            buffer.array[:] = np.random.default_rng([round_, carrier.rank]).lognormal(0, 4, 1000)
            averager.count_step()
        return buffer.array

    long, short = (run_ranks(2, lambda carrier, r=rounds: program(carrier, r)) for rounds in ((0, 1, 2), (2,)))
    np.testing.assert_array_equal(long, short)


def test_halves_are_averaged_in_float32_and_rounded_once():
    def program(carrier):
        averager = make_averager(carrier, period=1, codec=codecs.none())
        view = ArrayView("h", np.ones(2000, np.float16))
        averager.prepare([view])
        if carrier.rank == 0:
            view.array += np.float16(2**-10)  # the smallest step above 1
        averager.count_step()
        return view.array, averager.state_dict()["anchor"]["h"]

    for array, anchor in run_ranks(4, program):
        np.testing.assert_array_equal(anchor, np.float32(1 + 2**-12))
        np.testing.assert_array_equal(array, np.float16(1))


@pytest.mark.parametrize("method", ["allgather", "two_phase"])
def test_counted_bytes_are_those_predicted(method):
    def program(carrier):
        averager = make_averager(carrier, period=2, codec=codecs.eden(bits=4), method=method, bucket_cap_mb=0.02)
        views = make_views(SHAPES, seed=1)
        averager.prepare(views)
        for step in range(6):
            move(views, carrier.rank, step)
            averager.count_step()
        predicted = sum(channel.exchange.predicted_bytes_per_round() for channel in averager._channels)
        return averager.communication_stats(), predicted

    for stats, predicted in run_ranks(3, program):
        assert stats["rounds"] == 3
        assert stats["bytes_sent"] == 3 * predicted
        assert stats["num_elements"] == 5000 + 7 + 3000 + 2500
        assert stats["uncompressed_bytes"] == 2 * 2 * 4 * 6 * stats["num_elements"] // 3
        assert stats["compression_ratio"] == stats["uncompressed_bytes"] / stats["bytes_sent"]


def test_bytes_by_hand_for_two_ranks():
    def program(carrier):
        averager = make_averager(carrier, period=1, codec=codecs.eden(bits=2))
        views = make_views({"w": (4096, "float32"), "b": (10, "float32")}, seed=1)
        averager.prepare(views)
        move(views, carrier.rank, 0)
        averager.count_step()
        return averager.communication_stats()

    for stats in run_ranks(2, program):
        assert stats["bytes_sent"] == stats["bytes_received"] == (64 + 4 * (4 + 256)) + (64 + 40)


def test_different_starting_values_are_refused_on_every_rank():
    def program(carrier):
        averager = make_averager(carrier)
        averager.prepare(make_views(SHAPES, seed=carrier.rank))

    errors = run_ranks(3, program, return_exceptions=True)
    assert {type(error) for error in errors} == {MismatchError}
    assert len({str(error) for error in errors}) == 1
    assert "broadcast_parameters" in str(errors[0])
    assert "parameters.w" in str(errors[0])


def test_different_settings_are_refused_on_every_rank():
    def program(carrier):
        averager = make_averager(carrier, seed=carrier.rank)
        averager.prepare(make_views(SHAPES, seed=0))

    errors = run_ranks(2, program, return_exceptions=True)
    assert [type(error) for error in errors] == [MismatchError] * 2
    assert str(errors[0]) == str(errors[1])
    assert "exchange.seed" in str(errors[0])
    assert "0 on rank 0; 1 on rank 1" in str(errors[0])


def test_the_same_tensors_in_another_order_are_refused_on_every_rank():
    def program(carrier):
        views = make_views(SHAPES, seed=1)
        averager = make_averager(carrier)
        with pytest.raises(MismatchError, match=r"parameter_order\[0\]: it is .* on rank 0; .* on rank 1"):
            averager.prepare(views[::-1] if carrier.rank else views)

    run_ranks(2, program)


def test_a_rank_that_made_more_steps_is_an_error_on_every_rank_and_nothing_is_lost():
    def program(carrier):
        averager = make_averager(carrier, period=2)
        views = make_views(SHAPES, seed=0)
        averager.prepare(views)
        move(views, carrier.rank, 0)
        averager.steps += carrier.rank  # as if a step had been counted on rank 1 only
        averager.count_step()
        move(views, carrier.rank, 1)
        before = [view.array.copy() for view in views]
        try:
            averager.count_step()
        except DesynchronizedError as error:
            return str(error), all(np.array_equal(a, view.array) for a, view in zip(before, views, strict=True))
        return None

    results = run_ranks(2, program)
    assert results[0] == results[1]
    assert "step is 2 on rank 0; 3 on rank 1" in results[0][0]
    assert results[0][1]


@pytest.mark.parametrize("where", ["w", "b", "d"])
def test_nan_raises_everywhere_leaves_everything_and_the_next_round_works(where):
    def program(carrier):
        averager = make_averager(carrier, period=1)
        views = make_views(SHAPES, seed=0)
        by_name = {view.name: view for view in views}
        averager.prepare(views)
        move(views, carrier.rank, 0)
        good = by_name[where].array[3]
        if carrier.rank == 1:
            by_name[where].array[3] = np.nan
        before = [view.array.copy() for view in views]
        anchor = {name: values.copy() for name, values in averager._arrays()["anchor"].items()}
        with pytest.raises(NonFiniteError) as caught:
            averager.count_step()
        for array, view in zip(before, views, strict=True):
            np.testing.assert_array_equal(array, view.array)
        for name, values in averager._arrays()["anchor"].items():
            np.testing.assert_array_equal(values, anchor[name])
        by_name[where].array[3] = good
        averager.count_step()
        return str(caught.value), averager.rounds, by_name["w"].array

    (text, rounds, first), (text1, rounds1, second) = run_ranks(2, program)
    assert text == text1
    assert "rank 1" in text
    assert rounds == rounds1 == 1
    np.testing.assert_array_equal(first, second)


def test_nan_can_be_let_through():
    def program(carrier):
        averager = make_averager(carrier, period=1, nonfinite="propagate")
        views = make_views({"w": (2000, "float32"), "b": (3, "float32")}, seed=0)
        averager.prepare(views)
        if carrier.rank == 1:
            views[0].array[0] = np.inf
        averager._check_consistency = False
        averager.count_step()
        return np.isnan(views[0].array).all(), np.isfinite(views[1].array).all()

    assert run_ranks(2, program) == [(True, True)] * 2


def test_new_tensors_may_come_in_the_middle_of_a_period():
    def program(carrier):
        averager = make_averager(carrier, period=3, codec=codecs.none())
        first = make_views({"w": (2000, "float32")}, seed=0)
        averager.prepare(first)
        move(first, carrier.rank, 0)
        second = make_views({"v": (1500, "float32")}, seed=1)
        averager.count_step()
        averager.prepare(first + second)
        for step in (1, 2):
            move(first + second, carrier.rank, step)
            averager.count_step()
        return first[0].array, second[0].array

    results = run_ranks(2, program)
    by_hand = []
    for rank in (0, 1):
        first, second = make_views({"w": (2000, "float32")}, seed=0), make_views({"v": (1500, "float32")}, seed=1)
        move(first, rank, 0)
        for step in (1, 2):
            move(first + second, rank, step)
        by_hand.append((first[0].array, second[0].array))
    for which in (0, 1):
        np.testing.assert_array_equal(results[0][which], results[1][which])
        np.testing.assert_allclose(results[0][which], (by_hand[0][which] + by_hand[1][which]) / 2, atol=1e-6)


def test_resuming_from_a_state_is_bit_exact():
    def program(carrier, resume):
        averager = make_averager(carrier, period=3)
        views = make_views(SHAPES, seed=0)
        averager.prepare(views)
        for step in range(8):
            if step == 4:
                averager.flush()
                state = averager.state_dict()
                if resume:
                    averager = make_averager(carrier, period=3, bucket_cap_mb=16.0)
                    averager.load_state_dict(state)
                    averager.prepare(views)
            move(views, carrier.rank, step)
            averager.count_step()
        averager.flush()
        return [view.array for view in views], averager.steps, averager.rounds

    straight, resumed = (
        run_ranks(2, lambda carrier, resume=resume: program(carrier, resume)) for resume in (False, True)
    )
    for (a, steps, rounds), (b, steps1, rounds1) in zip(straight, resumed, strict=True):
        assert (steps, rounds) == (steps1, rounds1) == (8, 4)
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def test_a_state_of_another_configuration_is_refused_and_changes_nothing():
    averager = make_averager(None, period=3)
    averager.steps = 5
    state = averager.state_dict()
    other = make_averager(None, period=4, codec=codecs.maxscale(bits=2))
    with pytest.raises(
        ArgumentError, match=r"averaging.period was 3 and is 4; exchange.codec was .*'bits': 4.*'bits': 2"
    ):
        other.load_state_dict(state)
    assert other.steps == 0
    with pytest.raises(ArgumentError, match="version 99"):
        averager.load_state_dict({**state, "version": 99})
    with pytest.raises(ArgumentError, match=r"lacks \['anchor'\]"):
        averager.load_state_dict({key: value for key, value in state.items() if key != "anchor"})


def test_a_state_in_the_middle_of_a_period_needs_a_flush():
    averager = make_averager(None, period=3)
    averager.prepare(make_views(SHAPES, seed=0))
    averager.count_step()
    with pytest.raises(ArgumentError, match=r"1 steps.*flush"):
        averager.state_dict()
    averager.flush()
    assert averager.state_dict()["steps"] == 1


def test_a_rank_that_flushes_alone_is_told_so_and_training_goes_on():
    given_up = threading.Event()

    def program(carrier):
        averager = make_averager(carrier, period=4, codec=codecs.none())
        views = make_views({"w": (2000, "float32")}, seed=0)
        averager.prepare(views)
        text = None
        for step in range(6):
            if step == 2 and carrier.rank == 0:
                with pytest.raises(CollectiveTimeoutError) as caught:
                    averager.flush(timeout=0.2)
                text = str(caught.value)
                given_up.set()
            assert step < 2 or given_up.wait(20.0)
            move(views, carrier.rank, step)
            averager.count_step()
        averager.flush(timeout=20)
        return text, averager.rounds, views[0].array

    (text, rounds, first), (_, rounds1, second) = run_ranks(2, program)
    assert "2 steps" in text
    assert "optimizer.flush() on every rank" in text
    assert rounds == rounds1 == 2
    np.testing.assert_array_equal(first, second)


def test_a_flush_on_one_rank_while_another_averages_is_an_error_on_both():
    def program(carrier):
        averager = make_averager(carrier, period=4, codec=codecs.none())
        views = make_views({"w": (2000, "float32")}, seed=0)
        averager.prepare(views)
        before = views[0].array.copy()
        for _ in range(2 if carrier.rank == 0 else 3):
            averager.count_step()
        with pytest.raises(DesynchronizedError) as caught:
            (averager.flush if carrier.rank == 0 else averager.count_step)()
        np.testing.assert_array_equal(views[0].array, before)
        return str(caught.value)

    texts = run_ranks(2, program)
    assert texts[0] == texts[1]
    assert "flushing after 2 steps" in texts[0]
    assert "averaging after 4 steps" in texts[0]


def test_a_rank_alone_keeps_its_own_values_to_the_bit():
    averager = make_averager(None, period=2)
    views, untouched = make_views(SHAPES, seed=0), make_views(SHAPES, seed=0)
    averager.prepare(views)
    for step in range(5):
        move(views, 0, step)
        move(untouched, 0, step)
        averager.count_step()
    averager.flush()
    for view, expected in zip(views, untouched, strict=True):
        np.testing.assert_array_equal(view.array, expected.array)
    stats = averager.communication_stats()
    assert (stats["rounds"], stats["bytes_sent"], stats["uncompressed_bytes"]) == (3, 0, 0)
    assert stats["compression_ratio"] == 1.0


def test_the_consistency_check_sees_one_different_bit():
    def program(carrier):
        averager = make_averager(carrier, period=1)
        views = make_views({"w": (2000, "float32")}, seed=0)
        averager.prepare(views)
        averager.count_step()
        if carrier.rank == 1:
            views[0].array.view(np.uint32)[17] ^= 1
        averager._channels.verify_replicas(carrier, "test", "parameters")

    errors = run_ranks(2, program, return_exceptions=True)
    assert [type(error) for error in errors] == [MismatchError] * 2
    assert "parameters.w" in str(errors[0])


def test_a_tensor_that_changed_its_type_is_refused_with_nothing_in_flight():
    def program(carrier):
        averager = make_averager(carrier, period=1)
        views = make_views({"w": (2000, "float32"), "v": (1500, "float32")}, seed=0)
        averager.prepare(views)
        kept, views[1].array = views[1].array, views[1].array.astype(np.float16)
        with pytest.raises(ArgumentError, match="v was float32"):
            averager.count_step()
        views[1].array = kept
        averager.count_step()
        return averager.rounds

    assert run_ranks(2, program) == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"period": 0}, "period is 0"),
        ({"period": 2.5}, "period is 2.5"),
        ({"buffers": "some"}, "buffers is 'some'; it must be one of 'statistics', 'all', 'max_count', 'local'"),
    ],
)
def test_schedules_that_are_not_allowed(arguments, text):
    with pytest.raises(ArgumentError, match=text):
        PeriodicAveraging(**arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"method": "ring"}, "exchange is 'ring'"),
        ({"nonfinite": "ignore"}, "nonfinite is 'ignore'"),
        ({"small_tensor_threshold": -1}, "small_tensor_threshold is -1"),
        ({"bucket_cap_mb": 0}, "bucket_cap_mb is 0"),
        ({"seed": 2**64}, "seed is"),
    ],
)
def test_exchange_settings_that_are_not_allowed(arguments, text):
    with pytest.raises(ArgumentError, match=text):
        ExchangeConfig(codecs.none(), **arguments)


@pytest.mark.parametrize(
    "config",
    [ExchangeConfig(codecs.signsgd(majority_vote=True)), ExchangeConfig(codecs.signsgd(scaled=False), codecs.fp16())],
    ids=["votes", "signs"],
)
def test_signs_without_a_scale_are_not_for_changes_of_parameters(config):
    """Every parameter would move by 1; also of a rank that is alone, so that a program fails where it is tried out."""
    for carrier in (None, *run_ranks(2, lambda carrier: carrier)):
        with pytest.raises(
            ArgumentError, match=r"compression is SignSgd\(.*, which decodes to \+-1: it is for gradients"
        ):
            PeriodicAverager(carrier, PeriodicAveraging(period=2), config, name="t")


def sizes_warned_of(caplog, size: int, averaging: PeriodicAveraging, **options: object) -> list[str]:
    config = ExchangeConfig(small_tensor_threshold=0, **options)  # type: ignore[arg-type]
    caplog.clear()

    def program(carrier):
        averager = PeriodicAverager(carrier, averaging, config, name="test")
        averager.prepare(make_views({"w": (2**17, "float32")}, seed=1))

    with caplog.at_level(logging.WARNING, "pqasgd_horovod"):
        run_ranks(size, program)
    return [record.getMessage() for record in caplog.records]


def test_more_bytes_than_in_half_precision_are_said_loudly(caplog):
    (text,) = sizes_warned_of(caplog, 5, PeriodicAveraging(period=1), codec=codecs.maxscale(bits=8), method="allgather")
    assert text.startswith("1 step(s) send 0.529 MB from each of 5 ranks: more than the 0.419 MB of Horovod")
    (text,) = sizes_warned_of(caplog, 3, PeriodicAveraging(period=1), codec=codecs.none(), method="two_phase")
    assert "0.701 MB from each of 3 ranks: more than the 0.35 MB" in text


@pytest.mark.parametrize(
    ("averaging", "options"),
    [
        (PeriodicAveraging(period=1), {"codec": codecs.maxscale(bits=8)}),
        (PeriodicAveraging(period=2), {"codec": codecs.none(), "method": "two_phase"}),
        (SparseAveraging(period=4), {"codec": codecs.none(), "method": "two_phase"}),
        (PeriodicAveraging(period=1), {"codec": codecs.bf16()}),
    ],
    ids=["auto", "seldom", "sparse", "bf16"],
)
def test_fewer_bytes_are_not(caplog, averaging, options):
    assert sizes_warned_of(caplog, 5, averaging, **options) == []
