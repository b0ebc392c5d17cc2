"""Sparse parameter averaging: a part of the coordinates in each round, all of them within a period."""

from __future__ import annotations

import numpy as np
import pytest

from pqasgd_horovod import codecs
from pqasgd_horovod.averaging import (
    ExchangeConfig,
    Feedback,
    Nesterov,
    PeriodicAverager,
    PeriodicAveraging,
    Rotation,
    SparseAveraging,
)
from pqasgd_horovod.averaging.channel import plan_channel
from pqasgd_horovod.averaging.vector import FlatLayout
from pqasgd_horovod.errors import ArgumentError, MismatchError, NonFiniteError
from pqasgd_horovod.exchange.carriers.threads import run_ranks

from .arrays import ArrayView, make_views

SHAPES = {"w": (9000, "float32"), "b": (7, "float32"), "h": (3000, "float16"), "d": (2500, "float64")}
NUM_ELEMENTS = sum(size for size, _ in SHAPES.values())


def make_averager(carrier, averaging=None, **options):
    config = ExchangeConfig(**{"codec": codecs.eden(bits=4), **options})
    return PeriodicAverager(carrier, averaging or SparseAveraging(4), config, name="test", check_consistency=True)


def move(views: list[ArrayView], rank: int, step: int) -> None:
    generator = np.random.default_rng([rank, step])
    for view in views:
        view.array += (0.01 * generator.standard_normal(view.numel)).astype(view.array.dtype)


def flat(views: list[ArrayView]) -> np.ndarray:
    return np.concatenate([view.array.astype(np.float64) for view in views])


def same_coordinates(replicas: list[np.ndarray]) -> np.ndarray:
    """Return where all replicas have the same number."""
    return np.logical_and.reduce([replica == replicas[0] for replica in replicas])


@pytest.mark.parametrize("block", [None, 1024, 3000])
@pytest.mark.parametrize("fragments", [1, 3, 8])
def test_every_element_is_in_one_fragment_and_fragments_are_equal(block, fragments):
    views = make_views(SHAPES, seed=1)
    config = ExchangeConfig(codecs.eden(bits=4), bucket_cap_mb=0.01, small_tensor_threshold=0)
    selection = Rotation(fragments, block)
    ((way, views),) = config.by_way(views)
    plan = plan_channel(FlatLayout(views), config, way, name="x", index=0, size=2, selection=selection)
    assert sorted(bucket for fragment in plan.fragments for bucket in fragment) == list(range(len(plan.sizes)))
    assert sum(plan.sizes) == NUM_ELEMENTS
    elements = [sum(plan.sizes[bucket] for bucket in fragment) for fragment in plan.fragments]
    assert len(elements) == fragments
    if block is None:
        assert len({-(-count // 1024) for count in elements}) <= 2  # whole blocks, the last one shorter


@pytest.mark.parametrize("block", [None, 1024])
@pytest.mark.parametrize("size", [2, 3])
def test_in_each_step_a_part_becomes_the_same_and_all_within_a_period(size, block):
    """What a fragment becomes is the mean, to the codec's error; the rest is as each rank left it."""

    def program(carrier):
        averager = make_averager(carrier, SparseAveraging(4, block), codec=codecs.none(), small_tensor_threshold=0)
        views = make_views(SHAPES, seed=1)
        averager.prepare(views)
        seen = []
        for step in range(8):
            move(views, carrier.rank, step)
            local = flat(views)
            averager.count_step()
            seen.append((local, flat(views)))
            anchor, moved = averager._arrays()["anchor"]["w"], views[0].array != local[:9000]
            np.testing.assert_array_equal(anchor[moved], views[0].array[moved])
        return seen

    results = run_ranks(size, program)
    covered = np.zeros(NUM_ELEMENTS, int)
    for step in range(8):
        locals_, after = ([result[step][k] for result in results] for k in (0, 1))
        common = same_coordinates(after)
        assert 0.15 * NUM_ELEMENTS < common.sum() < 0.45 * NUM_ELEMENTS
        covered += common
        mean = np.mean(locals_, axis=0)
        # Half precision has steps of 2^-9 up to 4, which is where these numbers are.
        np.testing.assert_allclose(after[0][common], mean[common], rtol=0, atol=2.0**-9)
        for local, now in zip(locals_, after, strict=True):
            np.testing.assert_array_equal(now[~common], local[~common])
    assert (covered >= 2).all()


def test_every_step_sends_the_same():
    def program(carrier):
        averager = make_averager(carrier, SparseAveraging(4), small_tensor_threshold=0, method="allgather")
        views = make_views({"w": (4 * 8192, "float32")}, seed=1)
        averager.prepare(views)
        sent = []
        for step in range(8):
            move(views, carrier.rank, step)
            before = averager.communication_stats()["bytes_sent"]
            averager.count_step()
            sent.append(averager.communication_stats()["bytes_sent"] - before)
        return sent

    whole = codecs.eden(bits=4).payload_nbytes(4 * 8192)
    for sent in run_ranks(2, program):
        assert sent == [whole // 4 + 64] * 8


@pytest.mark.parametrize("method", ["allgather", "two_phase"])
@pytest.mark.parametrize("outer", [None, Nesterov(0.7, 0.5)], ids=["replace", "nesterov"])
@pytest.mark.parametrize("block", [None, 1024])
def test_a_flush_makes_all_of_it_the_same_and_it_resumes_bit_exactly(method, outer, block):
    averaging = SparseAveraging(3, block, outer=outer)
    options = {"method": method, "feedback": Feedback()}

    def program(carrier, stop):
        averager = make_averager(carrier, averaging, **options)
        views = make_views(SHAPES, seed=1)
        averager.prepare(views)
        for step in range(10):
            if step == 5:
                averager.flush()
                if stop:
                    state = averager.state_dict()
                    averager = make_averager(carrier, averaging, **options)
                    averager.load_state_dict(state)
                    averager.prepare(views)
                at_flush = flat(views)
            move(views, carrier.rank, step)
            averager.count_step()
        return at_flush, flat(views), averager.state_dict if stop is None else None

    results = {stop: run_ranks(3, lambda carrier, stop=stop: program(carrier, stop)) for stop in (False, True)}
    assert same_coordinates([at_flush for at_flush, _, _ in results[False]]).all()
    for whole, resumed in zip(*results.values(), strict=True):
        assert whole[1].tobytes() == resumed[1].tobytes()


def test_the_state_cannot_be_had_in_the_middle():
    def program(carrier):
        averager = make_averager(carrier)
        views = make_views(SHAPES, seed=1)
        averager.prepare(views)
        averager.state_dict()
        for _ in range(4):
            averager.count_step()
        with pytest.raises(ArgumentError, match="4 steps were made since all replicas were the same"):
            averager.state_dict()

    run_ranks(2, program)


def test_buffers_are_averaged_in_turn():
    def program(carrier):
        averager = make_averager(carrier, SparseAveraging(2), small_tensor_threshold=0)
        views = make_views({"w": (4096, "float32")}, seed=1)
        buffer = ArrayView("running", np.full(5, 10.0 * carrier.rank, np.float32))
        averager.prepare(views, [buffer])
        seen = []
        for value in (1.0, 5.0, 9.0, 13.0):
            buffer.array[:] = value + carrier.rank
            averager.count_step()
            seen.append(buffer.array.copy())
        averager.flush()
        return seen, buffer.array

    (first, end), (second, _) = run_ranks(2, program)
    averaged = [np.array_equal(a, b) for a, b in zip(first, second, strict=True)]
    assert averaged == [True, False, True, False]
    np.testing.assert_array_equal(first[2], np.full(5, 9.5))
    np.testing.assert_array_equal(end, np.full(5, 13.5))


def test_nan_in_a_fragment_raises_everywhere_and_the_next_round_works():
    def program(carrier):
        averager = make_averager(carrier, SparseAveraging(2), small_tensor_threshold=0)
        views = make_views({"w": (4096, "float32")}, seed=1)
        averager.prepare(views)
        move(views, carrier.rank, 0)
        before = views[0].array.copy()
        if carrier.rank == 1:
            views[0].array[0] = np.nan
        with pytest.raises(NonFiniteError):
            averager.count_step()
        np.testing.assert_array_equal(views[0].array[1:], before[1:])
        views[0].array[0] = before[0]
        averager.count_step()
        return views[0].array

    first, second = run_ranks(2, program)
    assert same_coordinates([first, second]).sum() >= 2048


def test_a_part_every_so_many_steps():
    """The schedule of Streaming DiLoCo: a fragment is due every few steps."""

    def program(carrier):
        averager = make_averager(carrier, PeriodicAveraging(period=3, selection=Rotation(2)))
        averager.prepare(make_views(SHAPES, seed=1))
        for _ in range(7):
            averager.count_step()
        return averager.rounds

    assert run_ranks(2, program) == [2, 2]


def test_ranks_with_different_selections_are_told():
    def program(carrier):
        make_averager(carrier, SparseAveraging(2 + carrier.rank)).prepare(make_views(SHAPES, seed=1))

    with pytest.raises(MismatchError, match="fragments"):
        run_ranks(2, program)


def test_a_rotation_names_its_own_argument():
    with pytest.raises(ArgumentError, match="fragments is 0"):
        Rotation(0)


@pytest.mark.parametrize("wrong", [{"period": 0}, {"period": 1.5}, {"block": 0}])
def test_arguments_are_checked(wrong):
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        SparseAveraging(**wrong)


def test_it_round_trips_through_its_configuration():
    strategy = SparseAveraging(4, block=2**16, outer=Nesterov())
    assert PeriodicAveraging.from_config(strategy.config()) == strategy
