"""The trainer: its parts in this process, and short runs of it under the launchers."""

from __future__ import annotations

import argparse
import io
import pickle
import shlex
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from .launch import SCRIPTS, launch, launch_train, read_log, train

DIGITS_PARAMETERS = 64 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 10 + 10
JPEG_IMAGES = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10_12k_jpeg.npz"


def write_text(path: Path, repetitions: int = 40) -> Path:
    path.write_text("The quick brown fox jumps over the lazy dög.\n" * repetitions, encoding="utf-8")
    return path


def write_cifar10(folder: Path, num_images: int = 40) -> Path:
    """A folder of CIFAR-10's format, with real images where they are at hand."""
    folder = folder / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    if JPEG_IMAGES.is_file():
        from PIL import Image

        with np.load(JPEG_IMAGES) as data:
            jpeg, offsets, all_labels = data["train_jpeg"], data["train_offsets"], data["train_labels"]
        files = [jpeg[offsets[i] : offsets[i + 1]].tobytes() for i in range(6 * num_images)]
        images = np.stack([np.asarray(Image.open(io.BytesIO(file))).transpose(2, 0, 1) for file in files])
        labels = all_labels[: 6 * num_images]
    else:
        images = rng.integers(0, 256, (6 * num_images, 3, 32, 32), np.uint8)
        labels = rng.integers(0, 10, 6 * num_images)
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        part = slice(i * num_images, (i + 1) * num_images)
        batch = {
            b"data": images[part].reshape(num_images, 3072).astype(np.uint8),
            b"labels": [int(label) for label in labels[part]],
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return folder


# Arguments.


def test_defaults_are_pqasgd():
    from training.arguments import parse_arguments

    args = parse_arguments(None, [])
    assert (args.dataset, args.compression, args.bits, args.period, args.stock) == ("digits", "quantize", 4, 8, False)
    args = parse_arguments(None, ["--dataset", "text", "--data", "book.txt"])
    assert (args.optimizer, args.lr) == ("adamw", 2e-3)
    args = parse_arguments(None, ["--compression", "stock"])
    assert (args.stock, args.period, args.bits) == (True, 1, None)


@pytest.mark.parametrize(
    ("command_line", "message"),
    [
        ("--stock --compression qsgd", "--stock and --compression qsgd exclude each other"),
        ("--stock --period 8", "--period 8 has no meaning with --stock"),
        ("--compression fp16 --bits 4", "--bits is for quantize, eden, maxscale, qsgd; it has no meaning with fp16"),
        ("--data folder", "--data has no meaning with --dataset digits"),
        ("--dataset cifar10", "--dataset cifar10 needs --data: the folder cifar-10-batches-py"),
        ("--dataset text", "--dataset text needs --data: a text file"),
        ("--resume", "--resume needs --checkpoint FILE"),
        ("--stop-after 5", "--stop-after needs --checkpoint FILE"),
        ("--period 0", "argument --period: 0 is not > 0"),
        ("--epochs 1.5", "argument --epochs: invalid int value: '1.5'"),
        ("--lr nan", "argument --lr: nan is not > 0"),
        ("--lr inf", "argument --lr: inf is not > 0"),
        ("--warmup 2", "argument --warmup: 2 is not between 0 and 1"),
        ("--compression zip", "argument --compression: invalid choice: 'zip'"),
    ],
)
def test_wrong_arguments_are_refused(command_line, message, capsys):
    from training.arguments import parse_arguments

    with pytest.raises(SystemExit) as exit_info:
        parse_arguments(None, command_line.split())
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_shared_parts_import_no_framework():
    modules = sorted(f"training.{path.stem}" for path in (SCRIPTS / "training").glob("*.py") if path.stem != "__init__")
    assert len(modules) > 5
    frameworks = "{'horovod', 'keras', 'tensorflow', 'torch'}"
    program = f"import sys, {', '.join(modules)}; print({frameworks} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", program], cwd=SCRIPTS, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


# Data.


def test_digits_are_split_the_same_way_every_time():
    from training.data import load_digits

    first, second = load_digits(), load_digits()
    assert first.sizes == (1198, 599)
    assert_array_equal(first.test.inputs, second.test.inputs)
    assert first.train.inputs.max() == 1


def test_models_have_a_million_parameters():
    from training.torch.models import CharacterTransformer, CifarNet, DigitsNet

    for model in (DigitsNet(), CifarNet(), CharacterTransformer(vocabulary_size=65, context=128)):
        sizes = [parameter.numel() for parameter in model.parameters()]
        assert sum(sizes) >= 1_000_000
        # Small tensors travel uncompressed: they must not be much of the whole.
        assert sum(size for size in sizes if size < 1024) < 0.01 * sum(sizes)


def test_transformer_does_not_look_ahead():
    from training.torch.models import CharacterTransformer

    model = CharacterTransformer(vocabulary_size=7, context=12).eval()
    characters = torch.randint(7, (1, 12))
    changed = characters.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 7
    with torch.no_grad():
        before, after = model(characters), model(changed)
    assert before.shape == (1, 7, 12)
    torch.testing.assert_close(before[..., :8], after[..., :8])
    assert not torch.allclose(before[..., 8:], after[..., 8:])


@pytest.mark.parametrize("named", ["folder", "parent"])
def test_cifar10_is_read_from_its_standard_folder(tmp_path, named):
    from training.data import load_cifar10

    folder = write_cifar10(tmp_path)
    task = load_cifar10(folder if named == "folder" else tmp_path)
    assert task.sizes == (200, 40)
    with (folder / "test_batch").open("rb") as file:
        batch = pickle.load(file)
    images, labels = task.test
    assert_array_equal(images.reshape(40, 3072), batch[b"data"])
    assert labels.tolist() == batch[b"labels"]


def test_cifar10_training_images_are_shifted_and_mirrored():
    from training.data import CIFAR_MEAN, CIFAR_STD, prepare_cifar10

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, 3, 32, 32), np.uint8)
    plain = prepare_cifar10(images, None)
    np.testing.assert_allclose(plain * CIFAR_STD + CIFAR_MEAN, images / 255, rtol=0, atol=1e-6)
    augmented = prepare_cifar10(images, rng)
    padded = np.pad(images, ((0, 0), (0, 0), (4, 4), (4, 4)))
    padded = (padded.astype(np.float32) / 255 - CIFAR_MEAN) / CIFAR_STD
    mirrored = 0
    for image, source in zip(augmented, padded, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(source, (32, 32), axis=(1, 2)).transpose(1, 2, 0, 3, 4)
        straight = bool((windows == image).all(axis=(2, 3, 4)).any())
        flipped = bool((windows[..., ::-1] == image).all(axis=(2, 3, 4)).any())
        assert straight != flipped
        mirrored += flipped
    assert 16 < mirrored < 48


class Evil:
    def __reduce__(self):
        return eval, ("1 + 1",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no pickle", "is no batch of CIFAR-10"),
        (b"", "is no batch of CIFAR-10"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8)}), "labels"),
        (pickle.dumps([1, 2]), "is no batch of CIFAR-10"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}), "2 images do not fit its 1 labels"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}), "labels of 0..9"),
        (pickle.dumps({b"data": Evil(), b"labels": []}), "builtins.eval, which no CIFAR-10 batch does"),
    ],
    ids=["no pickle", "empty", "no labels", "no dict", "other sizes", "wrong label", "evil"],
)
def test_damaged_cifar10_is_refused(tmp_path, content, message):
    from training.data import DataError, load_cifar10

    folder = write_cifar10(tmp_path)
    (folder / "data_batch_3").write_bytes(content)
    with pytest.raises(DataError, match=r"data_batch_3.*"):
        load_cifar10(folder)
    with pytest.raises(DataError) as error_info:
        load_cifar10(folder)
    assert message in str(error_info.value)


def test_missing_cifar10_says_where_to_get_it(tmp_path):
    from training.data import DataError, load_cifar10

    with pytest.raises(DataError, match=r"nowhere is no folder; unpack https://.*cifar-10-python.tar.gz"):
        load_cifar10(tmp_path / "nowhere")
    with pytest.raises(DataError, match="lacks data_batch_1"):
        load_cifar10(tmp_path)


def test_text_targets_are_the_next_characters(tmp_path):
    from training.data import load_text

    text = write_text(tmp_path / "text.txt").read_text(encoding="utf-8")
    task = load_text(tmp_path / "text.txt", context=16)
    inputs, targets = task.train
    assert len(inputs) == (len(text) * 9 // 10 - 1) // 16
    assert_array_equal(inputs.flatten()[1:], targets.flatten()[:-1])
    vocabulary = sorted(set(text))
    assert "".join(vocabulary[i] for i in inputs[0]) == text[:16]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no file; name a text file"),
        (b"\xff\xfe\x00", "is no UTF-8 text"),
        (b"", "has 0 characters; a context of 16 needs at least 161"),
        (b"a" * 160, "has 160 characters; a context of 16 needs at least 161"),
    ],
    ids=["missing", "no text", "empty", "short"],
)
def test_wrong_text_is_refused(tmp_path, content, message):
    from training.data import DataError, load_text

    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as error_info:
        load_text(path, context=16)
    assert message in str(error_info.value)


def test_shortest_text_is_taken(tmp_path):
    from training.data import load_text

    (tmp_path / "text.txt").write_bytes(b"a" * 161)
    assert load_text(tmp_path / "text.txt", context=16).sizes == (8, 1)


# Batches, schedule, log, checkpoint.


def test_batches_of_an_epoch_are_shared_out_and_follow_from_the_step():
    from training.batches import batches_after
    from training.data import Examples, Task

    examples = Examples(np.arange(23), np.arange(23) * 10)
    # As if augmented: what a batch becomes has to follow from the step too.
    task = Task(examples, examples, num_classes=10, prepare=lambda inputs, rng: inputs + 100 * rng.integers(1000))
    args = argparse.Namespace(batch_size=3, seed=1)
    ranks = [list(islice(batches_after(0, task, args, rank, 2), 9)) for rank in (0, 1)]
    targets = np.array([[batch for _, batch in batches] for batches in ranks])
    for epoch in range(3):  # of three steps
        seen = targets[:, 3 * epoch : 3 * epoch + 3].ravel()
        assert len(set(seen)) == 18
        assert set(seen) <= set(examples.targets)
    assert not np.array_equal(targets[:, :3], targets[:, 3:6])
    for step in (1, 3, 5):
        assert_array_equal(list(islice(batches_after(step, task, args, 1, 2), 9 - step)), ranks[1][step:])


def test_batches_need_enough_examples():
    from training.batches import count_steps
    from training.data import DataError, load_digits

    assert count_steps(load_digits(), argparse.Namespace(batch_size=599), num_ranks=2) == 1
    with pytest.raises(DataError, match="--batch-size is 600, but each of 2 ranks has only 599 examples"):
        count_steps(load_digits(), argparse.Namespace(batch_size=600), num_ranks=2)


def test_learning_rate_rises_and_falls():
    from training.schedule import warmup_cosine

    factor = warmup_cosine(warmup_steps=4, total_steps=20)
    assert [factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert factor(12) == pytest.approx(0.5)
    assert 0 < factor(19) < 0.02
    assert warmup_cosine(warmup_steps=0, total_steps=1)(0) == 1


def test_log_drops_what_came_after_the_checkpoint(tmp_path):
    from training.log import JsonLog

    path = tmp_path / "new" / "log.jsonl"
    log = JsonLog(path)
    for step in range(1, 6):
        log.write("step", step=step)
    log.write("end", step=3)
    log.close()
    with path.open("a") as file:
        file.write('{"event": "st')  # killed while it wrote
    log = JsonLog(path, resume_at=3)
    log.write("step", step=4)
    log.close()
    assert [(record["event"], record["step"]) for record in read_log(path)] == [("step", i) for i in (1, 2, 3, 4)]


def test_wrong_checkpoints_are_refused(tmp_path):
    from training import checkpoint
    from training.torch.files import load

    path = tmp_path / "checkpoint.pt"
    with pytest.raises(checkpoint.CheckpointError, match=r"is no file; leave out --resume"):
        checkpoint.read(path, {}, load)
    for content in (b"", b"no checkpoint", pickle.dumps(Evil(), protocol=2)):
        path.write_bytes(content)
        with pytest.raises(checkpoint.CheckpointError, match=r"is no checkpoint of this program"):
            checkpoint.read(path, {}, load)
    torch.save({"common": {"settings": {"bits": 4, "num_ranks": 2}}}, path)
    with pytest.raises(
        checkpoint.CheckpointError, match=r"bits was 4 and is 2; num_ranks was 2 and is 3; resume it with the settings"
    ):
        checkpoint.read(path, {"bits": 2, "num_ranks": 3}, load)


# Whole runs.


def test_digits_are_learned_with_horovodrun(tmp_path):
    output = train("--epochs", 4, "--bits", 2, "--log-file", tmp_path / "log.jsonl")
    start, *records, end = read_log(tmp_path / "log.jsonl")
    assert start["parameters"] == DIGITS_PARAMETERS
    assert [record["step"] for record in records if record["event"] == "step"] == list(range(1, 73))
    # An epoch has 18 steps, and evaluation waits for the average.
    assert [record["step"] for record in records if record["event"] == "eval"] == [24, 40, 56, 72]
    assert end["final_test_accuracy"] > 0.9
    assert f"test accuracy {end['final_test_accuracy']:.2%}" in output
    assert end["uncompressed_bytes"] == 72 * 4 * DIGITS_PARAMETERS
    assert 110 < end["compression_ratio"] <= 128
    sent = [record["bytes_sent"] for record in records if record["event"] == "step"]
    assert sent[6] == 0
    assert sent[7] > 0
    assert sent[-1] == end["bytes_sent"] == 9 * sent[7]


def test_stock_horovod_is_trained_with_mpirun(tmp_path):
    train("--stock", "--epochs", 1, "--log-file", tmp_path / "log.jsonl", launcher="mpirun")
    start, *_, end = read_log(tmp_path / "log.jsonl")
    assert "ring formula" in start["bytes"]
    assert start["settings"]["num_ranks"] == 2
    assert end["bytes_sent"] == end["uncompressed_bytes"] == 18 * 4 * DIGITS_PARAMETERS
    assert end["compression_ratio"] == 1


def test_one_rank_needs_no_launcher(tmp_path):
    output = train("--epochs", 1, "--log-file", tmp_path / "log.jsonl", launcher="python")
    end = read_log(tmp_path / "log.jsonl")[-1]
    assert (end["step"], end["bytes_sent"], end["compression_ratio"]) == (37, 0, None)
    assert "nothing sent" in output


def test_cifar10_is_trained(tmp_path):
    folder = write_cifar10(tmp_path)
    log = tmp_path / "log.jsonl"
    train("--dataset", "cifar10", "--data", folder, "--batch-size", 20, "--epochs", 1, "--compression", "qsgd",
          "--period", 2, "--log-file", log)  # fmt: skip
    records = read_log(log)
    assert records[0]["settings"]["num_ranks"] == 2
    losses = [record["loss"] for record in records if record["event"] == "step"]
    assert len(losses) == 5
    assert np.isfinite(losses).all()
    assert records[-1]["compression_ratio"] > 10


def assert_identical(actual, expected):
    assert type(actual) is type(expected)
    if isinstance(actual, (torch.Tensor, np.ndarray)):
        assert_array_equal(actual, expected)
    elif isinstance(actual, dict):
        assert list(actual) == list(expected)
        for key in actual:
            assert_identical(actual[key], expected[key])
    elif isinstance(actual, (list, tuple)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_identical(one, other)
    else:
        assert actual == expected


def test_resumed_run_is_bit_exact(tmp_path):
    """Dropout, AdamW's moments of each rank, the data's order, the learning rate and the anchor all have to go on."""
    text = write_text(tmp_path / "text.txt", repetitions=160)
    arguments = ("--dataset", "text", "--data", text, "--context", 16, "--epochs", 1, "--bits", 2, "--period", 3)
    arguments += ("--batch-size", 16, "--eval-every", 5)
    for name, options in (("whole", ()), ("parts", ("--stop-after", 7)), ("parts", ("--resume",))):
        files = ("--checkpoint", tmp_path / f"{name}.pt", "--log-file", tmp_path / f"{name}.jsonl")
        output = train(*arguments, *files, *options)
        if "--stop-after" in options:
            assert "step 9:" in output  # the first average after 7 steps, in the middle of the epoch
    whole, parts = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "parts"))
    assert whole["common"].pop("seconds") > 0
    assert parts["common"].pop("seconds") > 0
    assert whole["common"]["step"] == 12
    assert_identical(parts, whole)
    moments = [rank["optimizer"]["state"][0]["exp_avg"] for rank in whole["ranks"]]
    assert not torch.equal(*moments)  # each rank's own: one for all would not do
    logs = {name: read_log(tmp_path / f"{name}.jsonl") for name in ("whole", "parts")}
    assert [record["step"] for record in logs["parts"] if record["event"] == "start"] == [0, 9]
    steps = {name: [record for record in log if record["event"] == "step"] for name, log in logs.items()}
    assert steps["parts"] == steps["whole"]


def test_data_that_one_rank_lacks_ends_the_job_on_both(tmp_path):
    write_text(tmp_path / "text-0.txt")
    program = shlex.join([sys.executable, str(SCRIPTS / "train.py"), "--dataset", "text", "--context", "16"])
    result = launch(["bash", "-c", f"exec {program} --data {shlex.quote(str(tmp_path))}/text-$HOROVOD_RANK.txt"])
    assert result.returncode != 0
    assert "text-1.txt is no file; name a text file (on ranks 1 only)" in result.stdout


def test_what_the_optimizer_refuses_is_a_message(tmp_path):
    result = launch_train("--bits", 9, launcher="python")
    assert result.returncode == 1
    assert "train.py: error: bits is 9" in result.stdout
    assert "Traceback" not in result.stdout
    result = launch_train("--batch-size", 5000, launcher="python")
    assert "--batch-size is 5000, but each of 1 ranks has only 1198 examples" in result.stdout
