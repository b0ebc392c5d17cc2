"""The cost model: its bytes are the package's, its fit finds what was planted, and its errors are what is told."""

from __future__ import annotations

import dataclasses
import doctest
import json
import os
import re
import shutil

import hosts
import numpy as np
import pytest
import simulate
from simulation import calibrate, model, picture

from pqasgd_horovod import codecs
from pqasgd_horovod.averaging import ArrayView, ExchangeConfig, PeriodicAverager, PeriodicAveraging
from pqasgd_horovod.exchange.carriers.threads import run_ranks
from tests.exchange.test_node import nodes_of

# What docs/simulation.md says of the committed calibration: median and worst error of what was held back.
MEDIAN_BOUND, WORST_BOUND = 0.10, 0.50

SPEEDS = {name: {"encode": 6e-10, "decode": 3e-10} for name in model.CODECS}
PLANTED = model.Costs(
    collective=8e-4, hop=5e-5, efficiency=0.93, copy=6e-10, half=1.5e-9, walk=1.1e-9, overlap=0.8,
    encode=dict.fromkeys(model.CODECS, 6e-10), decode=dict.fromkeys(model.CODECS, 3e-10),
)  # fmt: skip


def rows_of(costs, noise=0.0, seed=0):
    """What would have been measured if `costs` were the truth."""
    generator = np.random.default_rng(seed)
    rows = []
    for job in calibrate.JOBS:
        for elements in calibrate.SIZES:
            for way in model.MEASURED:
                row = {"ranks": job.ranks, "rate": calibrate.parse_rate(job.rate), "elements": elements}
                row |= {"way": way.name, "held_back": job.held_back}
                seconds = model.predict_measured(costs, row, cores=2)
                rows.append(row | {"seconds": seconds * float(np.exp(noise * generator.standard_normal()))})
    return rows


# -- bytes --


def real_bytes(config, num_elements, size, per_node=1):
    """Each rank's number as the model counts, node by node, and by `communication_stats()` what it has sent."""

    def program(carrier):
        nodes = carrier if per_node == 1 else nodes_of(carrier, per_node)
        averager = PeriodicAverager(nodes, PeriodicAveraging(period=2), config, name="test")
        views = [ArrayView("w", np.zeros(num_elements, np.float32))]
        averager.prepare(views)
        for _ in range(4):
            views[0].array += carrier.rank
            averager.count_step()
        stats = averager.communication_stats()
        assert stats["rounds"] == 2
        num_nodes = size // per_node
        place = (carrier.rank % num_nodes) * per_node + carrier.rank // num_nodes if per_node > 1 else carrier.rank
        inside = stats.get("bytes_sent_inside_node", 0)
        return place, (stats["bytes_sent"] / 2, inside / 2), stats["uncompressed_bytes"]

    return run_ranks(size, program)


@pytest.mark.parametrize("size", range(2, 9))
@pytest.mark.parametrize("method", ["allgather", "two_phase", "auto"])
@pytest.mark.parametrize("name", model.CODECS)
def test_bytes_are_those_of_the_statistics(name, method, size):
    config = ExchangeConfig(model.CODECS[name], method=method, bucket_cap_mb=0.05)
    way = model.Way("ours", config=config)
    for rank, sent, uncompressed in real_bytes(config, 50_007, size):
        assert sent == model.bytes_sent(way, 50_007, size, rank)
        assert uncompressed == model.bytes_sent(model.STOCK[0], 4 * 50_007, size)[0]  # of 4 steps
    assert model.work_of(way, 50_007, size).interface_bytes == model.bytes_sent(way, 50_007, size)[0]


@pytest.mark.parametrize(("size", "per_node"), [(4, 2), (6, 3), (6, 2), (8, 4), (8, 2), (4, 4)])
@pytest.mark.parametrize("method", ["allgather", "two_phase", "auto"])
def test_bytes_between_and_inside_nodes_are_those_of_the_statistics(method, size, per_node):
    config = ExchangeConfig(codecs.eden(bits=4), method=method, hierarchy="node", bucket_cap_mb=0.05)
    way = model.Way("ours", config=config)
    results = real_bytes(config, 50_007, size, per_node)
    assert sorted(place for place, *_ in results) == list(range(size))
    for place, sent, uncompressed in results:
        assert sent == model.bytes_sent(way, 50_007, size, place, per_node)
        assert uncompressed == model.bytes_sent(model.STOCK[0], 4 * 50_007, size, place, per_node)[0]
    first_node = sum(sent[0] for place, sent, _ in results if place < per_node)
    assert model.work_of(way, 50_007, size, per_node).interface_bytes == first_node


@pytest.mark.parametrize("size", [2, 3, 7, 64, 1000])
def test_the_first_rank_is_the_busiest(size):
    way = model.Way("ours", config=ExchangeConfig(codecs.eden(bits=2), method="two_phase"))
    sent = [model.bytes_sent(way, 2_000_003, size, rank)[0] for rank in {0, 1, size // 2, size - 1}]
    assert max(sent) == model.bytes_sent(way, 2_000_003, size, 0)[0]


# -- the fit --


def test_the_fit_finds_what_was_planted():
    found = model.fit(rows_of(PLANTED), 2, PLANTED.encode, PLANTED.decode)
    for name in model.FITTED:
        assert getattr(found, name) == pytest.approx(getattr(PLANTED, name), rel=0.01), name


def test_the_fit_bears_noise_and_outliers():
    rows = rows_of(PLANTED, noise=0.05)
    for row in rows[::20]:
        row["seconds"] *= 3
    costs, errors = calibrate.evaluate(rows, 2, SPEEDS)
    for name in ("collective", "hop", "efficiency", "walk"):
        assert getattr(costs, name) == pytest.approx(getattr(PLANTED, name), rel=0.2), name
    assert errors["held back"]["median"] < 0.08
    assert errors["held back"]["worst"] > 0.5  # an outlier is not hidden


def test_what_is_held_back_does_not_move_the_fit():
    rows = rows_of(PLANTED)
    costs, _ = calibrate.evaluate(rows, 2, SPEEDS)
    for row in rows:
        if row["held_back"]:
            row["seconds"] *= 2
    again, errors = calibrate.evaluate(rows, 2, SPEEDS)
    assert again == costs
    assert errors["held back"]["median"] == pytest.approx(0.5, abs=0.01)


def test_too_few_measurements_are_refused():
    with pytest.raises(ValueError, match="3 measurements are too few for 7 costs"):
        model.fit(rows_of(PLANTED)[:3], 2, PLANTED.encode, PLANTED.decode)


# -- what was measured --


def test_errors_of_the_committed_calibration_are_what_it_says(tmp_path):
    path = tmp_path / "costs.json"
    shutil.copy(calibrate.COSTS, path)
    assert simulate.main(["--refit", "--costs", str(path), "--picture", str(tmp_path / "picture.png")]) == 0
    document, again = calibrate.read(), calibrate.read(path)
    rows, errors = document["measured"], again["errors"]
    assert again["measured"] == rows
    for name in model.FITTED:
        found, told = getattr(again["costs"], name), getattr(document["costs"], name)
        assert found == pytest.approx(told, rel=0.02, abs=1e-12), name
    assert errors.keys() == document["errors"].keys()
    for what, error in errors.items():
        assert error == pytest.approx(document["errors"][what], abs=0.01), what
    assert errors["held back"]["median"] < MEDIAN_BOUND
    assert errors["held back"]["worst"] < WORST_BOUND
    assert {(row["ranks"], row["rate"], row["held_back"]) for row in rows} == {
        (job.ranks, calibrate.parse_rate(job.rate), job.held_back) for job in calibrate.JOBS
    }
    assert {row["ranks"] for row in rows} == {2, 3, 4, 8}


def test_the_committed_calibration_counted_bytes_twice():
    for row in calibrate.read()["measured"]:
        assert row["interface_bytes"] > row["bytes_sent"]
        assert row["interface_bytes"] < 1.05 * row["bytes_sent"] + 20_000


def test_the_committed_calibration_names_no_machine():
    text = calibrate.COSTS.read_text(encoding="utf-8")
    assert json.loads(text)["machine"].keys() == {"processor", "cores", "python", "isa", "load_average"}
    assert "/" not in text


def test_bytes_that_the_model_does_not_say_are_an_error():
    row = {"way": "stock fp32", "elements": 1000, "ranks": 2, "bytes_sent": 4000}
    calibrate.check_bytes([row])
    with pytest.raises(calibrate.CalibrationError, match="has sent 4001 bytes from rank 0, and the model says 4000"):
        calibrate.check_bytes([row | {"bytes_sent": 4001}])


def test_a_real_job_is_measured(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("HOROVOD_", "OMPI_")):  # set up for this process' own one rank
            monkeypatch.delenv(name)
    try:
        hosts.check_available()
    except hosts.NotAvailableError as error:
        pytest.skip(str(error))
    rows, speeds = calibrate.measure(calibrate.Job(2, "1gbit"), [32_768], repetitions=1, timeout=120)
    assert [row["way"] for row in rows] == [way.name for way in model.MEASURED]
    calibrate.check_bytes(rows)
    assert all(0 < row["fastest"] <= row["seconds"] <= row["slowest"] for row in rows)
    assert all(row["interface_bytes"] > row["bytes_sent"] for row in rows)
    assert speeds.keys() == model.CODECS.keys()
    assert all(value > 0 for speed in speeds.values() for value in speed.values())


# -- predictions --

SETTING = simulate.Setting()
RANKS = [2, 3, 4, 8, 16, 64, 512, 4096]


def seconds(setting=SETTING, ranks=8, costs=PLANTED):
    return [simulate.predict(costs, way, ranks, setting, 8).step_seconds for way in simulate.ways_of(setting)]


@pytest.mark.parametrize(
    ("slower", "faster"),
    [
        ({"rate": 1e8}, {"rate": 1e9}),
        ({"compute": 0.1, "overlap": 0.0}, {"compute": 0.05, "overlap": 0.0}),
        ({"overlap": 0.0}, {"overlap": 1.0}),
        ({"parameters": 10**8}, {"parameters": 10**7}),
        ({"hop": 1e-3}, {"hop": 1e-6}),
        ({"bucket_mb": 1.0}, {"bucket_mb": 64.0}),
        ({"inside_rate": 1e9, "per_node": 4}, {"inside_rate": 1e11, "per_node": 4}),
    ],
)
@pytest.mark.parametrize("ranks", [8, 512])
def test_it_is_slower_where_it_should_be(slower, faster, ranks):
    pairs = list(
        zip(seconds(SETTING._replace(**slower), ranks), seconds(SETTING._replace(**faster), ranks), strict=True)
    )
    assert all(slow >= fast for slow, fast in pairs)
    assert any(slow > fast for slow, fast in pairs)


def test_more_ranks_are_not_faster():
    for way in simulate.ways_of(SETTING):
        predictions = [simulate.predict(PLANTED, way, ranks, SETTING, 8) for ranks in RANKS]
        times = [prediction.average_seconds for prediction in predictions]
        assert times == sorted(times)
        assert [prediction.extrapolated for prediction in predictions] == [ranks > 8 for ranks in RANKS]


def test_periods_and_delays_divide_and_hide():
    _, _, every, p8, _ = seconds(SETTING._replace(overlap=0.0))
    assert p8 - SETTING.compute == pytest.approx((every - SETTING.compute) / 8)
    assert seconds(SETTING._replace(delay=100))[3] == SETTING.compute  # hidden
    way = simulate.ways_of(SETTING)[3]
    average = simulate.predict(PLANTED, way, 8, SETTING, 8).average_seconds
    delayed = simulate.predict(PLANTED, way, 8, SETTING._replace(delay=1), 8)
    assert delayed.step_seconds == pytest.approx(SETTING.compute + (average - SETTING.compute) / 8)


def test_a_rank_alone_sends_nothing():
    assert seconds(ranks=1) == [SETTING.compute] * 5


def test_nodes_send_less_between_them():
    setting = SETTING._replace(per_node=8)
    flat, nodes = (simulate.predict(PLANTED, simulate.ways_of(one)[2], 64, one, 8) for one in (SETTING, setting))
    assert nodes.bytes_per_step < flat.bytes_per_step / 7
    assert nodes.extrapolated  # hierarchies were not measured


def test_ranks_that_share_cores_wait_for_them():
    way, costs = model.MEASURED[2], dataclasses.replace(PLANTED, collective=0.0)
    work = model.work_of(way, 10**6, 8)._replace(interface_bytes=0)
    alone, shared = (costs.seconds(way, work, 1e9, contention) for contention in (1, 4))
    assert shared == pytest.approx(4 * alone)
    assert [model.contention_of(ranks, 2) for ranks in (1, 2, 3, 8)] == [1, 1, 1.5, 4]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((model.STOCK[0], 0, 2), "parameters is 0"),
        ((model.STOCK[0], 10, 0), "ranks is 0"),
        ((model.STOCK[0], 10, 4, 3), "per_node is 3 with 4 ranks"),
        ((model.MEASURED[2], 10, 4, 2), "per_node is 2 with 'eden 4 bits, allgather', whose hierarchy is None"),
    ],
)
def test_work_of_what_cannot_be(arguments, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        model.work_of(*arguments)


# -- the program --


def test_it_prints_and_draws(tmp_path, capsys):
    path = tmp_path / "picture.png"
    assert (
        simulate.main(["--picture", str(path), "--ranks", "2", "8", "16", "--parameters", "25.6e6", "--markdown"]) == 0
    )
    output = capsys.readouterr().out
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "| 8 | " in output
    assert "| 16 * | " in output
    assert "25.6 million parameters, 1 Gbit/s, 50 ms of computation" in output
    assert "| stock fp32, MB |" in output or "stock fp32, MB" in output
    for name in (*model.FITTED, "held back", "8 ranks, from the others"):
        assert f"| {name} |" in output


def test_nodes_are_drawn_too(tmp_path, capsys):
    path = tmp_path / "picture.png"
    assert simulate.main(["--picture", str(path), "--per-node", "8"]) == 0
    assert path.exists()
    assert "nodes of 8 ranks and 100 Gbit/s inside" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--ranks", "1"], ["--per-node", "8", "--ranks", "8"], ["--period", "1"]])
def test_where_nothing_is_sent_or_few_lines_are_drawn(arguments, tmp_path):
    path = tmp_path / "picture.png"
    assert simulate.main(["--picture", str(path), *arguments]) == 0
    assert path.exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--rate", "fast"], "rate is 'fast'"),
        (["--rate", "0gbit"], "rate is '0gbit'"),
        (["--parameters", "0"], "'0' is no number from 1"),
        (["--parameters", "1.5"], "'1.5' is no whole number"),
        (["--overlap", "2"], "'2' is no number from 0 to 1"),
        (["--compute", "nan"], "'nan' is no number"),
        (["--per-node", "3", "--ranks", "4"], "--per-node is 3, which has to divide --ranks: [4]"),
        (["--per-node", "3"], "--per-node is 3, which has to divide --ranks"),
    ],
)
def test_bad_arguments_are_refused(arguments, text, capsys):
    with pytest.raises(SystemExit) as error:
        simulate.main(arguments)
    assert error.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("text", [None, "", "{}", '{"costs": {"hop": 1}}', "[]"])
def test_a_file_without_costs_says_what_to_do(text, tmp_path):
    path = tmp_path / "costs.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(calibrate.CalibrationError, match=r"has no costs, which `python scripts"):
        simulate.main(["--costs", str(path)])


def test_labels_are_apart_and_in_order():
    generator = np.random.default_rng(0)
    for _ in range(20):
        values = generator.uniform(0, 3, 6).tolist()
        places = picture.spread(values, 0.4)
        assert np.diff(sorted(places)).min() >= 0.4 - 1e-6
        assert np.argsort(places).tolist() == np.argsort(values).tolist()


@pytest.mark.parametrize("module", [calibrate, model, picture, simulate])
def test_examples(module):
    assert doctest.testmod(module).failed == 0
