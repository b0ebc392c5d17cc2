"""Sparse gradients: coded rows, with what was not sent of a row kept until it is used again."""

from __future__ import annotations

import numpy as np
import pytest

from pqasgd_horovod import codecs
from pqasgd_horovod.averaging import ExchangeConfig, Feedback, GradientAverager
from pqasgd_horovod.averaging.policy import Rule
from pqasgd_horovod.averaging.state import combine_states
from pqasgd_horovod.averaging.tables import SparseSpec
from pqasgd_horovod.errors import ArgumentError, MismatchError, NonFiniteError
from pqasgd_horovod.exchange.carriers.threads import run_ranks
from pqasgd_horovod.exchange.rows import Rows

from .arrays import make_views
from .test_feedback import pending, relative

SPECS = [SparseSpec("words", (90, 20), "float32 [90, 20]"), SparseSpec("tags", (7, 3), "float32 [7, 3]")]
DENSE = {"w": (3000, "float32")}
TOPK = codecs.topk(density=0.25, block_size=64)


def make_rows(spec: SparseSpec, rank: int, step: int) -> Rows:
    generator = np.random.default_rng([rank, step, spec.shape[0]])
    numbers = np.sort(generator.permutation(spec.shape[0])[: 3 + rank]).astype(np.int64)
    return Rows(numbers, generator.standard_normal((numbers.size, *spec.shape[1:])).astype(np.float32))


def average(carrier, steps, state=None, change=None, **options):
    """Average some steps; return what has arrived of each table in all, the state then, and the averager."""
    options = {"codec": TOPK, "feedback": Feedback(), "small_tensor_threshold": 100, **options}
    sums = options.pop("sum_over_ranks", False)
    averager = GradientAverager(carrier, ExchangeConfig(**options), name="test", sum_over_ranks=sums)
    averager.load_state_dict(state)
    views = make_views(DENSE, seed=1)
    averager.prepare(views, SPECS)
    total = {spec.name: np.zeros(spec.shape) for spec in SPECS}
    for step in steps:
        for spec in SPECS:
            rows = make_rows(spec, carrier.rank, step)
            if change is not None:
                change(carrier.rank, step, spec.name, rows)
            averager.ready_rows(spec.name, lambda rows=rows: rows)
        for name, mean in averager.finish().items():
            total[name][mean.numbers] += mean.values
    return total, averager.state_dict(), averager


def given(size: int, steps: range) -> dict[str, np.ndarray]:
    exact = {spec.name: np.zeros(spec.shape) for spec in SPECS}
    for spec in SPECS:
        for rank in range(size):
            for step in steps:
                rows = make_rows(spec, rank, step)
                exact[spec.name][rows.numbers] += rows.values / size
    return exact


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_was_given_has_arrived_or_is_pending(size):
    results = run_ranks(size, lambda carrier: average(carrier, range(8)))
    if size == 1:  # nothing is exchanged
        assert not results[0][0]["words"].any()
        return
    exact, rest = given(size, range(8)), pending([state for _, state, _ in results])
    for total, _, _ in results:
        np.testing.assert_array_equal(total["words"], results[0][0]["words"])
        assert relative(total["words"] + rest["words"].reshape(90, 20) - exact["words"], exact["words"]) < 1e-6
        assert relative(rest["words"], exact["words"]) > 0.1
        # The small one travels as it is, and has no residual.
        assert relative(total["tags"] - exact["tags"], exact["tags"]) < 1e-6
    assert set(rest) == {"words", "w"}


def test_a_sum_is_the_mean_times_the_ranks():
    mean, total = (
        run_ranks(2, lambda carrier, sums=sums: average(carrier, range(1), sum_over_ranks=sums))[0][0]
        for sums in (False, True)
    )
    np.testing.assert_array_equal(2 * mean["words"], total["words"])


def test_it_resumes_bit_exactly_and_in_a_world_of_another_size():
    whole = run_ranks(2, lambda carrier: average(carrier, range(6)))
    first = run_ranks(2, lambda carrier: average(carrier, range(3)))
    second = run_ranks(2, lambda carrier: average(carrier, range(3, 6), first[carrier.rank][1]))
    for one, other, before in zip(whole, second, first, strict=True):
        assert one[1]["residual"]["words"].tobytes() == other[1]["residual"]["words"].tobytes()
        assert one[1]["residual"]["words"].tobytes() != before[1]["residual"]["words"].tobytes()
    combined, before = combine_states([state for _, state, _ in first]), pending([state for _, state, _ in first])
    third = run_ranks(3, lambda carrier: average(carrier, range(3, 5), combined))
    exact = given(3, range(3, 5))["words"] + before["words"].reshape(90, 20)
    rest = pending([state for _, state, _ in third])["words"].reshape(90, 20)
    assert relative(third[0][0]["words"] + rest - exact, exact) < 1e-6


def test_each_has_the_codec_of_its_rule():
    rules = (Rule("tags", codecs.none()), Rule("words", codecs.maxscale(bits=4)))
    options = {"feedback": None, "small_tensor_threshold": 0}
    coded = run_ranks(2, lambda carrier: average(carrier, range(1), policy=rules, **options))
    plain = run_ranks(2, lambda carrier: average(carrier, range(1), codec=codecs.none(), **options))
    exact = given(2, range(1))
    for name, lossless in (("tags", True), ("words", False)):
        assert relative(plain[0][0][name] - exact[name], exact[name]) < 1e-7
        assert (coded[0][0][name] == plain[0][0][name]).all() == lossless
        assert relative(coded[0][0][name] - exact[name], exact[name]) < 0.2


def test_bytes_are_those_of_rows():
    """A header, seven bits for each row of words and three of tags, and float32."""
    results = run_ranks(2, lambda carrier: average(carrier, range(2), codec=codecs.none(), feedback=None))
    dense = 64 + 4 * 3000
    for rank, (_, _, averager) in enumerate(results):
        count = 3 + rank
        rows = 2 * 64 + -(-7 * count // 8) + -(-3 * count // 8) + 4 * count * (20 + 3)
        assert averager.communication_stats()["bytes_sent"] == 2 * (rows + dense)
        assert averager.communication_stats()["uncompressed_bytes"] == 2 * 4 * (3000 + 90 * 20 + 7 * 3)


def test_bytes_stay_when_tensors_are_laid_out_anew():
    def program(carrier):
        _, _, averager = average(carrier, range(2))
        before = averager.communication_stats()["bytes_sent"]
        averager.prepare(make_views(DENSE, seed=1), SPECS)
        return before, averager.communication_stats()["bytes_sent"]

    for before, after in run_ranks(2, program):
        assert before == after > 0


@pytest.mark.parametrize("nonfinite", ["raise", "propagate"])
def test_nan_on_one_rank(nonfinite):
    """One error everywhere that names the gradient; and what was not sent before is still kept."""

    def change(rank, step, name, rows):
        if (rank, step, name) == (1, 2, "words"):
            rows.values[0, 0] = np.nan

    def program(carrier):
        before = average(carrier, range(2), nonfinite=nonfinite)[1]
        try:
            total, after, _ = average(carrier, range(2, 3), before, change, nonfinite=nonfinite)
        except NonFiniteError as error:
            return str(error)
        assert np.isnan(total["words"]).any()
        return before["residual"]["words"].tobytes() == after["residual"]["words"].tobytes()

    results = run_ranks(2, program)
    if nonfinite == "propagate":
        assert results == [True, True]
    else:
        assert len(set(results)) == 1
        assert "rank 1 had NaN, Inf or a number beyond the codec's range in the rows of 'words'" in results[0]


@pytest.mark.parametrize("where", ["a dense gradient", "another table"])
def test_a_step_that_fails_elsewhere_keeps_what_rows_had_left(where):
    """Their mean has arrived, and is not used: what was sent of them is not lost."""

    def program(carrier):
        averager = GradientAverager(
            carrier, ExchangeConfig(TOPK, feedback=Feedback(), small_tensor_threshold=0), name="t"
        )
        views = make_views(DENSE, seed=1)
        averager.prepare(views, SPECS)
        kept = []
        for step in range(2):
            tables = {spec.name: make_rows(spec, carrier.rank, step) for spec in SPECS}
            if step == 1 and carrier.rank == 1:
                (views[0].array if where == "a dense gradient" else tables["tags"].values[0])[0] = np.nan
            for name, rows in tables.items():
                averager.ready_rows(name, lambda rows=rows: rows)
            try:
                averager.finish()
            except NonFiniteError:
                assert step == 1
            kept.append(averager.state_dict()["residual"]["words"])
        return kept

    for before, after in run_ranks(2, program):
        np.testing.assert_array_equal(before, after)
        assert before.any()


def test_a_codec_that_owners_decode_is_refused():
    codec = codecs.signsgd(majority_vote=True)
    errors = run_ranks(
        2, lambda carrier: average(carrier, range(1), codec=codec, feedback=None), return_exceptions=True
    )
    assert [type(error) for error in errors] == [ArgumentError] * 2
    assert "the gradient of 'words' is sparse, and its codec is SignSgd" in str(errors[0])


def test_ranks_with_other_tables_are_an_error():
    def program(carrier):
        averager = GradientAverager(carrier, ExchangeConfig(TOPK), name="test")
        averager.prepare(make_views(DENSE, seed=1), SPECS[: 1 + carrier.rank])

    errors = run_ranks(2, program, return_exceptions=True)
    assert [type(error) for error in errors] == [MismatchError] * 2
    assert "sparse_gradients.tags" in str(errors[0])
