"""Data to train on, as NumPy arrays: digits, CIFAR-10 from its standard folder, any text file's characters."""

from __future__ import annotations

import argparse
import dataclasses
import io
import pickle
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Prepare = Callable[[Array, "np.random.Generator | None"], Array]


class DataError(Exception):
    """The data is not there, or is not what its format says."""


class Examples(NamedTuple):
    """Inputs, and the class number of each; of text, the class number of each character."""

    inputs: Array
    targets: Array


@dataclasses.dataclass(frozen=True)
class Task:
    """A dataset.

    `prepare(inputs, generator)` makes of a batch what the model takes; with a generator, at random, for training.
    """

    train: Examples
    test: Examples
    num_classes: int
    prepare: Prepare = lambda inputs, generator: inputs

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers of training and of test examples."""
        return len(self.train.inputs), len(self.test.inputs)


def load_task(args: argparse.Namespace) -> Task:
    """Return the dataset that the command line names."""
    if args.dataset == "cifar10":
        return load_cifar10(args.data)
    if args.dataset == "text":
        return load_text(args.data, args.context)
    return load_digits()


def load_digits() -> Task:
    """1,198 training and 599 test images of handwritten digits, 8x8 pixels, that come with scikit-learn."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    images, labels = load(return_X_y=True)
    # The same third is held out in every run: seeds and configurations are compared on the same images.
    parts = train_test_split((images / 16).astype(np.float32), labels, test_size=1 / 3, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = parts
    return Task(Examples(train_images, train_labels), Examples(test_images, test_labels), num_classes=10)


CIFAR_FOLDER = "cifar-10-batches-py"
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR_MEAN = np.array([0.4914, 0.4822, 0.4465], np.float32).reshape(3, 1, 1)
CIFAR_STD = np.array([0.2470, 0.2435, 0.2616], np.float32).reshape(3, 1, 1)


def load_cifar10(data: Path) -> Task:
    """CIFAR-10 (A. Krizhevsky, 2009) from the folder `cifar-10-batches-py`, or from the one that holds it.

    Or from an `.npz` of JPEG files, as a smaller set may come: see `_read_jpeg_images`.
    """
    if data.suffix == ".npz":
        train, test = (Examples(*_read_jpeg_images(data, part)) for part in ("train", "test"))
        return Task(train, test, num_classes=10, prepare=prepare_cifar10)
    folder = data / CIFAR_FOLDER if (data / CIFAR_FOLDER).is_dir() else data
    if not folder.is_dir():
        raise DataError(f"--data: {data} is no folder; unpack {CIFAR_URL} and name the folder {CIFAR_FOLDER}")
    batches = sorted(folder.glob("data_batch_[1-5]"))
    if not batches or not (folder / "test_batch").is_file():
        raise DataError(
            f"--data: {folder} lacks data_batch_1 .. data_batch_5 or test_batch; unpack {CIFAR_URL} and name the "
            f"folder {CIFAR_FOLDER}"
        )
    images, labels = zip(*(_read_cifar_batch(path) for path in batches), strict=True)
    train = Examples(np.concatenate(images), np.concatenate(labels))
    return Task(train, Examples(*_read_cifar_batch(folder / "test_batch")), num_classes=10, prepare=prepare_cifar10)


def first_of_each_class(examples: Examples, count: int) -> Examples:
    """Return the first `count` examples of each class, in the order they have."""
    chosen = np.concatenate([np.flatnonzero(examples.targets == number)[:count] for number in range(10)])
    chosen.sort()
    return Examples(examples.inputs[chosen], examples.targets[chosen])


def prepare_cifar10(images: Array, generator: np.random.Generator | None, pixels: int = 4) -> Array:
    """Standardize (N, 3, 32, 32) uint8 images; with a generator also shift, by `pixels` at most, and mirror each."""
    if generator is not None:
        images = _shift_and_mirror(images, generator, pixels)
    return (images.astype(np.float32) / 255 - CIFAR_MEAN) / CIFAR_STD


def _shift_and_mirror(images: Array, generator: np.random.Generator, pixels: int) -> Array:
    count, channels, height, width = images.shape
    padded = np.pad(images, ((0, 0), (0, 0), (pixels, pixels), (pixels, pixels)))
    rows = np.arange(height) + generator.integers(0, 2 * pixels + 1, (count, 1))
    columns = np.arange(width) + generator.integers(0, 2 * pixels + 1, (count, 1))
    columns = np.where(generator.random((count, 1)) < 0.5, columns[:, ::-1], columns)
    image = np.arange(count)[:, None, None, None]
    channel = np.arange(channels)[None, :, None, None]
    shifted: Array = padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
    return shifted


class _ArrayUnpickler(pickle.Unpickler):
    """Reads dicts of arrays and nothing else: a pickle may name any function, and this one came from the network."""

    _ALLOWED: ClassVar = {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.numeric", "_frombuffer"),
        ("_codecs", "encode"),
    }

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="bytes")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR-10 batch does")
        if module.startswith("numpy.core"):  # where it was before NumPy 2
            module = module.replace("numpy.core", "numpy._core") if hasattr(np, "_core") else module
        return super().find_class(module, name)


def _read_cifar_batch(path: Path) -> tuple[Array, Array]:
    try:
        with path.open("rb") as file:
            batch = _ArrayUnpickler(file).load()
        images = np.array(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32)
        labels = np.array(batch[b"labels"], np.int64)
        if len(images) != len(labels) or (len(labels) and not 0 <= labels.min() <= labels.max() < 10):
            raise ValueError(f"{len(images)} images do not fit its {len(labels)} labels of 0..9")
    except (OSError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"--data: {path} is no batch of CIFAR-10: {error!r}") from error
    return images, labels


def _read_jpeg_images(path: Path, part: str) -> tuple[Array, Array]:
    """Return images and labels of a part, "train" or "test".

    The arrays are PART_jpeg, all files end to end, PART_offsets, where each begins and the last one ends, and
    PART_labels.
    """
    from PIL import Image

    try:
        with np.load(path) as arrays:
            files, offsets, labels = (arrays[f"{part}_{name}"] for name in ("jpeg", "offsets", "labels"))
        images = np.stack(
            [np.asarray(Image.open(io.BytesIO(files[start:stop]))) for start, stop in pairwise(offsets.tolist())]
        )
        if images.shape != (len(labels), 32, 32, 3) or not labels.max() < 10:
            raise ValueError(f"images of shape {images.shape} do not fit {len(labels)} labels of 0..9")
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"--data: {path} holds no JPEG images of CIFAR-10: {error!r}") from error
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels.astype(np.int64)


def load_text(path: Path, context: int) -> Task:
    """Windows of `context` characters of a UTF-8 file, each to be continued by one; the last tenth is held out."""
    if not path.is_file():
        raise DataError(f"--data: {path} is no file; name a text file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"--data: {path} is no UTF-8 text: {error}") from error
    vocabulary = {character: i for i, character in enumerate(sorted(set(text)))}
    characters = np.array([vocabulary[character] for character in text], np.int64)
    num_train = len(text) * 9 // 10
    train, test = (_windows(part, context) for part in (characters[:num_train], characters[num_train:]))
    if not len(train.inputs) or not len(test.inputs):
        raise DataError(
            f"--data: {path} has {len(text)} characters; a context of {context} needs at least {10 * context + 1}"
        )
    return Task(train, test, len(vocabulary))


def _windows(characters: Array, context: int) -> Examples:
    count = max(0, (len(characters) - 1) // context)
    inputs = characters[: count * context].reshape(count, context)
    targets = characters[1 : count * context + 1].reshape(count, context) if count else inputs
    return Examples(inputs, targets)
