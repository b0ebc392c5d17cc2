"""The demo: a short one with real runs, and what it makes of runs that fail."""

from __future__ import annotations

import json
import os
import struct

import pytest


@pytest.fixture(autouse=True)
def _fresh_environment(monkeypatch):
    """What this process set up for its own one rank is not for the demo's ranks."""
    for name in list(os.environ):
        if name.startswith(("HOROVOD_", "OMPI_")):
            monkeypatch.delenv(name)


def test_short_demo_compares_real_runs(tmp_path, capsys, monkeypatch):
    import demo

    monkeypatch.setattr(demo, "CONFIGURATIONS", (demo.CONFIGURATIONS[0], demo.CONFIGURATIONS[2]))
    demo.main(["--seeds", "1", "--epochs", "2", "--output", str(tmp_path)])

    report = json.loads((tmp_path / "report.json").read_text())
    stock, ours = report["runs"]
    assert set(stock) == {
        "name", "seed", "final_test_accuracy", "bytes_sent", "compression_ratio", "seconds", "steps"
    }  # fmt: skip
    assert (stock["name"], stock["compression_ratio"]) == ("stock Horovod fp32", 1)
    assert ours["name"] == "4 bits, period 8"
    assert stock["steps"] == ours["steps"] == 36
    # 36 steps are four periods of 8 and a partial one.
    assert ours["bytes_sent"] * ours["compression_ratio"] == pytest.approx(stock["bytes_sent"])
    assert ours["compression_ratio"] == pytest.approx(63.5 * 36 / 40, rel=0.01)
    assert min(stock["final_test_accuracy"], ours["final_test_accuracy"]) > 0.5

    picture = (tmp_path / "demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", picture[16:24])
    assert (width, height) == (1650, 1125)
    output = capsys.readouterr().out
    for part in ("stock Horovod fp32", f"{ours['bytes_sent']:,}", f"{ours['compression_ratio']:.1f}", "demo.png"):
        assert part in output


def test_short_demo_with_keras(tmp_path, capsys, monkeypatch):
    import demo

    monkeypatch.setattr(demo, "CONFIGURATIONS", (demo.CONFIGURATIONS[2],))
    demo.main(["--framework", "keras", "--seeds", "1", "--epochs", "2", "--output", str(tmp_path)])

    (run,) = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert (run["name"], run["steps"]) == ("4 bits, period 8", 36)
    assert run["compression_ratio"] == pytest.approx(63.5 * 36 / 40, rel=0.01)
    assert run["final_test_accuracy"] > 0.5
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "train_keras.py" in (tmp_path / "4-bits-period-8-seed0.txt").read_text()
    output = " ".join(capsys.readouterr().out.split())
    assert "Digits, Keras 3, two ranks" in output
    assert "Horovod's own Keras wrapper communicates nothing under Keras 3" in output


def test_failed_run_shows_its_end(tmp_path):
    import demo

    configuration = demo.CONFIGURATIONS[0]._replace(arguments="--no-such-option")
    with pytest.raises(demo.RunError) as error_info:
        demo.train(demo.FRAMEWORKS["torch"], configuration, seed=0, epochs=1, folder=tmp_path)
    message = str(error_info.value)
    assert message.startswith("stock Horovod fp32, seed 0 failed with exit code 2")
    assert "unrecognized arguments: --no-such-option" in (tmp_path / "stock-Horovod-fp32-seed0.txt").read_text()


def test_wrong_arguments_are_refused(capsys):
    import demo

    with pytest.raises(SystemExit):
        demo.main(["--seeds", "0"])
    assert "--seeds and --epochs must be at least 1" in capsys.readouterr().err
