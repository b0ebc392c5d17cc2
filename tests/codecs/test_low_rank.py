"""Matrices as products of thin factors: the core has the specification's bits, and what a factor is for holds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from pqasgd_horovod import codecs, keys, native
from pqasgd_horovod.codecs import low_rank
from pqasgd_horovod.errors import ArgumentError

from . import cases

FIXTURES = Path(__file__).parent / "fixtures"
# Rows and columns below, at and above 64, of which sums are made, and above 512, where threads share a matrix.
SHAPES = [(1, 1), (3, 70), (64, 64), (65, 130), (200, 5), (130, 1100), (700, 513)]
RANKS = [1, 2, 3, 4, 9]


def matrices(shapes: list[tuple[int, int]], seed: int = 0) -> list[np.ndarray]:
    """Matrices whose entries have many magnitudes."""
    generator = np.random.default_rng(seed)
    return [
        (generator.standard_normal(shape) * np.exp2(generator.integers(-20, 3, shape))).astype(np.float32)
        for shape in shapes
    ]


def flat(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([array.reshape(-1) for array in arrays])


def reference_step(shapes, values, starts, base):
    """Left factors, own right ones, mean, rest and next starts, of one rank alone."""
    lefts = [
        low_rank.reference_orthogonalize(low_rank.reference_project(*pair)) for pair in zip(values, starts, strict=True)
    ]
    rights = [low_rank.reference_backproject(*pair) for pair in zip(values, lefts, strict=True)]
    products = [low_rank.reference_product(*pair) for pair in zip(lefts, rights, strict=True)]
    mean = flat(products) if base is None else base + flat(products)
    rest = flat(values) - flat(products)
    return [flat(lefts), flat(rights), mean, rest, flat([low_rank.reference_orthogonalize(r) for r in rights])]


def native_step(shapes, approximation_rank, source, rest, starts, base, start=0):
    """The same by the core; ``rest`` is the source's next residual."""
    core = native.Matrices(shapes, approximation_rank)
    left, right = np.full(core.left_numel, 7, np.float32), np.full(core.right_numel, 7, np.float32)
    mean = np.full(core.numel, 7, np.float32)
    core.project(source, start, flat(starts), left)
    core.orthogonalize("left", left)
    core.backproject(source, start, left, right)
    core.reconstruct(source, start, left, right, right, base, mean)
    following = right.copy()
    core.orthogonalize("right", following)
    return [left, right, mean, rest[start : start + core.numel], following]


def drawn(shapes, approximation_rank):
    return [low_rank.draw(i, approximation_rank, cols) for i, (_, cols) in enumerate(shapes)]


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("approximation_rank", RANKS)
def test_the_core_has_the_bits_of_the_specification(approximation_rank, with_base):
    values, starts = matrices(SHAPES), drawn(SHAPES, approximation_rank)
    base = flat(matrices(SHAPES, seed=1)) if with_base else None
    expected = reference_step(SHAPES, values, starts, base)
    for implementation in cases.NATIVE:
        with implementation.active():
            rest = np.full(flat(values).size, np.nan, np.float32)
            source = native.Source.from_arrays([flat(values)], residual=(np.zeros_like(rest), rest))
            found = native_step(SHAPES, approximation_rank, source, rest, starts, base)
        for name, one, other in zip(("left", "right", "mean", "rest", "start"), found, expected, strict=True):
            assert one.tobytes() == other.tobytes(), (str(implementation), name)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_a_matrix_is_what_a_source_makes_of_it(dtype):
    """Segments that end in the middle of a row, minus an anchor, plus a residual, and not from the first element."""
    shapes, generator = [(70, 90), (40, 100)], np.random.default_rng(2)
    total = sum(n * m for n, m in shapes)
    arrays = [generator.standard_normal(size).astype(dtype) for size in (5, 1000, total - 1000)]
    anchor = generator.standard_normal(total + 5)
    kept, rest = generator.standard_normal(total + 5).astype(np.float32), np.zeros(total + 5, np.float32)
    source = native.Source.from_arrays(arrays, anchor, (kept, rest))
    whole = (np.concatenate(arrays).astype(np.float64) - anchor).astype(np.float32) + kept
    values = [whole[5:6305].reshape(70, 90), whole[6305:].reshape(40, 100)]
    found = native_step(shapes, 3, source, rest, drawn(shapes, 3), None, start=5)
    for one, other in zip(found, reference_step(shapes, values, drawn(shapes, 3), None), strict=True):
        assert one.tobytes() == other.tobytes()
    assert not rest[:5].any()


@pytest.mark.parametrize("approximation_rank", [1, 2, 9])
def test_what_is_sent_is_a_projection(approximation_rank):
    (matrix,), (start,) = matrices([(130, 300)]), drawn([(130, 300)], approximation_rank)
    left, _, mean, rest, following = (
        part.astype(np.float64) for part in reference_step([(130, 300)], [matrix], [start], None)
    )
    basis = left.reshape(approximation_rank, -1)
    np.testing.assert_allclose(basis @ basis.T, np.eye(approximation_rank), atol=1e-6)
    np.testing.assert_allclose(mean.reshape(130, 300), basis.T @ basis @ matrix, atol=1e-5)
    np.testing.assert_allclose(basis @ rest.reshape(130, 300), 0, atol=1e-4)
    np.testing.assert_allclose(
        np.linalg.norm(mean) ** 2 + np.linalg.norm(rest) ** 2, np.linalg.norm(matrix) ** 2, rtol=1e-5
    )
    span = following.reshape(approximation_rank, -1)
    np.testing.assert_allclose(span @ span.T, np.eye(approximation_rank), atol=1e-6)


def test_steps_follow_each_other_to_the_best_approximation():
    """A power iteration: the error falls to that of the truncated singular value decomposition."""
    generator = np.random.default_rng(3)
    u, v = (np.linalg.qr(generator.standard_normal((size, size)))[0] for size in (80, 60))
    singular = np.concatenate([[10, 8], np.full(58, 1.0)])
    matrix = ((u[:, :60] * singular) @ v.T).astype(np.float32)
    start, errors = low_rank.draw(1, 2, 60), []
    for _ in range(12):
        _, _, _, rest, following = reference_step([(80, 60)], [matrix], [start], None)
        start = following.reshape(2, 60)
        errors.append(float(np.linalg.norm(rest)))
    best = np.sqrt(58)
    assert errors[0] > 1.05 * best
    assert errors[-1] == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1.0, 1e18])
def test_numbers_of_any_size_stay_in_range(scale):
    matrix = (matrices([(100, 90)])[0] * scale).astype(np.float32)
    start = low_rank.draw(1, 2, 90)
    for _ in range(3):
        _, _, mean, rest, following = reference_step([(100, 90)], [matrix], [start], None)
        start = following.reshape(2, 90)
    assert np.isfinite(mean).all()
    assert np.linalg.norm(rest.astype(np.float64)) < 0.99 * np.linalg.norm(matrix.astype(np.float64))
    assert start.any(axis=1).all()


def test_what_depends_on_the_vectors_before_it_becomes_zero():
    generator = np.random.default_rng(4)
    a, b = generator.standard_normal((2, 500)).astype(np.float32)
    nearly = (a + np.float32(1e-4) * b).astype(np.float32)
    vectors = np.stack([a, 3 * a, np.zeros_like(a), a + b, b, nearly])
    expected = low_rank.reference_orthogonalize(vectors)
    assert [bool(vector.any()) for vector in expected] == [True, False, False, True, False, False]
    two = low_rank.reference_orthogonalize(np.stack([a, nearly])).astype(np.float64)
    np.testing.assert_allclose(two @ two.T, np.eye(2), atol=1e-6)  # nearly dependent is not dependent
    for implementation in cases.NATIVE_SINGLE:
        with implementation.active():
            found = vectors.reshape(-1).copy()
            native.Matrices([(500, 1)], 6).orthogonalize("left", found)
        assert found.tobytes() == expected.tobytes(), str(implementation)


def test_random_starts_are_uniform_and_unlike_each_other():
    start = low_rank.draw(keys.derive_shared_key(1, 2, 3), 2, 100_000).astype(np.float64)
    assert start.min() >= -1
    assert start.max() < 1
    assert abs(start.mean()) < 0.01
    assert start.var() == pytest.approx(1 / 3, rel=0.01)
    assert abs(np.corrcoef(start)[0, 1]) < 0.02
    assert low_rank.draw(1, 2, 5).tobytes() == low_rank.draw(1, 3, 5)[:2].tobytes()


@pytest.mark.parametrize("implementation", [cases.REFERENCE, *cases.NATIVE_SINGLE], ids=str)
def test_golden_bits(implementation):
    description = json.loads((FIXTURES / "powersgd-3.json").read_text())
    shape, key = tuple(description["shape"]), description["key"]
    matrix = np.resize(np.fromfile(FIXTURES / "input.bin", "<f4").astype(np.float32), shape)
    starts = [low_rank.draw(key, codecs.from_config(description["config"]).approximation_rank, shape[1])]
    if implementation.isa is None:
        found = reference_step([shape], [matrix], starts, None)
    else:
        rest = np.zeros(matrix.size, np.float32)
        source = native.Source.from_arrays([matrix.reshape(-1)], residual=(np.zeros_like(rest), rest))
        with implementation.active():
            found = native_step([shape], 3, source, rest, starts, None)
    names = ("start", "left", "right", "mean", "rest", "next_start")
    digests = {
        name: hashlib.sha256(part.astype("<f4").tobytes()).hexdigest()
        for name, part in zip(names, [flat(starts), *found], strict=True)
    }
    assert digests == description["sha256"]


def test_arguments_of_the_scheme():
    scheme = codecs.powersgd(approximation_rank=3)
    assert codecs.from_config(scheme.config()) == scheme
    assert scheme.config() == {"id": "powersgd", "approximation_rank": 3}
    assert scheme.message_codec == codecs.none()
    assert (scheme.contractive, scheme.unbiased, scheme.lossless, scheme.commutes_with_sum) == (
        True,
        False,
        False,
        False,
    )
    assert [scheme.kept_numel(matrix) for matrix in ((100, 20), (1, 2000), (3, 2000))] == [60, 0, 0]
    for wrong in (0, 1025, 1.5, True):
        with pytest.raises(ArgumentError, match="approximation_rank is"):
            codecs.powersgd(approximation_rank=wrong)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="values is"):
        codecs.topk(values=scheme)  # type: ignore[arg-type]


def test_arguments_of_the_core():
    core = native.Matrices([(4, 6)], 2)
    values, rest = np.zeros(24, np.float32), np.zeros(24, np.float32)
    source = native.Source.from_arrays([values], residual=(np.zeros_like(values), rest))
    left, right, mean = np.zeros(8, np.float32), np.zeros(12, np.float32), np.zeros(24, np.float32)
    with pytest.raises(ArgumentError, match="right has 8 elements"):
        core.project(source, 0, left, left)
    with pytest.raises(ArgumentError, match="project"):
        core.project(source, 1, right, left)
    with pytest.raises(ArgumentError, match="project"):
        core.project(native.Source.from_arrays([values]), 0, right, left)  # nowhere to write the matrices
    with pytest.raises(ArgumentError, match="start is 1"):
        core.backproject(source, 1, left, right)
    with pytest.raises(ArgumentError, match="mean has 8"):
        core.reconstruct(source, 0, left, right, right, None, left)
    with pytest.raises(ArgumentError, match="base has 12"):
        core.reconstruct(source, 0, left, right, right, right, mean)
    for shapes, approximation_rank in (([(0, 4)], 1), ([(4, -1)], 1), ([(2**40, 2**40)], 1), ([(4, 6)], 0)):
        with pytest.raises(ArgumentError):
            native.Matrices(shapes, approximation_rank).project(source, 0, right, left)
