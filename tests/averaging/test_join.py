"""Ranks whose data ends earlier than that of others, many of them in one process."""

from __future__ import annotations

import collections
import threading

import numpy as np
import pytest

from pqasgd_horovod import codecs
from pqasgd_horovod.averaging import (
    AdaptivePeriod,
    ExchangeConfig,
    Feedback,
    GradientAverager,
    GrowingPeriod,
    MomentumCorrection,
    Nesterov,
    PeriodicAverager,
    PeriodicAveraging,
    PostLocal,
    Rotation,
    SlowMo,
)
from pqasgd_horovod.errors import (
    ArgumentError,
    CollectiveTimeoutError,
    DesynchronizedError,
    MismatchError,
    NonFiniteError,
)
from pqasgd_horovod.exchange.carriers.threads import run_ranks
from pqasgd_horovod.keys import derive_key
from tests.averaging.arrays import ArrayView, decoded_mean, make_views
from tests.averaging.test_counted import Layer
from tests.averaging.test_moments import FakeMoments
from tests.exchange.test_node import nodes_of
from tests.exchange.world import CODECS

SHAPES = {"w": (3000, "float32"), "b": (7, "float32"), "d": (1500, "float64"), "h": (1200, "float16")}


def change_of(rank: int, step: int, view: ArrayView) -> np.ndarray:
    """The local update of a step, different on every rank."""
    generator = np.random.default_rng([rank, step, len(view.name), view.numel])
    return (0.01 * generator.standard_normal(view.shape)).astype(view.array.dtype)


def move(views, rank: int, step: int) -> None:
    for view in views:
        view.array += change_of(rank, step, view)


def make_averager(carrier, averaging, **options):
    config = ExchangeConfig(**{"codec": codecs.none(), **options})
    return PeriodicAverager(carrier, averaging, config, name="test", check_consistency=True, moments=FakeMoments())


def train(carrier, num_steps, averaging, *, epochs=1, shapes=SHAPES, buffers=(), **options):
    """Train with ``num_steps[rank]`` batches in each epoch, and return what every rank has to have alike."""
    averager = make_averager(carrier, averaging, **options)
    views = make_views(shapes, seed=1)
    last = []
    for epoch in range(epochs):
        for step in range(num_steps[carrier.rank]):
            if not averager.prepared:
                averager.prepare(views, buffers)
            move(views, carrier.rank, 1000 * epoch + step)
            averager.count_step(0.1)
        if not averager.prepared:
            averager.prepare(views, buffers)
        last.append(averager.join())
    state = averager.state_dict()
    return {
        "arrays": {view.name: view.array for view in views},
        "anchor": state["anchor"],
        "momentum": state["momentum"],
        "steps": state["steps"],
        "rounds": state["rounds"],
        "pace": {key: value for key, value in state["pace"].items() if key != "distance"},
        "last": last,
        "statistics": averager.communication_stats(),
    }


def by_hand(num_steps, period, epochs=1, shapes=SHAPES):
    """Local SGD of ranks with uneven data in float64: of each average the mean over those that have changed anything.

    Return the model, and the number of averages and steps.
    """
    anchor = {view.name: view.array.astype(np.float64) for view in make_views(shapes, seed=1)}
    rounds = steps = since = 0
    for epoch in range(epochs):
        replicas = [{name: array.copy() for name, array in anchor.items()} for _ in num_steps]
        counts = [False] * len(num_steps)
        for step in range(max(num_steps)):
            since += 1
            for rank, own in enumerate(num_steps):
                if step < own:
                    counts[rank] = True
                    for view in make_views(shapes, seed=1):
                        replicas[rank][view.name] += change_of(rank, 1000 * epoch + step, view)
            if since == period or (step == max(num_steps) - 1 and any(counts)):
                for name in anchor:
                    changes = [replica[name] - anchor[name] for replica, c in zip(replicas, counts, strict=True) if c]
                    anchor[name] += sum(changes) / len(changes)
                replicas = [{name: array.copy() for name, array in anchor.items()} for _ in num_steps]
                counts = [False] * len(num_steps)
                rounds += 1
                since = 0
        steps += max(num_steps)
    return anchor, rounds, steps


def assert_same(results) -> None:
    """Parameters, anchors, momentum and counters have the same bits on all ranks."""
    for result in results[1:]:
        for key in ("arrays", "anchor", "momentum"):
            assert result[key].keys() == results[0][key].keys()
            for name, array in result[key].items():
                np.testing.assert_array_equal(array, results[0][key][name], err_msg=f"{key} of {name}")
        for key in ("steps", "rounds", "pace", "last"):
            assert result[key] == results[0][key], key


UNEVEN = [(5, 9), (9, 5), (4, 8), (0, 6), (5, 5), (4, 4), (0, 0), (8, 5, 3), (4, 9, 4), (7, 6, 5), (2, 11, 4, 9)]


@pytest.mark.parametrize("method", ["allgather", "two_phase"])
@pytest.mark.parametrize("num_steps", UNEVEN, ids=str)
def test_the_mean_is_that_of_the_ranks_that_have_data(num_steps, method):
    def program(carrier):
        return train(carrier, num_steps, PeriodicAveraging(period=4), epochs=2, method=method)

    results = run_ranks(len(num_steps), program)
    assert_same(results)
    anchor, rounds, steps = by_hand(num_steps, period=4, epochs=2)
    for name, (_, dtype) in SHAPES.items():
        tolerance = 1e-2 if dtype == "float16" else 1e-6
        np.testing.assert_allclose(results[0]["anchor"][name], anchor[name], rtol=0, atol=tolerance, err_msg=name)
        np.testing.assert_array_equal(results[0]["arrays"][name], results[0]["anchor"][name].astype(dtype))
    assert results[0]["rounds"] == rounds
    assert results[0]["steps"] == steps
    assert results[0]["last"] == [num_steps.index(max(num_steps))] * 2
    for result in results:
        assert result["statistics"]["steps"] == steps
        assert result["statistics"]["rounds"] == rounds
        assert result["statistics"]["bytes_sent"] == results[0]["statistics"]["bytes_sent"] or method == "two_phase"


def test_a_mean_over_all_ranks_would_be_noticed():
    """Dividing by all ranks, with zeros of those that have joined, is far from the mean above."""
    right, _, _ = by_hand((4, 8), period=4)
    halved = make_views(SHAPES, seed=1)[0].array.astype(np.float64)
    for steps, ranks in ((range(4), (0, 1)), (range(4, 8), (1,))):
        for rank in ranks:
            for step in steps:
                halved += change_of(rank, step, make_views(SHAPES, seed=1)[0]) / 2
    assert np.abs(right["w"] - halved).max() > 1e-3


def test_the_scaled_mean_of_decoded_changes_to_the_bit():
    """One of three ranks has joined: its message decodes to zeros, and the sum of the others' becomes their mean."""
    codec, shapes = codecs.eden(bits=3), {"w": (3000, "float32")}

    def program(carrier):
        averager = make_averager(carrier, PeriodicAveraging(period=2), codec=codec, method="allgather")
        views = make_views(shapes, seed=1)
        averager.prepare(views)
        seen = []
        for step in range(2 if carrier.rank == 1 else 4):
            move(views, carrier.rank, step)
            seen.append(views[0].array.copy())
            averager.count_step()
            seen.append(views[0].array.copy())
        averager.join()
        return seen, views[0].array

    results = run_ranks(3, program)
    anchor = results[0][0][3]  # after the first average
    local = [results[rank][0][6] if rank != 1 else anchor for rank in range(3)]
    keys = [derive_key(0, rank, 4, 0, 0) for rank in range(3)]
    mean = decoded_mean(local, anchor, ExchangeConfig(codec), keys) * np.float32(1.5)
    for _, after in results:
        np.testing.assert_array_equal(after, anchor + mean)


def test_it_needs_no_message_before_somebody_joins_and_one_round_more_after():
    """Neither does a rank that has joined send other bytes than one that has not."""

    def program(carrier, joins):
        sent = collections.Counter()
        for kind in ("allgather", "alltoall"):
            send = getattr(carrier, kind)
            setattr(
                carrier, kind, lambda name, payload, *rest, send=send: sent.update([name]) or send(name, payload, *rest)
            )
        averager = make_averager(carrier, PeriodicAveraging(period=2))
        views = make_views(SHAPES, seed=1)
        averager.prepare(views)
        for step in range(2 if carrier.rank and joins else 4):
            move(views, carrier.rank, step)
            averager.count_step()
        if joins:
            averager.join()
        return sent, averager.communication_stats()["bytes_sent"]

    (without, nbytes), *_ = run_ranks(2, lambda carrier: program(carrier, joins=False))
    for sent, own in run_ranks(2, lambda carrier: program(carrier, joins=True)):
        assert sent - without == {"test.meeting": 1}
        assert own == nbytes


CONFIGS = {
    "slowmo": {"outer": SlowMo(0.5)},
    "nesterov": {"outer": Nesterov(0.7, 0.9)},
    "post-local": {"period": PostLocal(period=3, first_steps=4)},
    "growing": {"period": GrowingPeriod(first=1, last=4, every=3)},
    "adaptive": {"period": AdaptivePeriod(first=2, last=6, calibration_steps=4, low=0.9, high=1.1)},
    "sparse": {"period": 1, "selection": Rotation(4)},
    "sparse slowmo": {"period": 2, "selection": Rotation(3), "outer": SlowMo(0.5)},
    "delay": {"period": 3, "delay": 2},
    "delay nesterov": {"period": 4, "delay": 1, "outer": Nesterov(0.7, 0.9)},
    "eden": {"codec": codecs.eden(bits=2)},
    "two phases": {"codec": codecs.eden(bits=4), "method": "two_phase", "second_codec": codecs.eden(bits=8)},
    "votes' kin": {"codec": codecs.signsgd(), "feedback": Feedback()},
    "topk": {"codec": codecs.topk(density=0.05), "feedback": Feedback(), "method": "allgather"},
    "topk two phases": {"codec": codecs.topk(density=0.05), "feedback": Feedback(), "method": "two_phase"},
    "randomk": {"codec": codecs.randomk(density=0.1), "feedback": Feedback(), "method": "two_phase"},
    "powersgd": {"codec": codecs.powersgd(approximation_rank=2), "feedback": Feedback()},
    "reset": {"moments": "reset"},
    "small buckets": {"codec": codecs.natural(), "bucket_cap_mb": 0.004},
}
MATRICES = {"w": ((60, 50), "float32"), "b": ((7,), "float32"), "d": ((30, 50), "float64"), "h": ((1200,), "float16")}


@pytest.mark.parametrize("num_steps", [(3, 11), (9, 2), (5, 9, 7), (6, 6, 0), (4, 13, 8, 8)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_replicas_stay_the_same_with_any_configuration(name, num_steps):
    options = {"period": 4, **CONFIGS[name]}
    averaging = PeriodicAveraging(
        **{key: options.pop(key) for key in ("period", "outer", "selection", "delay", "moments") if key in options}
    )

    def program(carrier):
        running = ArrayView("running", np.full(5, float(carrier.rank), np.float32))
        result = train(carrier, num_steps, averaging, epochs=2, shapes=MATRICES, buffers=[running], **options)
        return result, running.array

    results = run_ranks(len(num_steps), program)
    assert_same([result for result, _ in results])
    for _, running in results:
        np.testing.assert_array_equal(running, results[0][1])
    start = make_views(MATRICES, seed=1)
    assert all(np.abs(results[0][0]["arrays"][view.name] - view.array).max() > 0.01 for view in start)
    steps = sum([max(num_steps)] * 2)
    assert results[0][0]["steps"] == steps


def test_the_average_of_a_part_counts_a_rank_until_all_its_parts_have_been_averaged():
    num_steps = (3, 9)

    def program(carrier):
        averaging = PeriodicAveraging(period=1, selection=Rotation(4))
        return train(carrier, num_steps, averaging, shapes={"w": (4096, "float32")})

    results = run_ranks(2, program)
    assert_same(results)
    # The same by hand: in step s the part s mod 4 is averaged, with rank 0 in those of steps 3 to 5, but not in 6 to 8.
    anchor = make_views({"w": (4096, "float32")}, seed=1)[0]
    replicas = [anchor.array.astype(np.float64) for _ in num_steps]
    for step in range(9):
        for rank, own in enumerate(num_steps):
            if step < own:
                replicas[rank] += change_of(rank, step, anchor)
        part = slice(1024 * (step % 4), 1024 * (step % 4 + 1))
        mean = (replicas[0][part] + replicas[1][part]) / 2 if step < 6 else replicas[1][part]
        replicas[0][part] = replicas[1][part] = mean
    np.testing.assert_allclose(results[0]["arrays"]["w"], replicas[1], rtol=0, atol=1e-6)


def test_buffers_are_those_of_the_ranks_that_have_data():
    def program(carrier):
        averager = make_averager(carrier, PeriodicAveraging(period=2))
        views, buffer = make_views(SHAPES, seed=1), ArrayView("running", np.zeros(5, np.float32))
        averager.prepare(views, [buffer])
        seen = []
        for step in range((2, 5)[carrier.rank]):
            buffer.array[:] = 10 * step + carrier.rank
            averager.count_step()
            seen.append(float(buffer.array[0]))
        averager.join()
        return seen, buffer.array

    for rank, (seen, array) in enumerate(run_ranks(2, program)):
        assert seen == [[0.0, 10.5], [1.0, 10.5, 21.0, 31.0, 41.0]][rank]
        np.testing.assert_array_equal(array, 41.0)


def test_moments_that_are_averaged_are_those_of_the_ranks_that_have_data():
    def program(carrier):
        moments = FakeMoments()
        averager = PeriodicAverager(
            carrier, PeriodicAveraging(period=2, moments="average"), ExchangeConfig(codecs.none()), name="test",
            check_consistency=True, moments=moments,
        )  # fmt: skip
        views = make_views(SHAPES, seed=1)
        averager.prepare(views)
        square = ArrayView("square", np.zeros(3, np.float32))
        moments.present = [square]
        for step in range((2, 4)[carrier.rank]):
            square.array[:] = 10 * step + carrier.rank
            averager.count_step()
        averager.join()
        return square.array

    for array in run_ranks(2, program):
        np.testing.assert_array_equal(array, 31.0)


def test_statistics_of_a_rank_that_has_joined_are_those_of_the_most_batches():
    def program(carrier):
        averager = make_averager(carrier, PeriodicAveraging(period=2, buffers="max_count"))
        views, layer = make_views(SHAPES, seed=1), Layer("norm", 4, 0, -1.0)
        averager.prepare(views, counted=[layer])
        for step in range((5, 2)[carrier.rank]):
            layer.batches += 1
            layer.values[:] = 10 * step + carrier.rank
            averager.count_step()
        averager.join()
        return layer.batches, layer.values

    for batches, values in run_ranks(2, program):
        assert batches == 5
        np.testing.assert_array_equal(values, 40.0)


@pytest.mark.parametrize("feedback", [None, Feedback()])
def test_between_nodes_too(feedback):
    num_steps, codec = (3, 9, 9, 6), codecs.none() if feedback is None else codecs.topk(density=0.1)

    def program(carrier):
        nodes = nodes_of(carrier, 2)
        return train(nodes, num_steps, PeriodicAveraging(4), hierarchy="node", codec=codec, feedback=feedback)

    results = run_ranks(4, program)
    assert_same(results)
    if feedback is None:
        anchor, rounds, _ = by_hand(num_steps, period=4)
        np.testing.assert_allclose(results[0]["anchor"]["w"], anchor["w"], rtol=0, atol=1e-6)
        assert results[0]["rounds"] == rounds


@pytest.mark.parametrize("codec", [codecs.topk(density=0.05), codecs.powersgd(approximation_rank=2)], ids=str)
def test_what_was_not_sent_stays_with_a_rank_that_has_joined(codec):
    """All that the other one has changed is in the means, or in its residual."""
    shapes = {"w": ((60, 50), "float32")}

    def program(carrier):
        averager = make_averager(carrier, PeriodicAveraging(1), codec=codec, feedback=Feedback(), method="allgather")
        views = make_views(shapes, seed=1)
        averager.prepare(views)

        def keep():
            state = averager.state_dict()
            return views[0].array.reshape(-1).copy(), state["residual"]["w"].astype(np.float64)

        move(views, carrier.rank, 0)
        averager.count_step()
        before, changes = keep(), np.zeros(3000)
        for step in range(1, (1, 4)[carrier.rank]):
            changes += change_of(carrier.rank, step, views[0]).reshape(-1)
            move(views, carrier.rank, step)
            averager.count_step()
        averager.join()
        return before, keep(), changes

    (before, after, _), (before_other, after_other, changes) = run_ranks(2, program)
    assert np.abs(before[1]).max() > 0.01
    np.testing.assert_array_equal(before[1], after[1])
    np.testing.assert_array_equal(after[0], after_other[0])
    sent = after_other[0].astype(np.float64) - before_other[0]
    np.testing.assert_allclose(sent + after_other[1] - before_other[1], changes, rtol=0, atol=1e-5)


def test_the_residual_of_a_node_goes_on_when_the_rank_that_owns_it_has_joined():
    shapes = {"w": (3000, "float32")}

    def program(carrier):
        averager = make_averager(
            nodes_of(carrier, 2), PeriodicAveraging(1), codec=codecs.topk(density=0.05), feedback=Feedback(),
            hierarchy="node", method="allgather",
        )  # fmt: skip
        views = make_views(shapes, seed=1)
        averager.prepare(views)
        kept, changes = [], np.zeros(3000)
        for step in range(4 if carrier.rank else 1):
            move(views, carrier.rank, step)
            changes += change_of(carrier.rank, step, views[0]) if step else 0
            averager.count_step()
            if step == 0:
                kept = [views[0].array.copy(), averager.state_dict()["residual"]["w"].astype(np.float64)]
        averager.join()
        return kept[0], kept[1], views[0].array, averager.state_dict()["residual"]["w"], changes

    results = run_ranks(4, program)
    sent = results[0][2].astype(np.float64) - results[0][0]
    left = sum(after - before for _, before, _, after, _ in results) / 2  # of the mean of two nodes
    changed = sum(changes for *_, changes in results) / 4
    assert np.abs(left).max() > 1e-3
    np.testing.assert_allclose(sent * 3 / 4 + left, changed, rtol=0, atol=1e-5)


def test_ranks_that_flush_while_others_have_joined_are_told_so():
    def program(carrier):
        averager = make_averager(carrier, PeriodicAveraging(period=4))
        views = make_views(SHAPES, seed=1)
        averager.prepare(views)
        for step in range(2 + carrier.rank):
            move(views, carrier.rank, step)
            averager.count_step()
        averager.join() if carrier.rank == 0 else averager.flush(20.0)

    errors = run_ranks(3, program, return_exceptions=True)
    assert [type(error) for error in errors] == [DesynchronizedError] * 3
    assert len({str(error) for error in errors}) == 1
    assert "joining after 2 steps and 0 averages on rank 0; flushing after 3" in str(errors[0])
    assert "join()" in str(errors[0])


def test_a_flush_that_was_given_up_does_not_disturb_joining():
    given_up = threading.Event()

    def program(carrier):
        averager = make_averager(carrier, PeriodicAveraging(period=4))
        views = make_views(SHAPES, seed=1)
        averager.prepare(views)
        for step in range(2 + 5 * carrier.rank):
            move(views, carrier.rank, step)
            if step == 2:
                assert given_up.wait(20.0)
            averager.count_step()
        if carrier.rank == 0:
            with pytest.raises(CollectiveTimeoutError):
                averager.flush(0.05)
            given_up.set()
        averager.join()
        return {"arrays": {view.name: view.array for view in views}, "steps": averager.steps}

    results = run_ranks(2, program)
    anchor, _, steps = by_hand((2, 7), period=4)
    for result in results:
        assert result["steps"] == steps
        np.testing.assert_allclose(result["arrays"]["w"], anchor["w"], rtol=0, atol=1e-6)


def test_ranks_that_lay_out_other_tensors_while_others_have_joined_are_told_so():
    def program(carrier):
        averager = make_averager(carrier, PeriodicAveraging(period=4))
        views = make_views(SHAPES, seed=1)
        averager.prepare(views)
        averager.count_step()
        if carrier.rank == 0:
            averager.join()
        averager.count_step()
        averager.prepare(views[:-1])

    errors = run_ranks(2, program, return_exceptions=True)
    assert [type(error) for error in errors] == [MismatchError] * 2
    assert str(errors[0]) == str(errors[1])
    assert "parameters.h" in str(errors[0])


def test_nan_is_the_same_error_on_ranks_that_have_joined_and_nothing_is_lost():
    def program(carrier):
        averager = make_averager(carrier, PeriodicAveraging(period=2), codec=codecs.eden(bits=4))
        views = make_views(SHAPES, seed=1)
        averager.prepare(views)
        move(views, carrier.rank, 0)
        averager.count_step()
        before = views[0].array.copy()
        if carrier.rank == 1:
            views[0].array[3] = np.nan
        with pytest.raises(NonFiniteError) as caught:
            averager.join() if carrier.rank == 0 else averager.count_step()
        if carrier.rank == 1:
            views[0].array[3] = before[3]
        np.testing.assert_array_equal(views[0].array, before)
        if carrier.rank == 1:
            averager.count_step()
        averager.join()
        return str(caught.value), views[0].array

    results = run_ranks(2, program)
    assert results[0][0] == results[1][0]
    np.testing.assert_array_equal(results[0][1], results[1][1])


def test_learning_rates_of_ranks_that_have_joined_do_not_matter():
    """SlowMo moves by the learning rate; that of the ranks with data counts, on all."""

    def program(carrier):
        averager = make_averager(carrier, PeriodicAveraging(period=2, outer=SlowMo(0.5)))
        views = make_views(SHAPES, seed=1)
        averager.prepare(views)
        for step in range((3, 8)[carrier.rank]):
            move(views, carrier.rank, step)
            averager.count_step(0.1 / (1 + step))
        averager.join()
        return {
            "arrays": {view.name: view.array for view in views},
            "anchor": averager.state_dict()["anchor"],
            "momentum": averager.state_dict()["momentum"],
            **{key: averager.state_dict()[key] for key in ("steps", "rounds", "pace")},
            "last": 1,
        }

    results = run_ranks(2, program)
    assert_same(results)
    assert results[0]["pace"]["learning_rate"] == np.float32(0.1 / 8)


def test_the_drift_is_that_of_the_ranks_that_had_data():
    averaging = PeriodicAveraging(AdaptivePeriod(first=2, calibration_steps=100))

    def program(carrier):
        averager = make_averager(carrier, averaging)
        views = make_views(SHAPES, seed=1)
        averager.prepare(views)
        for step in range((2, 2, 4)[carrier.rank]):
            move(views, carrier.rank, step)
            averager.count_step(1.0)
        averager.join()
        known = averager._pace.memory
        for _ in range(2):
            averager.count_step(1.0)
        return known, averager._pace.memory

    drifts = []
    for known, memory in run_ranks(3, program):
        assert known[1] == 1  # the second average has told the drift at the first one
        assert memory[1] == 2  # the third that at the second one, of one rank, which was where the mean was
        assert memory[0] == pytest.approx(known[0], abs=1e-6)
        drifts.append(known[0])
    assert drifts[0] > 0.1
    assert len(set(drifts)) == 1


def gradients_of(rank: int, step: int):
    return make_views(SHAPES, seed=100 * step + rank)


def average_gradients(carrier, num_steps, sum_over_ranks=False, **options):
    """Average gradients while there are any, and join; return what the last step brought, and what join returned."""
    config = ExchangeConfig(**{"codec": codecs.none(), **options})
    averager = GradientAverager(carrier, config, name="test", sum_over_ranks=sum_over_ranks, check_consistency=True)
    views = gradients_of(carrier.rank, 0)
    averager.prepare(views)
    for step in range(num_steps[carrier.rank]):
        for view, fresh in zip(views, gradients_of(carrier.rank, step), strict=True):
            view.array[:] = fresh.array
        averager.ready("w")
        averager.finish()
    joined = averager.join()
    means = {view.name: view.array.copy() for view in views}
    # And it goes on.
    for view, fresh in zip(views, gradients_of(carrier.rank, 99), strict=True):
        view.array[:] = fresh.array
    averager.finish()
    return means, joined, averager.steps, {view.name: view.array.copy() for view in views}, averager


@pytest.mark.parametrize("method", ["allgather", "two_phase"])
@pytest.mark.parametrize("sum_over_ranks", [False, True])
@pytest.mark.parametrize("num_steps", [(2, 5), (5, 2), (3, 1, 3), (0, 2, 4), (3, 3), (2, 4, 6, 6)], ids=str)
def test_the_mean_of_gradients_is_that_of_the_ranks_that_have_some(num_steps, sum_over_ranks, method):
    results = run_ranks(
        len(num_steps), lambda carrier: average_gradients(carrier, num_steps, sum_over_ranks, method=method)
    )
    steps = max(num_steps)
    for ranks, step, index in (
        ([rank for rank, own in enumerate(num_steps) if own == steps], steps - 1, 0),
        (range(len(num_steps)), 99, 3),
    ):
        for name in SHAPES:
            views = [{view.name: view for view in gradients_of(rank, step)}[name] for rank in ranks]
            total = sum(view.array.astype(np.float64) for view in views)
            expected = total if sum_over_ranks else total / len(ranks)
            tolerance = 1e-2 if name == "h" else 2e-6
            for result in results:
                np.testing.assert_allclose(result[index][name], expected, rtol=0, atol=tolerance, err_msg=name)
                np.testing.assert_array_equal(result[index][name], results[0][index][name])
    for result in results:
        assert result[1] == (num_steps.index(steps), len(set(num_steps)) > 1)
        assert result[2] == steps + 1


@pytest.mark.parametrize("num_steps", [(2, 9), (4, 7, 1)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"codec": codecs.eden(bits=2)},
        {"codec": codecs.topk(density=0.05), "feedback": Feedback(), "method": "two_phase"},
        {"codec": codecs.topk(density=0.01), "feedback": MomentumCorrection(0.9)},
        {"codec": codecs.topk(density=0.01), "feedback": MomentumCorrection(0.9, clip_norm=1.0, warmup_steps=8)},
        {"codec": codecs.powersgd(approximation_rank=2), "feedback": Feedback(), "bucket_cap_mb": 0.01},
    ],
    ids=["eden", "topk", "momentum", "warm-up", "powersgd"],
)
def test_coded_gradients_stay_the_same_on_all_ranks(options, num_steps):
    results = run_ranks(len(num_steps), lambda carrier: average_gradients(carrier, num_steps, **options))
    for means, joined, steps, after, _ in results:
        assert (joined, steps) == results[0][1:3]
        for name in SHAPES:
            np.testing.assert_array_equal(means[name], results[0][0][name])
            np.testing.assert_array_equal(after[name], results[0][3][name])


def test_residual_and_velocity_of_gradients_stay_with_a_rank_that_has_joined():
    def program(carrier):
        config = ExchangeConfig(codecs.topk(density=0.01), feedback=MomentumCorrection(0.9))
        averager = GradientAverager(carrier, config, name="test")
        averager.prepare(gradients_of(carrier.rank, 0))
        for _ in range((1, 3)[carrier.rank]):
            averager.finish()
        before = averager.state_dict()
        averager.join()
        return before, averager.state_dict()

    for before, after in run_ranks(2, program):
        assert np.abs(before["velocity"]["w"]).max() > 0
        for kind in ("residual", "velocity"):
            for name, array in before[kind].items():
                np.testing.assert_array_equal(after[kind][name], array)


@pytest.mark.parametrize("options", [{}, {"majority_vote": True}])
def test_signs_cannot_say_nothing(options):
    def program(carrier):
        averager = GradientAverager(carrier, ExchangeConfig(codecs.signsgd(scaled=False, **options)), name="test")
        averager.prepare(gradients_of(carrier.rank, 0))
        averager.join()

    for error in run_ranks(2, program, return_exceptions=True):
        assert isinstance(error, ArgumentError)
        assert "compression is SignSgd" in str(error)
        assert "join()" in str(error)


def test_a_zero_decodes_to_zero_wherever_joining_is_allowed():
    """That is what a rank without data sends."""
    for name, codec in CODECS.items():
        payload = codec.reference_encode(np.zeros(500, np.float32), 1)
        decoded = np.zeros(500, np.float32)
        codec.reference_decode_add(payload, decoded, 1, weight=1.0)
        assert codec.keeps_scale == (not decoded.any()), name


def test_a_rank_that_is_alone_flushes():
    averager = PeriodicAverager(None, PeriodicAveraging(period=4), ExchangeConfig(codecs.none()), name="test")
    averager.prepare(make_views(SHAPES, seed=1))
    averager.count_step()
    assert averager.join() == 0
    assert averager.steps_since_average == 0
    assert GradientAverager(None, ExchangeConfig(codecs.none()), name="test").join() == (0, False)
