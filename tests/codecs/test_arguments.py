"""Arguments that are not allowed: a clear error that names the argument, its value and what is allowed."""

from __future__ import annotations

import numpy as np
import pytest

from pqasgd_horovod import codecs
from pqasgd_horovod.errors import ArgumentError

from .cases import NATIVE_SINGLE, REFERENCE

CODEC = codecs.maxscale()
VALUES = np.arange(10, dtype=np.float32)
PAYLOAD = CODEC.reference_encode(VALUES)
READ_ONLY = np.zeros(10, np.float32)
READ_ONLY.flags.writeable = False

implementations = pytest.mark.parametrize("implementation", [REFERENCE, NATIVE_SINGLE[0]], ids=str)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: codecs.maxscale(bits=1), "bits is 1; it must be a whole number from 2 to 8"),
        (lambda: codecs.maxscale(bits=9), "bits is 9"),
        (lambda: codecs.qsgd(bits=1), "bits is 1; it must be a whole number from 2 to 8"),
        (lambda: codecs.qsgd(bits=2.0), r"bits is 2\.0"),
        (lambda: codecs.eden(bits=True), "bits is True"),
        (lambda: codecs.eden(bits=0), "bits is 0; it must be a whole number from 1 to 8"),
        (lambda: codecs.eden(bits="4"), "bits is '4'"),
        (lambda: codecs.maxscale(block_size=100), "block_size is 100; it must be a multiple of 64 from 64 to 8192"),
        (lambda: codecs.qsgd(block_size=0), "block_size is 0"),
        (lambda: codecs.terngrad(block_size=8256), "block_size is 8256"),
        (lambda: codecs.eden(block_size=192), "block_size is 192; it must be a power of two from 64 to 8192"),
        (lambda: codecs.eden(block_size=32), "block_size is 32"),
        (lambda: codecs.eden(block_size=16384), "block_size is 16384"),
        (lambda: codecs.eden(rounding="up"), "rounding is 'up'; it must be 'nearest' or 'stochastic'"),
        (lambda: codecs.onebit(block_size=65), "block_size is 65; it must be a multiple of 64 from 64 to 8192"),
        (lambda: codecs.signsgd(block_size=0), "block_size is 0"),
        (lambda: codecs.signsgd(scaled="no"), "scaled is 'no'; it must be True or False"),
        (lambda: codecs.signsgd(majority_vote=None), "majority_vote is None; it must be True or False"),
        (lambda: codecs.signsgd(scaled=True, majority_vote=True), "scaled is True with majority_vote=True; votes have"),
        (lambda: codecs.quantize(0), "bits is 0; it must be a whole number from 1 to 8"),
        (lambda: codecs.quantize(bits=9), "bits is 9"),
        (lambda: codecs.from_config({"bits": 4}), r"config\['id'\] is None; registered codecs are bf16, eden"),
        (lambda: codecs.from_config({"id": "gzip"}), "'gzip'"),
        (lambda: codecs.from_config({"id": ["eden"]}), r"\['eden'\]"),
        (lambda: codecs.from_config({"id": "eden", "level": 4}), r"unknown fields \['level'\]; it takes \['bits', "),
        (lambda: codecs.from_config({"id": "none", "bits": 4}), r"unknown fields \['bits'\]; it takes none"),
        (lambda: codecs.from_config({"id": "eden", "bits": 99}), "bits is 99"),
    ],
)
def test_configurations(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_numpy_integers_become_plain_ones():
    assert type(codecs.eden(bits=np.int64(3)).config()["bits"]) is int
    assert type(codecs.powersgd(np.int64(3)).config()["approximation_rank"]) is int


@implementations
@pytest.mark.parametrize(
    ("values", "key", "anchor", "message"),
    [
        ([1.0, 2.0], 0, None, "values is a list; it must be a NumPy vector of float16 or float32 or float64"),
        (VALUES.astype(np.int32), 0, None, "values has dtype int32"),
        (VALUES.astype(np.uint16), 0, None, "values has dtype uint16"),
        (VALUES.astype(">f4"), 0, None, "values has dtype >f4"),
        (VALUES[::2], 0, None, r"values has shape \(5,\) and strides \(8,\)"),
        (VALUES.reshape(2, 5), 0, None, r"values has shape \(2, 5\)"),
        (VALUES, -1, None, "key is -1; it must be a whole number from 0 to 18446744073709551615"),
        (VALUES, 1 << 64, None, "key is 18446744073709551616"),
        (VALUES, 0.5, None, r"key is 0\.5"),
        (VALUES, 0, VALUES.astype(np.float16), "anchor has dtype float16; it must be float32 or float64"),
        (VALUES, 0, VALUES[:9], "anchor has 9 elements and values has 10"),
        (VALUES, 0, VALUES[::-1], "anchor has shape"),
    ],
)
def test_encode(implementation, values, key, anchor, message):
    with pytest.raises(ArgumentError, match=message):
        implementation.encode(CODEC, values, key, anchor)


@implementations
@pytest.mark.parametrize(
    ("payload", "destination", "key", "weight", "message"),
    [
        (PAYLOAD.tobytes(), np.zeros(10, np.float32), 0, 1.0, "payload is a bytes; it must be a NumPy vector of uint8"),
        (PAYLOAD.view(np.int8), np.zeros(10, np.float32), 0, 1.0, "payload has dtype int8"),
        (PAYLOAD[::-1], np.zeros(10, np.float32), 0, 1.0, "payload has shape"),
        (PAYLOAD, np.zeros(10), 0, 1.0, "destination has dtype float64; it must be float32"),
        (PAYLOAD, np.zeros(20, np.float32)[::2], 0, 1.0, "destination has shape"),
        (PAYLOAD, READ_ONLY, 0, 1.0, "destination is read-only"),
        (PAYLOAD, np.zeros(10, np.float32), -5, 1.0, "key is -5"),
        (PAYLOAD, np.zeros(10, np.float32), 0, float("nan"), "weight is nan; it must be a finite float32 number"),
        (PAYLOAD, np.zeros(10, np.float32), 0, 1e39, "weight is 1e"),
    ],
)
def test_decode_add(implementation, payload, destination, key, weight, message):
    with pytest.raises(ArgumentError, match=message):
        implementation.decode_add(CODEC, payload, destination, key, weight)


@implementations
@pytest.mark.parametrize("num_elements", [-1, 1.5, None])
def test_number_of_elements(implementation, num_elements):
    with pytest.raises(ArgumentError, match="num_elements is"):
        implementation.decode(CODEC, PAYLOAD, num_elements, 0)
    with pytest.raises(ArgumentError, match="num_elements is"):
        CODEC.payload_nbytes(num_elements)


def test_out():
    nbytes = CODEC.payload_nbytes(10)
    with pytest.raises(ArgumentError, match=f"out has {nbytes + 1} bytes; .* makes {nbytes} bytes of 10 numbers"):
        CODEC.encode(VALUES, out=np.empty(nbytes + 1, np.uint8))
    with pytest.raises(ArgumentError, match="out has dtype int8"):
        CODEC.encode(VALUES, out=np.empty(nbytes, np.int8))
    frozen = np.empty(nbytes, np.uint8)
    frozen.flags.writeable = False
    with pytest.raises(ArgumentError, match="out is read-only"):
        CODEC.encode(VALUES, out=frozen)
