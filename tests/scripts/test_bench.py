"""The benchmarks write what they promise. No time is judged here."""

from __future__ import annotations

import doctest
import json
import math
import shutil
import sys

import bench_codecs
import bench_exchange
import bench_tools
import exchange_candidates
import hosts
import pytest

from pqasgd_horovod import codecs

from .launch import SCRIPTS, launch


def run_script(name, *arguments):
    result = launch([sys.executable, str(SCRIPTS / name), *map(str, arguments)], "python")
    assert result.returncode == 0, result.stdout
    return result.stdout


# -- codecs --


def test_codecs_json(tmp_path):
    path = tmp_path / "codecs.json"
    output = run_script(
        "bench_codecs.py", "--elements", 2**14, "--q-elements", 2**16, "--repetitions", 1, "--output", path
    )
    document = json.loads(path.read_text())
    assert {"processor", "cores", "isa", "load_average"} <= document["machine"].keys()
    assert document["memcpy_seconds"] > 0
    rows = {(row["codec"], row["bits"]): row for row in document["rows"]}
    assert len(rows) == len(document["rows"])
    variants = {"eden-stochastic", "signsgd-unscaled", "topk-eden", "topk-dense", "randomk-scaled"}
    assert {name for name, _ in rows} == {*codecs.base.schemes, *variants}
    assert {bits for name, bits in rows if name == "eden"} == set(range(1, 9))
    assert {bits for name, bits in rows if name == "maxscale"} == set(range(2, 9))
    for row in rows.values():
        assert row.keys() == {
            "codec",
            "bits",
            "encode_over_memcpy",
            "decode_over_memcpy",
            "payload_bits_per_element",
            "q_gaussian",
            "q_laplace",
            "q_delta",
        }
        assert row["encode_over_memcpy"] > 0
        assert row["decode_over_memcpy"] > 0
        assert row["codec"] in output
    assert rows["none", 32]["q_delta"] == 0
    assert rows["powersgd", 32]["payload_bits_per_element"] == 32 * 2 * 2 / 128  # two factors of rank 2
    assert 0.8 < rows["powersgd", 32]["q_gaussian"] < 1 - 2 / 256  # better than random directions
    assert rows["eden", 4]["payload_bits_per_element"] == pytest.approx(4.03125)
    for (name, bits), target in bench_codecs.Q_TARGETS.items():
        assert 0 < rows[name, bits]["q_gaussian"] <= target


def test_tensorflow_json(tmp_path):
    path = tmp_path / "tensorflow.json"
    output = run_script("bench_tensorflow.py", "--elements", 2**14, "--repetitions", 1, "--output", path)
    rows = json.loads(path.read_text())["rows"]
    assert {("eden", 4), ("maxscale", 4), ("fp16", 16)} <= {(row["codec"], row["bits"]) for row in rows}
    for row in rows:
        assert row["encode_over_native"] > 0
        assert row["decode_over_native"] > 0
        assert row["codec"] in output


def test_an_unregistered_instruction_set_is_refused(tmp_path):
    result = launch([sys.executable, str(SCRIPTS / "bench_codecs.py"), "--isa", "mmx"], "python")
    assert result.returncode == 2
    assert "mmx" in result.stdout


# -- exchange --


def test_the_model_is_resnet50():
    shapes = exchange_candidates.resnet50_shapes()
    assert len(shapes) == 161
    assert sum(math.prod(shape) for shape in shapes) == 25_557_032


def test_exchange_json(tmp_path):
    path = tmp_path / "exchange.json"
    run_script("bench_exchange.py", "--links", "loopback", "--repetitions", 1, "--scale", 0.05, "--output", path)
    document = json.loads(path.read_text())
    rows = {row["name"]: row for row in document["rows"]}
    names = ["stock fp32", "stock fp16", "ours 8 bits", "ours 4 bits", "ours 2 bits"]
    for prefix in ("", "tensorflow "):
        own = {name: rows[f"{prefix}{name}"] for name in names}
        for row in own.values():
            assert row["link"] == "loopback"
            assert row["seconds"] > 0
            assert row["speedup_over_fp32"] == pytest.approx(own["stock fp32"]["seconds"] / row["seconds"])
            assert row["interface_bytes"] > 0.95 * row["bytes_sent"] > 0
        assert own["ours 4 bits"]["bytes_sent"] < own["stock fp32"]["bytes_sent"] / 6
        assert own["ours 2 bits"]["bytes_sent"] < own["ours 4 bits"]["bytes_sent"]
        assert {name: row["bytes_sent"] for name, row in own.items()} == {
            name: rows[name]["bytes_sent"] for name in names
        }
    for where in ("on this core", "elsewhere"):
        alone, *trained = (rows[f"8 steps {where}, {how}"] for how in ("alone", "delay 0", "delay 2", "delay 4"))
        for row in trained:
            assert row["exposed_seconds"] == pytest.approx(row["seconds"] - alone["seconds"])
            assert row["bytes_sent"] == rows["ours 4 bits"]["bytes_sent"]
    assert document["settings"] == list(bench_exchange.SETTINGS)


def test_what_cannot_be_measured_is_skipped_with_a_reason(tmp_path, monkeypatch, capsys):
    path = tmp_path / "exchange.json"
    monkeypatch.setattr(shutil, "which", lambda name, **_: None)
    monkeypatch.setattr(sys, "argv", ["bench_exchange.py", "--links", "1gbit", "--output", str(path)])
    monkeypatch.setattr(hosts, "end_on_sigterm", lambda: None)
    assert bench_exchange.main() == 0
    assert "skipped 1gbit: not found: unshare, ip, tc" in capsys.readouterr().out
    assert json.loads(path.read_text())["skipped"].keys() == {"1gbit"}


def test_tables():
    assert doctest.testmod(bench_tools).failed == 0
