#!/usr/bin/env python3
"""Write the golden fixtures of tests/codecs: payloads that every future version must make and read.

A payload that changes is a change of the wire format: ranks with different versions would no longer understand each
other. So a fixture that is there is never overwritten unless --overwrite says so; without it only missing ones are
made.

    python3 scripts/make_codec_fixtures.py               make what is missing, fail if an existing one would change
    python3 scripts/make_codec_fixtures.py --overwrite   replace those that changed; raise the wire format's version
    with it
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pqasgd_horovod import codecs  # noqa: E402
from pqasgd_horovod.codecs import low_rank  # noqa: E402

FIXTURES = ROOT / "tests" / "codecs" / "fixtures"
INPUT = "input.bin"
NUM_ELEMENTS = 1500
KEY = 0x0123456789ABCDEF
SHARED_KEY = 0xFEDCBA9876543210

CODECS = [
    codecs.none(),
    codecs.fp16(),
    codecs.bf16(),
    *(codecs.maxscale(bits=bits) for bits in range(2, 9)),
    *(codecs.qsgd(bits=bits) for bits in range(2, 9)),
    codecs.terngrad(),
    *(codecs.eden(bits=bits) for bits in range(1, 9)),
    *(codecs.eden(bits=bits, rounding="stochastic") for bits in range(1, 9)),
    codecs.eden(bits=3, block_size=64),
    codecs.maxscale(bits=3, block_size=192),
    codecs.natural(),
    codecs.onebit(),
    codecs.signsgd(),
    codecs.signsgd(scaled=False),
    codecs.topk(),
    codecs.topk(density=0.1, values=codecs.eden(bits=4), block_size=512),
    codecs.topk(density=0.3, values=codecs.fp16(), block_size=512),
    codecs.threshold(0.5, density=0.1, block_size=1024),
    codecs.randomk(density=0.1, block_size=512),
    codecs.randomk(density=0.1, values=codecs.maxscale(bits=4), scaled=True, block_size=512),
]


def make_input() -> np.ndarray:
    """Numbers of many magnitudes, one zero block, one large number, both zeros and a subnormal; 1500 float32."""
    rng = np.random.default_rng(20181203)
    values = rng.standard_normal(NUM_ELEMENTS) * np.exp2(rng.integers(-12, 3, NUM_ELEMENTS))
    values[512:1024] = 0
    values[[7, 8, 9, 1100]] = 0.0, -0.0, 1e-41, -1234.5
    return values.astype("<f4")


def file_stem(codec: codecs.Codec) -> str:
    """Name of the fixture of a codec."""

    def values(config: dict[str, Any]) -> Iterator[str]:
        for value in config.values():
            yield from values(value) if isinstance(value, dict) else [str(value)]

    return "-".join(values(codec.config()))


def fixtures(values: np.ndarray) -> dict[str, bytes]:
    """Return what every file holds: for each codec its payload, and what it decodes to as a digest."""
    files = {INPUT: values.tobytes()}
    for codec in CODECS:
        shared_key = SHARED_KEY if codec.shared_selection else 0
        payload = codec.reference_encode(values, KEY, shared_key=shared_key)
        decoded = codec.reference_decode(payload, values.size, KEY, shared_key=shared_key)
        description = {
            "config": codec.config(),
            "key": KEY,
            **({"shared_key": shared_key} if shared_key else {}),
            "num_elements": values.size,
            "payload_nbytes": payload.size,
            "decoded_sha256": hashlib.sha256(decoded.astype("<f4").tobytes()).hexdigest(),
        }
        files[f"{file_stem(codec)}.bin"] = payload.tobytes()
        files[f"{file_stem(codec)}.json"] = (json.dumps(description, indent=2) + "\n").encode()
    files["powersgd-3.json"] = low_rank_fixture(values)
    return files


def low_rank_fixture(values: np.ndarray) -> bytes:
    """Return the digests of all that becomes of a matrix of these numbers, repeated, on one rank."""
    scheme, shape = codecs.powersgd(approximation_rank=3), (70, 130)
    matrix = np.resize(values, shape)
    start = low_rank.draw(KEY, scheme.approximation_rank, shape[1])
    left = low_rank.reference_orthogonalize(low_rank.reference_project(matrix, start))
    right = low_rank.reference_backproject(matrix, left)
    mean = low_rank.reference_product(left, right)
    parts = {
        "start": start,
        "left": left,
        "right": right,
        "mean": mean,
        "rest": matrix - mean,
        "next_start": low_rank.reference_orthogonalize(right),
    }
    digests = {name: hashlib.sha256(part.astype("<f4").tobytes()).hexdigest() for name, part in parts.items()}
    description = {"config": scheme.config(), "key": KEY, "shape": shape, "sha256": digests}
    return (json.dumps(description, indent=2) + "\n").encode()


def main() -> int:
    """Write the fixtures; return the exit status."""
    parser = argparse.ArgumentParser(description="Make the golden fixtures of the codecs.")
    parser.add_argument("--overwrite", action="store_true", help="replace fixtures that are there and differ")
    parser.add_argument("--directory", type=Path, default=FIXTURES, help="where the fixtures are")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    stored = arguments.directory / INPUT
    values = np.fromfile(stored, "<f4") if stored.exists() else make_input()
    made = fixtures(values)
    changed = [
        name
        for name, content in made.items()
        if (arguments.directory / name).exists() and (arguments.directory / name).read_bytes() != content
    ]
    if changed and not arguments.overwrite:
        print(
            f"{len(changed)} fixtures in {arguments.directory} would change, such as {changed[0]}: nothing written. "
            "If the wire format is meant to change, raise its version and run this again with --overwrite",
            file=sys.stderr,
        )
        return 1
    for name, content in made.items():
        if name in changed or not (arguments.directory / name).exists():
            (arguments.directory / name).write_bytes(content)
            print(f"wrote {name}, {len(content)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
