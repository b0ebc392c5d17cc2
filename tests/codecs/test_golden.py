"""Payloads stored with the first version: every implementation still makes them and reads them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pqasgd_horovod import codecs

from .cases import NATIVE_SINGLE, REFERENCE

FIXTURES = Path(__file__).parent / "fixtures"
SCRIPT = Path(__file__).parents[2] / "scripts" / "make_codec_fixtures.py"
NAMES = [
    "none",
    "fp16",
    "bf16",
    *(f"{codec}-{bits}-512" for codec in ("maxscale", "qsgd") for bits in range(2, 9)),
    "maxscale-3-192",
    "terngrad-512",
    *(f"eden-{bits}-1024-{rounding}" for bits in range(1, 9) for rounding in ("nearest", "stochastic")),
    "eden-3-64-nearest",
    "topk-0.01-none-8192",
    "topk-0.1-eden-4-1024-nearest-512",
    "topk-0.3-fp16-512",
    "threshold-0.5-0.1-none-1024",
    "randomk-0.1-none-False-512",
    "randomk-0.1-maxscale-4-512-True-512",
    "natural",
    "onebit-1024",
    "signsgd-1024-True-False",
    "signsgd-1024-False-False",
]


def test_every_codec_has_a_fixture_and_every_file_is_used():
    assert {name.split("-")[0] for name in NAMES} == set(codecs.registry)
    files = {f"{name}.{suffix}" for name in NAMES for suffix in ("bin", "json")}
    files |= {"input.bin", "powersgd-3.json"}  # test_low_rank.py reads the latter
    assert {path.name for path in FIXTURES.iterdir()} == files


@pytest.mark.parametrize("implementation", [REFERENCE, *NATIVE_SINGLE], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_golden_payload(name, implementation):
    values = np.fromfile(FIXTURES / "input.bin", "<f4").astype(np.float32)
    payload = np.fromfile(FIXTURES / f"{name}.bin", np.uint8)
    description = json.loads((FIXTURES / f"{name}.json").read_text())
    codec = codecs.from_config(description["config"])
    key, shared_key, size = description["key"], description.get("shared_key", 0), description["num_elements"]
    assert values.size == size
    assert codec.payload_nbytes(size) == payload.size == description["payload_nbytes"]
    assert implementation.encode(codec, values, key, shared_key=shared_key).tobytes() == payload.tobytes()
    decoded = implementation.decode(codec, payload, size, key, shared_key)
    assert hashlib.sha256(decoded.astype("<f4").tobytes()).hexdigest() == description["decoded_sha256"]


def test_the_script_keeps_what_is_there(tmp_path):
    command = [sys.executable, str(SCRIPT), "--directory", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_bytes() for path in FIXTURES.iterdir()}
    (tmp_path / "terngrad-512.bin").write_bytes(b"other")
    (tmp_path / "none.bin").unlink()
    refused = subprocess.run(command, check=False, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "terngrad-512.bin" in refused.stderr
    assert (tmp_path / "terngrad-512.bin").read_bytes() == b"other"
    assert not (tmp_path / "none.bin").exists()
    subprocess.run([*command, "--overwrite"], check=True, capture_output=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == made
