"""Codes to bytes and back."""

from __future__ import annotations

import numpy as np
import pytest

from pqasgd_horovod.codecs import packing


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("num_codes", [1, 7, 8, 9, 64, 511])
def test_bit_fields(bits, num_codes):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, num_codes)).astype(np.uint32)
    packed = packing.pack(codes, bits)
    assert packed.shape == (3, packing.packed_nbytes(num_codes, bits))
    assert (packing.unpack(packed, bits, num_codes) == codes).all()
    for row, block in zip(packed, codes, strict=True):
        assert int.from_bytes(row.tobytes(), "little") == sum(int(code) << i * bits for i, code in enumerate(block))


@pytest.mark.parametrize("num_codes", [1, 4, 5, 6, 64, 512])
def test_ternary_digits(num_codes):
    codes = np.random.default_rng(num_codes).integers(0, 3, (3, num_codes)).astype(np.uint32)
    packed = packing.pack_ternary(codes)
    length = packing.ternary_nbytes(num_codes)
    assert packed.shape == (3, length)
    assert packed.max() <= packing.LARGEST_TERNARY_BYTE
    assert (packing.unpack_ternary(packed, num_codes) == codes).all()
    for row, block in zip(packed, codes, strict=True):
        for j in range(length):
            assert row[j] == sum(3**k * int(block[j + k * length]) for k in range(5) if j + k * length < num_codes)
