"""q = |Q(v) - v|^2 / |v|^2, measured: against the literature's table, and for the choice that quantize() makes."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pqasgd_horovod import codecs

from .cases import ALL_CODECS

SIZE = 1 << 20


def measured_q(codec: codecs.Codec, values: np.ndarray, key: int = 5) -> float:
    error = codec.decode(codec.encode(values, key), values.size, key).astype(np.float64) - values
    return float(np.square(error).sum() / np.square(values.astype(np.float64)).sum())


@pytest.fixture(scope="module")
def gaussian() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)


@pytest.mark.parametrize(
    ("codec", "expected", "tolerance"),
    [
        (codecs.qsgd(bits=2), 17.1, 0.05),
        (codecs.qsgd(bits=3), 5.0, 0.05),
        (codecs.qsgd(bits=4), 1.58, 0.05),
        (codecs.qsgd(bits=8), 0.005, 0.1),
        (codecs.maxscale(bits=2), 1.60, 0.05),
        (codecs.maxscale(bits=3), 0.20, 0.05),
        (codecs.maxscale(bits=4), 0.036, 0.05),
        (codecs.maxscale(bits=8), 1.1e-4, 0.1),
        (codecs.terngrad(), 1.60, 0.05),
        (codecs.eden(bits=1), 0.571, 0.02),
        (codecs.eden(bits=2), 0.133, 0.02),
        (codecs.eden(bits=3), 0.0357, 0.02),
        (codecs.eden(bits=4), 0.0096, 0.02),
        (codecs.natural(), 0.0815, 0.02),
        (codecs.signsgd(), 1 - 2 / np.pi, 0.02),
        (codecs.onebit(), 1 - 2 / np.pi, 0.02),
    ],
    ids=str,
)
def test_q_of_the_table(codec, expected, tolerance, gaussian):
    assert measured_q(codec, gaussian) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(("bits", "bound"), [(1, 0.58), (2, 0.136), (3, 0.037), (4, 0.0100)])
def test_q_of_eden_for_any_distribution(bits, bound, gaussian):
    rng = np.random.default_rng(1)
    for values in (gaussian, rng.laplace(size=SIZE), rng.uniform(-1, 1, SIZE), rng.standard_normal(SIZE) ** 3):
        assert measured_q(codecs.eden(bits=bits), values.astype(np.float32)) <= bound


@pytest.mark.parametrize("bits", range(1, 9))
def test_quantize_has_the_lowest_q(bits, gaussian):
    right_on_average = [codec for codec in ALL_CODECS if codec.unbiased or codec.id == "eden"]
    candidates = {codec for codec in right_on_average if codec.bits == bits and codec.block_size in (512, 1024)}
    assert {codec.id for codec in candidates} >= ({"eden", "maxscale", "qsgd"} if bits > 1 else {"eden"})
    chosen = codecs.quantize(bits)
    assert chosen in candidates
    laplace = np.random.default_rng(1).laplace(size=SIZE).astype(np.float32)
    for values in (gaussian, laplace):
        q = {codec: measured_q(codec, values) for codec in candidates}
        assert min(q, key=lambda codec: q[codec]) == chosen


def test_q_in_the_documentation_of_quantize(gaussian):
    number = r" +([\d.e-]+)"
    rows = re.findall(rf"^ *(\d){5 * number}$", codecs.quantize.__doc__, re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(range(1, 9))
    for row in rows:
        bits = int(row[0])
        columns = [codecs.eden(bits=bits), codecs.eden(bits=bits, rounding="stochastic")]
        columns += [codecs.maxscale(bits=bits), codecs.qsgd(bits=bits)] if bits > 1 else [None, None]
        columns += [codecs.terngrad() if bits == 2 else None]
        for codec, printed in zip(columns, row[1:], strict=True):
            if codec is None:
                assert printed == "-"
            else:
                assert measured_q(codec, gaussian) == pytest.approx(float(printed), rel=0.03), codec
