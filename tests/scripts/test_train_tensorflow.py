"""The trainers with TensorFlow, under a launcher: two jobs for all tests, since starting one takes long."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from .launch import launch, read_log
from .test_train import DIGITS_PARAMETERS, Evil, assert_identical, write_cifar10

DIGITS = "--epochs 4 --bits 2 --eval-every 5"
CIFAR = "--dataset cifar10 --data {folder} --batch-size 20 --epochs 2 --optimizer adamw --compression qsgd --period 2"


def launch_several(folder: Path, *command_lines: str) -> str:
    """Run trainers on two ranks, one after the other; a file in a command line is one in `folder`."""
    program = Path(__file__).with_name("several.py")
    lines = [f"{line.format(folder=folder)} --quiet --threads 1" for line in command_lines]
    result = launch([sys.executable, str(program), *lines], "mpirun")
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tensorflow")
    write_cifar10(folder)
    return folder


def files(name: str) -> str:
    return f"--checkpoint {{folder}}/{name}.npz --log-file {{folder}}/{name}.jsonl"


@pytest.fixture(scope="module")
def first_job(folder) -> str:
    """Whole runs, and some that stop in the middle."""
    return launch_several(
        folder,
        f"train_keras {DIGITS} {files('keras')}",
        f"train_keras {DIGITS} {files('keras-parts')} --stop-after 20",
        f"train_tf {CIFAR} {files('tf')}",
        f"train_tf {CIFAR} {files('tf-parts')} --stop-after 3",
        "train_tf --epochs 4 --period 1 --log-file {folder}/loop.jsonl",
        "train_keras --stock --epochs 1 --log-file {folder}/keras-stock.jsonl",
        "train_tf --stock --epochs 1 --log-file {folder}/tf-stock.jsonl",
        "train_keras --dataset cifar10 --data {folder} --batch-size 20 --epochs 1 --period 1 "
        "--log-file {folder}/cifar.jsonl",
    )


@pytest.fixture(scope="module")
def second_job(folder, first_job) -> str:
    """The rest of those that have stopped, in new processes, and what is refused."""
    return launch_several(
        folder,
        f"train_keras {DIGITS} {files('keras-parts')} --resume",
        f"train_tf {CIFAR} {files('tf-parts')} --resume",
        "train_keras --bits 9",
        "train_tf --batch-size 5000",
        f"train_tf {CIFAR} --seed 1 --resume --checkpoint {{folder}}/tf.npz",
        "train_tf --dataset text --data {folder}/book.txt",
        "train_keras --help",
    )


def steps_of(log: Path) -> list[dict[str, Any]]:
    return [record for record in read_log(log) if record["event"] == "step"]


def test_digits_are_learned_by_fit(folder, first_job):
    start, *records, end = read_log(folder / "keras.jsonl")
    assert start["parameters"] == DIGITS_PARAMETERS
    assert start["settings"]["num_ranks"] == 2
    assert [record["step"] for record in records if record["event"] == "step"] == list(range(1, 73))
    # Evaluation waits for the average.
    assert [record["step"] for record in records if record["event"] == "eval"] == [8, 16, 24, 32, 40, 48, 56, 64, 72]
    assert end["final_test_accuracy"] > 0.9
    assert f"test accuracy {end['final_test_accuracy']:.2%}" in first_job
    assert "retracing" not in first_job  # TensorFlow's warning
    assert end["uncompressed_bytes"] == 72 * 4 * DIGITS_PARAMETERS
    assert 110 < end["compression_ratio"] <= 128
    sent = [record["bytes_sent"] for record in records if record["event"] == "step"]
    assert sent[6] == 0
    assert sent[7] > 0
    assert sent[-1] == end["bytes_sent"] == 9 * sent[7]
    # The loss is a batch's, not the mean of the epoch so far, which never jumps.
    losses = np.array([record["loss"] for record in records if record["event"] == "step"][-18:])
    assert np.abs(np.diff(losses)).max() > 0.1 * losses.mean()


def test_digits_are_learned_by_a_loop(folder, first_job):
    *_, end = read_log(folder / "loop.jsonl")
    assert end["final_test_accuracy"] > 0.9
    assert end["step"] == 72
    assert 7.5 < end["compression_ratio"] <= 8


@pytest.mark.parametrize("name", ["keras-stock", "tf-stock"])
def test_stock_sends_float32(folder, first_job, name):
    start, *_, end = read_log(folder / f"{name}.jsonl")
    assert "ring formula" in start["bytes"]
    assert end["bytes_sent"] == end["uncompressed_bytes"] == 18 * 4 * DIGITS_PARAMETERS
    assert end["final_test_accuracy"] > 0.3


def test_both_loops_take_the_same_steps(folder, first_job):
    """Two programs, the same training: stock losses are those of ranks that communicate, in both."""
    losses = [[record["loss"] for record in steps_of(folder / f"{name}.jsonl")] for name in ("keras-stock", "tf-stock")]
    np.testing.assert_allclose(*losses, rtol=1e-3)


def test_cifar10_is_trained(folder, first_job):
    for name, num_steps in (("cifar", 5), ("tf", 10)):
        start, *_, end = read_log(folder / f"{name}.jsonl")
        assert start["parameters"] >= 1_000_000
        assert (start["train_examples"], start["test_examples"]) == (200, 40)
        losses = [record["loss"] for record in steps_of(folder / f"{name}.jsonl")]
        assert len(losses) == num_steps
        assert np.isfinite(losses).all()
        assert end["compression_ratio"] > 7


@pytest.mark.parametrize(("name", "stopped", "last"), [("keras", 24, 72), ("tf", 4, 10)])
def test_resumed_run_is_bit_exact(folder, first_job, second_job, name, stopped, last):
    """Each rank's momentum or moments, data and augmentation, rate, anchor and rounding noise all have to go on."""
    from training.tensorflow.files import load

    assert f"step {stopped}:" in first_job
    whole, parts = (load(folder / f"{each}.npz") for each in (name, f"{name}-parts"))
    assert whole["common"].pop("seconds") > 0
    assert parts["common"].pop("seconds") > 0
    assert whole["common"]["step"] == last
    assert_identical(parts, whole)
    first, second = (rank["optimizer"] for rank in whole["ranks"])
    assert any(
        not np.array_equal(first[key], second[key]) for key in first
    )  # each rank's own: one for all would not do
    assert all(np.array_equal(first[key], second[key]) for key in first if key.startswith("pqasgd."))
    assert "pqasgd.anchor.0" in first
    logs = [folder / f"{each}.jsonl" for each in (name, f"{name}-parts")]
    assert [record["step"] for record in read_log(logs[1]) if record["event"] == "start"] == [0, stopped]
    assert steps_of(logs[1]) == steps_of(logs[0])


def test_what_is_refused_is_a_message_of_all_ranks(second_job):
    for message in (
        "train_keras.py exits: train_keras.py: error: bits is 9",
        "train_tf.py exits: train_tf.py: error: --batch-size is 5000, but each of 2 ranks has only 599 examples",
        "tf.npz is of another run: seed was 0 and is 1; resume it with the settings it had",
        "train_tf.py: error: argument --dataset: invalid choice: 'text'",
    ):
        assert second_job.count(message) == 2, message
    assert "Traceback" not in second_job


def test_help_names_what_there_is(second_job):
    assert "{digits,cifar10}" in second_job
    assert "train.py, with PyTorch, also has a text model" in " ".join(second_job.split())
    assert "--context" not in second_job


def test_checkpoint_files_hold_what_was_written(tmp_path):
    from training.tensorflow.files import load, write

    arrays = [np.arange(6.0, dtype=np.float32).reshape(2, 3), np.array(7, np.int64)]
    content = {"common": {"settings": {"bits": None, "lr": 0.1}, "model": arrays}, "ranks": [{"own": arrays[0]}, {}]}
    write(content, tmp_path / "file.npz")
    read = load(tmp_path / "file.npz")
    assert_identical(read, content)
    assert read["common"]["model"][1].dtype == np.int64
    assert_array_equal(read["ranks"][0]["own"], arrays[0])


def test_wrong_checkpoints_are_refused(tmp_path):
    from training import checkpoint
    from training.tensorflow.files import load

    path = tmp_path / "checkpoint.npz"
    np.savez(tmp_path / "other.npz", weights=np.ones(3))
    np.savez(tmp_path / "evil.npz", content=np.array([Evil()], dtype=object))
    other, evil = ((tmp_path / f"{name}.npz").read_bytes() for name in ("other", "evil"))
    for content, message in (
        (b"", "No data left in file"),
        (b"no checkpoint", "pickled (object) data"),
        (pickle.dumps(Evil(), protocol=2), "pickled (object) data"),
        (other[:100], "File is not a zip file"),
        (other, "content is not a file in the archive"),
        (evil, "Object arrays cannot be loaded"),
    ):
        path.write_bytes(content)
        with pytest.raises(checkpoint.CheckpointError, match="is no checkpoint of this program") as error_info:
            checkpoint.read(path, {}, load)
        assert message in str(error_info.value)
