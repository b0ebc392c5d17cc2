"""A small version of the convergence experiment: rates where theory promises them, and none where it does not."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import reproduce

METHODS = {method.name: method for method in reproduce.METHODS}
RANKS, STEPS, DIMENSION = (2, 4), (256, 512, 1024), 4096
LARGEST_RATIOS = {
    "SGD": 1.001, "QG, 2 bits": 1.06, "SPA, period 4": 1.02, "PQASGD, 2 bits, period 4": 1.09,
}  # fmt: skip
BREAKING = [method.name for method in reproduce.METHODS if method.breaks]


def points_of(method):
    return [
        reproduce.Point(method.name, n, k, 0, reproduce.simulate(method, n, k, seed=0, dimension=DIMENSION))
        for n, k in itertools.product(RANKS, STEPS)
    ]


@pytest.fixture(scope="module")
def sgd():
    return points_of(METHODS["SGD"])


@pytest.mark.parametrize("name", LARGEST_RATIOS)
def test_the_gradient_falls_as_one_over_the_root_of_nk(name, sgd):
    points = sgd if name == "SGD" else points_of(METHODS[name])
    for slope, half in reproduce.fit(points):
        assert abs(slope + 0.5) < 0.05
        assert half < 0.03
    # The quantizer's noise of q = 0.13, and the drift of a short period.
    ratios = [point.gradient / reference.gradient for point, reference in zip(points, sgd, strict=True)]
    assert max(ratios) < LARGEST_RATIOS[name]


@pytest.mark.parametrize("name", BREAKING)
def test_it_does_not_where_a_condition_is_broken(name, sgd):
    points = points_of(METHODS[name])
    slopes = reproduce.fit(points)
    assert slopes.both[0] > -0.2
    assert slopes.ranks[0] > -0.2  # more ranks help less, or not at all
    assert points[-1].gradient > 3 * sgd[-1].gradient


def test_the_fit_finds_the_exponents_it_is_given():
    generator = np.random.default_rng(0)
    points = [
        reproduce.Point("", n, k, 0, 3 * n**-0.25 * k**-0.75 * np.exp(generator.normal(0, 0.01)))
        for n, k in itertools.product((2, 4, 8), (256, 1024))
    ]
    points += [reproduce.Point("", 1, 64, 0, 1e9)]  # which does not count
    slopes = reproduce.fit(points)
    assert slopes.ranks == (pytest.approx(-0.25, abs=0.02), pytest.approx(0.0125, abs=0.01))
    assert slopes.steps == (pytest.approx(-0.75, abs=0.02), pytest.approx(0.0062, abs=0.005))


def test_it_writes_the_table_the_picture_and_the_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "STEPS", (16, 64))
    monkeypatch.setattr(reproduce, "RANKS", (1, 2, 4))
    monkeypatch.setattr(reproduce, "METHODS", (METHODS["SGD"], METHODS["PQASGD, 2 bits, period K/4"]))
    reproduce.main(["--seeds", "1", "--output", str(tmp_path)])
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["points"]) == 12
    assert (tmp_path / "convergence.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "period grows as fast as K" in output
    assert f"{report['slopes']['SGD']['both'][0]:.3f} ±" in output
