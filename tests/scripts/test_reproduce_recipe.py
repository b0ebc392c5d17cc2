"""A small version of the measurement of the recipes, and that threads stand for real ranks."""

from __future__ import annotations

import io
import json
import re
import sys

import numpy as np
import pytest
import reproduce_recipe
from PIL import Image
from training.data import DataError, load_cifar10

from .launch import LAUNCHERS, SCRIPTS, launch

SIZES = {"train": 256, "test": 20}


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """A file of few images, each of one colour that tells its class."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in SIZES.items():
        labels = rng.integers(0, 10, count).astype(np.uint8)
        files = []
        for label in labels:
            file = io.BytesIO()
            Image.fromarray(np.full((32, 32, 3), 25 * label, np.uint8)).save(file, "JPEG")
            files.append(np.frombuffer(file.getvalue(), np.uint8))
        arrays[f"{part}_jpeg"] = np.concatenate(files)
        arrays[f"{part}_offsets"] = np.cumsum([0, *map(len, files)])
        arrays[f"{part}_labels"] = labels
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, **arrays)
    return path


def test_jpeg_images_are_read(jpegs):
    task = load_cifar10(jpegs)
    assert task.train.inputs.shape == (256, 3, 32, 32)
    assert task.test.targets.dtype == np.int64
    for images, labels in (task.train, task.test):
        assert np.abs(images[:, 0, 5, 5].astype(int) - 25 * labels).max() <= 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda arrays: arrays.pop("test_labels"), "test_labels"),
        (lambda arrays: arrays.update(train_labels=arrays["train_labels"][:-1]), "do not fit 255 labels"),
        (lambda arrays: arrays.update(train_jpeg=arrays["train_jpeg"][9:]), "Error"),
    ],
)
def test_damaged_jpeg_images_are_refused(jpegs, tmp_path, damage, message):
    with np.load(jpegs) as file:
        arrays = dict(file)
    damage(arrays)
    np.savez(tmp_path / "damaged.npz", **arrays)
    with pytest.raises(DataError, match=rf"damaged.npz holds no JPEG images of CIFAR-10: .*{message}"):
        load_cifar10(tmp_path / "damaged.npz")


def test_it_measures_only_what_is_missing(jpegs, tmp_path, capsys, monkeypatch):
    full, balanced = (each for each in reproduce_recipe.CONFIGURATIONS if each.name in ("full SGD", "balanced"))
    monkeypatch.setattr(reproduce_recipe, "CONFIGURATIONS", (full, balanced))
    monkeypatch.setattr(reproduce_recipe, "SEARCH", reproduce_recipe.SEARCH[:1])
    arguments = ["--data", str(jpegs), "--seeds", "1", "--search", "1", "--epochs", "1", "--jobs", "1"]
    arguments += ["--output", str(tmp_path)]
    reproduce_recipe.main(arguments)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["name"] for row in report["recipes"]] == ["full SGD", "balanced"]
    assert report["recipes"][0]["share_of_bytes"] == pytest.approx(1, rel=0.01)
    assert report["recipes"][1]["share_of_bytes"] < 0.03
    assert (tmp_path / "recipes.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 3
    capsys.readouterr()

    reproduce_recipe.main(arguments)
    output = capsys.readouterr().out
    assert "seed 100" not in output  # nothing was trained
    assert re.search(r"balanced +1 +\d", output)


@pytest.mark.long
@pytest.mark.parametrize("name", ["balanced", "max_saving"])
def test_real_ranks_have_the_bits_of_threads(jpegs, name):
    run = reproduce_recipe.train(jpegs, name, epochs=4, seed=reproduce_recipe.FIRST_SEED)
    program = [str(SCRIPTS / "reproduce_recipe.py"), "--data", str(jpegs), "--epochs", "4", "--with-horovod", name]
    result = launch([*LAUNCHERS["mpirun"][:-1], "4", sys.executable, *program], launcher="python")
    assert result.returncode == 0, result.stdout
    real = json.loads(next(line for line in result.stdout.splitlines() if line.startswith("{")))
    assert real["model"] == run["model"]
    assert real["bytes_sent"] == run["bytes_sent"]
