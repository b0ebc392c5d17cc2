"""Payloads that were truncated or corrupted: the wire-format error and nothing else, the same everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from pqasgd_horovod import codecs
from pqasgd_horovod.errors import WireFormatError

from .cases import ALL_CODECS, BLOCK_CODECS, NATIVE_SINGLE, REFERENCE, decoded, name, outcome

KEY = 99
every_codec = pytest.mark.parametrize("codec", ALL_CODECS, ids=name)
with_scale = pytest.mark.parametrize("codec", [codec for codec in BLOCK_CODECS if codec.scales_per_block], ids=name)
every_implementation = pytest.mark.parametrize("implementation", [REFERENCE, *NATIVE_SINGLE], ids=str)


def payload_of(codec: codecs.Codec, size: int) -> np.ndarray:
    return codec.reference_encode(np.random.default_rng(size).standard_normal(size).astype(np.float32), KEY)


@every_codec
@every_implementation
def test_wrong_lengths(codec, implementation):
    for size in (1, 65, 1025):
        payload = payload_of(codec, size)
        longer = np.concatenate([payload, np.zeros(4, np.uint8)])
        shorter = [payload[:0], payload[:-1], payload[1:], payload[: payload.size // 2]]
        for wrong in (*shorter, longer[:-3], longer):
            message = f"payload has {wrong.size} bytes; .* makes {payload.size} bytes of {size} numbers"
            with pytest.raises(WireFormatError, match=message):
                implementation.decode(codec, wrong.copy(), size, KEY)
    with pytest.raises(WireFormatError, match="of 0 numbers"):
        implementation.decode(codec, np.zeros(1, np.uint8), 0, KEY)


@with_scale
@every_implementation
def test_bad_scales(codec, implementation):
    size = 3 * codec.block_size - 5
    num_scales = 3 * codec.scales_per_block
    for i in range(num_scales):
        for bad in (-1.0, -1e-45, np.nan, np.inf, -np.inf):
            payload = payload_of(codec, size)
            payload[: 4 * num_scales].view("<f4")[i] = bad
            message = f"scale of block {i // codec.scales_per_block} is" if implementation is REFERENCE else "scale"
            with pytest.raises(WireFormatError, match=message):
                implementation.decode(codec, payload, size, KEY)
        payload = payload_of(codec, size)
        payload[: 4 * num_scales].view("<f4")[i] = -0.0
        implementation.decode(codec, payload, size, KEY)


@pytest.mark.parametrize("codec", [codec for codec in ALL_CODECS if codec.id in ("maxscale", "qsgd")], ids=name)
@every_implementation
def test_codes_of_all_ones(codec, implementation):
    size = codec.block_size + 50
    for element in (0, 1, 63, 64, codec.block_size - 1, codec.block_size, size - 1):
        payload = payload_of(codec, size)
        codes_at = 8 + (element // codec.block_size) * codec.code_nbytes(codec.block_size)
        for bit in range(element % codec.block_size * codec.bits, (element % codec.block_size + 1) * codec.bits):
            payload[codes_at + bit // 8] |= 1 << bit % 8
        with pytest.raises(WireFormatError, match="code"):
            implementation.decode(codec, payload, size, KEY)


@pytest.mark.parametrize("codec", [codec for codec in ALL_CODECS if codec.id == "terngrad"], ids=name)
@every_implementation
def test_bytes_above_242(codec, implementation):
    size = codec.block_size + 77
    for position in (8, 9, 8 + codec.code_nbytes(codec.block_size), -1):
        payload = payload_of(codec, size)
        payload[position] = 242
        implementation.decode(codec, payload, size, KEY)
        for bad in (243, 255):
            payload[position] = bad
            with pytest.raises(WireFormatError, match=r"code|byte"):
                implementation.decode(codec, payload, size, KEY)


@every_codec
def test_corrupted_bytes_get_the_same_verdict_everywhere(codec):
    rng = np.random.default_rng(7)
    refused = 0
    for trial in range(40):
        size = int(rng.choice([1, 64, 65, 513, 1025, 1500]))
        payload = payload_of(codec, size)
        if trial % 4 == 0:
            payload[:] = rng.integers(0, 256, payload.size)
        else:
            for _ in range(trial % 4):
                most = 40 if trial % 2 else payload.size  # scales more often than their share
                payload[rng.integers(0, min(payload.size, most))] ^= 1 << rng.integers(0, 8)
        expected = outcome(decoded, REFERENCE, codec, payload, size, KEY)
        refused += expected is WireFormatError
        for implementation in NATIVE_SINGLE:
            got = outcome(decoded, implementation, codec, payload, size, KEY)
            assert got == expected, (trial, str(implementation))
    coded = codec.values if codec.id == "randomk" else codec
    assert (refused > 0) == (coded not in BLOCK_CODECS or coded.scales_per_block > 0 or coded.id == "natural")
