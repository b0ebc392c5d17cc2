"""The hosts that one machine plays: joined as they should be, ended when they should, and leaving nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import hosts
import pytest

from .launch import SCRIPTS


def require(link, number=2):
    try:
        hosts.check_available(link, hosts=number)
    except hosts.NotAvailableError as error:
        pytest.skip(str(error))


def running(marker):
    """Ids of the processes with ``marker`` in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in entry.read_bytes():
                found.append(entry.parent.name)
        except OSError:  # it has just ended
            continue
    return found


def wait_until_gone(marker):
    deadline = time.monotonic() + 20  # the kernel takes a moment
    while running(marker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running(marker) == []


@pytest.mark.parametrize("number", [2, 3, 5])
def test_hosts_see_each_other_and_nothing_else(number, tmp_path):
    require("shaped", number)
    program = tmp_path / "program.py"
    program.write_text(
        "from mpi4py import MPI\n"
        "names = [line.split(':')[0].strip() for line in open('/proc/net/dev') if ':' in line]\n"
        "assert sorted(names) == ['eth0', 'lo'], names\n"
        f"assert MPI.COMM_WORLD.allreduce(1) == {number}\n"
        f"open(f'{tmp_path}/rank{{MPI.COMM_WORLD.rank}}', 'w').close()\n"
    )
    assert hosts.run("shaped", [sys.executable, str(program)], hosts=number, timeout=60) == 0
    assert sorted(path.name for path in tmp_path.glob("rank*")) == [f"rank{rank}" for rank in range(number)]


@pytest.mark.parametrize("number", [2, 3])
def test_neither_what_leaves_a_host_nor_what_enters_it_is_faster_than_the_rate(number, tmp_path):
    """All others send to one: into a switch that shaped nothing it would get their rates together."""
    require("shaped", number)
    program = tmp_path / "program.py"
    program.write_text(
        "import time\nimport numpy as np\nfrom mpi4py import MPI\n"
        "world, message = MPI.COMM_WORLD, np.zeros(1_000_000, np.uint8)\n"
        "world.Barrier()\n"
        "begin = time.perf_counter()\n"
        "if world.rank:\n    world.Send(message, 0)\n"
        "else:\n    MPI.Request.Waitall([world.Irecv(np.empty_like(message), rank) for rank in range(1, world.size)])\n"
        f"open(f'{tmp_path}/seconds{{world.rank}}', 'w').write(str(time.perf_counter() - begin))\n"
    )
    assert hosts.run("shaped", [sys.executable, str(program)], rate="50mbit", hosts=number, timeout=60) == 0
    seconds = float((tmp_path / "seconds0").read_text())
    assert seconds > 8 * ((number - 1) * 1_000_000 - 2 * hosts.BURST_BYTES) / 50e6


@pytest.mark.parametrize(("link", "number"), [("shaped", 2), ("shaped", 4), ("loopback", 2)])
def test_a_job_that_takes_too_long_leaves_nothing_behind(link, number, tmp_path):
    require(link, number)
    namespaces = sorted(Path("/run/netns").glob("*"))
    program = tmp_path / "sleeper.py"
    program.write_text(f"open(f'{tmp_path}/started', 'w').close()\nimport time\ntime.sleep(600)\n")
    with pytest.raises(subprocess.TimeoutExpired):
        hosts.run(link, [sys.executable, str(program)], hosts=number, timeout=8)
    assert (tmp_path / "started").exists()
    wait_until_gone(str(program))
    assert sorted(Path("/run/netns").glob("*")) == namespaces


@pytest.mark.parametrize("number", [2, 4])
def test_it_ends_with_all_its_hosts_when_it_is_killed(number, tmp_path):
    require("shaped", number)
    program = tmp_path / "sleeper.py"
    program.write_text(f"open(f'{tmp_path}/started', 'w').close()\nimport time\ntime.sleep(600)\n")
    command = [sys.executable, str(SCRIPTS / "hosts.py"), "--hosts", str(number), "--", sys.executable, str(program)]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "started").exists()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    wait_until_gone(str(program))


def test_a_failing_job_says_so():
    require("loopback")
    assert hosts.run("loopback", [sys.executable, "-c", "raise SystemExit(3)"], timeout=60) == 3


def test_without_namespaces_the_job_runs_on_this_host(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("from mpi4py import MPI\nassert MPI.COMM_WORLD.allreduce(1) == 3\n")
    assert hosts.run_here([sys.executable, str(program)], hosts=3, timeout=60) == 0


@pytest.mark.parametrize("text", ["1", "255", "two", "-3", "2.5", ""])
def test_what_is_no_number_of_hosts_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        hosts.main([f"--hosts={text}", "--", "true"])
    assert "must be from 2 to 254" in capsys.readouterr().err
