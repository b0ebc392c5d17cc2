"""A small version of the convergence experiment: rates where theory promises them, and none where it does not."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import reproduce

METHODS = {method.name: method for method in reproduce.METHODS}
RANKS, STEPS, DIMENSION = (2, 4, 8), (256, 1024), 4096
LARGEST_RATIOS = {
    "SGD": 1.001, "QG, 2 bits": 1.07, "SPA, period 4": 1.05, "PQASGD, 2 bits, period 4": 1.10, "the same, two-phase exchange": 1.17,
}  # fmt: skip
NAMES = {broken: [m.name for m in reproduce.METHODS if bool(m.breaks) == broken] for broken in (False, True)}


def points_of(method):
    return [
        reproduce.Point(method.name, n, k, 0, reproduce.simulate(method, n, k, seed=0, dimension=DIMENSION))
        for n, k in itertools.product(RANKS, STEPS)
    ]


@pytest.fixture(scope="module")
def sgd():
    return points_of(METHODS["SGD"])


@pytest.mark.parametrize("name", NAMES[False])
def test_the_gradient_falls_as_one_over_the_root_of_nk(name, sgd):
    points = sgd if name == "SGD" else points_of(METHODS[name])
    print(name, reproduce.fit(points), [p.gradient / q.gradient for p, q in zip(points, sgd, strict=True)])
    for slope, half in reproduce.fit(points):
        assert abs(slope + 0.5) < 0.06
        assert half < 0.06
    # The quantizer's noise of q = 0.13, the drift of a short period, and in the two-phase exchange more noise.
    ratios = [point.gradient / reference.gradient for point, reference in zip(points, sgd, strict=True)]
    assert max(ratios) < LARGEST_RATIOS[name]


@pytest.mark.parametrize("name", NAMES[True])
def test_it_does_not_where_a_condition_is_broken(name, sgd):
    points = points_of(METHODS[name])
    slopes = reproduce.fit(points)
    assert slopes.both[0] > -0.4
    assert slopes.ranks[0] > -0.3  # more ranks help less, or not at all
    assert points[-1].gradient > 4 * sgd[-1].gradient


def test_the_fit_finds_the_exponents_it_is_given():
    generator = np.random.default_rng(0)
    points = [
        reproduce.Point("", n, k, 0, 3 * n**-0.25 * k**-0.75 * np.exp(generator.normal(0, 0.01)))
        for n, k in itertools.product(RANKS, STEPS)
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
    assert f"{report['slopes']['SGD']['both'][0]:.2f} ±" in output
