"""The comparison of the methods: a short one with real runs, and a picture whose names cover nothing."""

from __future__ import annotations

import itertools
import json
import os

import numpy as np
import pytest


def test_short_comparison_of_real_runs(tmp_path, capsys, monkeypatch):
    import demo_family

    for name in list(os.environ):
        if name.startswith(("HOROVOD_", "OMPI_")):  # set up for this process' own one rank
            monkeypatch.delenv(name)
    demo_family.main(["--seeds", "1", "--methods", "^(EDEN|local SGD|recipe balanced)", "--output", str(tmp_path)])
    rows = {row["name"]: row for row in json.loads((tmp_path / "report.json").read_text())["summary"]}
    assert list(rows) == ["stock Horovod", "EDEN (Vargaftik et al. 2022)", "local SGD", "recipe balanced"]
    kinds = [(row["kind"], row["when"]) for row in rows.values()]
    assert kinds == [
        ("in full", "in every step"),
        ("quantized", "in every step"),
        ("in full", "from time to time"),
        ("quantized", "from time to time, with momentum on the mean"),
    ]
    assert [round(row["compression_ratio"]) for row in rows.values()] == [1, 16, 8, 117]
    assert min(row["accuracy"] for row in rows.values()) > 0.9
    assert (tmp_path / "family.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "EDEN (Vargaftik et al. 2022)" in output
    assert f"{rows['local SGD']['bytes_sent']:,.0f}" in output


def test_names_cover_neither_names_nor_points():
    import demo_family
    from matplotlib import pyplot as plt
    from training.torch.methods import read_methods

    generator = np.random.default_rng(0)
    rows = []
    for method in read_methods():
        accuracy, nbytes = generator.normal(0.97, 0.004), 10 ** generator.uniform(5, 8)
        rows.append(demo_family.Row(method.name, "signs", "in every step", accuracy, accuracy, accuracy, nbytes, 1.0))
    figure, axis = plt.subplots(figsize=(12, 8), dpi=150)
    axis.set(xscale="log", xlim=(5e4, 2e8), ylim=(95, 99))
    boxes = demo_family.label(axis, rows)
    points = [axis.transData.transform((row.bytes_sent, 100 * row.accuracy)) for row in rows]
    plt.close(figure)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert not any(box.contains(*point) for box in boxes for point in points)


def test_names_are_as_long_as_it_takes_to_tell_them_apart():
    import demo_family

    names = ["DiLoCo (D. 2023), with this and that", "A (B. 2020), one", "A, two"]
    assert demo_family.shorten(names) == ["DiLoCo", "A, one", "A, two"]


def test_a_long_name_does_not_move_what_was_placed(tmp_path):
    import demo_family
    from matplotlib import pyplot as plt

    places = {}

    def where(axis, rows):
        places["before"] = axis.get_window_extent().bounds
        axis.annotate("long " * 40, (0, 300), xycoords="figure pixels")
        places["axis"] = axis

    rows = [
        demo_family.Row(name, "signs", "in every step", 0.9 + i / 100, 0.9, 0.99, 10**i, 1.0)
        for i, name in enumerate("ab")
    ]
    label, demo_family.label = demo_family.label, where
    try:
        demo_family.draw(rows, 1, tmp_path / "picture.png")
    finally:
        demo_family.label = label
    assert places["axis"].get_window_extent().bounds == places["before"]
    plt.close("all")


def test_wrong_arguments_are_refused(capsys):
    import demo_family

    with pytest.raises(SystemExit):
        demo_family.main(["--seeds", "0"])
    assert "--seeds must be at least 1" in capsys.readouterr().err
