"""Variables and a model, numbers that differ between ranks, and comparisons between ranks."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import pqasgd_horovod.tensorflow as hvd
import pqasgd_horovod.tensorflow.keras as hvd_keras

several_ranks = pytest.mark.skipif(hvd.size() < 2, reason="needs two ranks: make test-2")
two_ranks = pytest.mark.skipif(hvd.size() != 2, reason="written for two ranks: make test-2")

EDEN2 = hvd.Compression.eden(bits=2)
EDEN4 = hvd.Compression.eden(bits=4)

SHAPES: tuple[tuple[int, ...], ...] = ((30, 60), (60,), (60, 40), (40, 5))
"""Two tensors that are compressed by default, and two that are too small for it."""


def everybody(value: Any) -> list[Any]:
    """What each rank has, in rank order."""
    return hvd.allgather_object(value, name="test.everybody")


# ---- variables whose gradients are given ----


def start(dtype: Any = np.float32, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[np.ndarray]:
    """The numbers that training starts from, on every rank."""
    generator = np.random.default_rng(1)
    return [generator.standard_normal(shape).astype(dtype) for shape in shapes]


def make_variables(dtype: Any = np.float32, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[tf.Variable]:
    """TensorFlow's own variables with these numbers."""
    return [tf.Variable(value, name=f"v{i}") for i, value in enumerate(start(dtype, shapes))]


def gradients_of(
    step: int, rank: int | None = None, dtype: Any = np.float32, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> list[np.ndarray]:
    """Gradients of this rank, or of another."""
    generator = np.random.default_rng([step, hvd.rank() if rank is None else rank])
    return [generator.standard_normal(shape).astype(dtype) for shape in shapes]


def apply(
    optimizer: Any, variables: Sequence[Any], steps: Iterable[int], gradients: Callable[[int], Any] = gradients_of
) -> None:
    """The ordinary loop, eagerly."""
    for step in steps:
        optimizer.apply_gradients(zip(map(tf.constant, gradients(step)), variables, strict=True))


def wrap(inner: Any = None, **options: Any) -> Any:
    """A DistributedOptimizer that checks the replicas after every average; variables have no buffers."""
    if "averaging" not in options:
        options["averaging"] = hvd.PeriodicAveraging(period=options.pop("period", 1), buffers="local")
    return hvd_keras.DistributedOptimizer(
        keras.optimizers.SGD(0.5) if inner is None else inner, **{"check_consistency": True, **options}
    )


def values(variables: Iterable[Any]) -> list[np.ndarray]:
    """Copies, as NumPy has them."""
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]


# ---- uneven data ----


def uneven_batches(epoch: int, rank: int | None = None) -> range:
    """The steps of a rank's epoch: 3, 5, 1 and 2 of them, and the other way round in the second epoch."""
    counts = (3, 5, 1, 2)[: hvd.size()]
    number = hvd.rank() if rank is None else rank
    return range(100 * epoch, 100 * epoch + (counts if epoch == 0 else counts[::-1])[number])


def last_rank(epoch: int) -> int:
    """The rank with the most steps."""
    return max(range(hvd.size()), key=lambda rank: len(uneven_batches(epoch, rank)))


# ---- a model ----


def make_model(norm: bool = False, dropout: bool = False, seed: int = 1) -> keras.Sequential:
    """Two large weights, small ones, and what of statistics and dropout is asked for."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((30,)),
            keras.layers.Dense(60, activation="relu"),
            *([keras.layers.BatchNormalization()] if norm else []),
            *([keras.layers.Dropout(0.2)] if dropout else []),
            keras.layers.Dense(40),
            keras.layers.Dense(5),
        ]
    )


def examples(batches: int, rank: int | None = None, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Batches of eight examples of this rank, or of another."""
    inputs, labels = [], []
    for step in range(first, first + batches):
        generator = np.random.default_rng([step, hvd.rank() if rank is None else rank])
        inputs.append(generator.standard_normal((8, 30)).astype(np.float32))
        labels.append(generator.integers(0, 5, 8))
    return np.concatenate(inputs), np.concatenate(labels)


def compiled(optimizer: Any, model: keras.Model | None = None, **options: Any) -> keras.Model:
    """The model with this optimizer."""
    model = make_model() if model is None else model
    model.compile(optimizer, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), **options)
    return model


def fit(model: keras.Model, batches: int, first: int = 0, rank: int | None = None, **options: Any) -> dict[str, Any]:
    """One epoch of ``model.fit`` on the examples of a rank, in order; return its history."""
    inputs, labels = examples(batches, rank, first)
    options = {"batch_size": 8, "shuffle": False, "verbose": 0, **options}
    history: dict[str, Any] = model.fit(inputs, labels, **options).history
    return history


def train(model: keras.Model, steps: Iterable[int], rank: int | None = None) -> None:
    """Batch by batch; unlike ``fit`` it does not end with a flush."""
    for step in steps:
        model.train_on_batch(*examples(1, rank, step))


def weights(model: keras.Model) -> list[np.ndarray]:
    """Floating-point weights, copied; states of random generators differ between ranks, and are to."""
    return values(v for v in model.weights if keras.backend.is_float_dtype(v.dtype))


# ---- comparisons ----


def assert_equal(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> None:
    """The same bits."""
    assert len(one) == len(other)
    for i, (mine, its) in enumerate(zip(one, other, strict=True)):
        assert (mine.dtype, mine.shape) == (its.dtype, its.shape)
        if mine.tobytes() != its.tobytes():
            np.testing.assert_array_equal(mine, its, err_msg=f"number {i}")
            raise AssertionError(f"number {i}: the same numbers in other bits")


def differ(arrays: Sequence[np.ndarray]) -> bool:
    """Whether some rank has other bits than rank 0."""
    return len(set(everybody(b"".join(array.tobytes() for array in arrays)))) > 1


def assert_replicas_equal(what: Any) -> None:
    """The same bits on every rank: of a model's weights, or of variables."""
    mine = weights(what) if isinstance(what, keras.Model) else values(what)
    for other in everybody(mine):
        assert_equal(mine, other)


KINDS = ("ArgumentError", "MismatchError", "DesynchronizedError", "NonFiniteError", "WireFormatError")


def told(error: Exception) -> str:
    """What this package says in an error, be it its own or one that a graph has raised."""
    if type(error).__name__ in KINDS:
        return f"{type(error).__name__}: {error}"
    for line in reversed(str(error).splitlines()):  # of a trace it begins with lines of our source
        found = re.search(f"\\b(?:{'|'.join(KINDS)}): .*", line)
        if found:
            return re.sub(r" \[Op:.*", "", found[0])
    raise AssertionError(f"not an error of this package: {type(error).__name__}: {error}")


def assert_raises_everywhere(kind: str, function: Callable[[], Any], seconds: float = 20.0) -> str:
    """Every rank raises an error that tells of ``kind``, with the same text, soon; return the text."""
    began = time.monotonic()
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is looked at below
        function()
    took = time.monotonic() - began
    texts = everybody(told(caught.value))
    assert len(set(texts)) == 1, texts
    assert texts[0].startswith(f"{kind}: "), texts[0]
    assert took < seconds
    return texts[0]
