"""Containers for real: jobs that end well, jobs whose worker dies, a demo that is interrupted.

Needs an engine: `make test-cluster [BASE_IMAGE=.. BUILD_IMAGE=..]`, which builds the image first.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cluster
import pytest

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
BASES = (os.environ.get("BASE_IMAGE", ""), os.environ.get("BUILD_IMAGE", ""))
TRAINER = ["python", "/opt/pqasgd_horovod/scripts/train.py", "--threads", "1", "--quiet"]
LOG = "/tmp/train.jsonl"
END_SECONDS = 60
"""Within which the loss of a worker has to end a job. Not a speed: it tells an end from a hang."""

SAYS = {
    # ssh or Open MPI names the host, whichever finds out first: the rest of what MPI says differs from time to time.
    "mpi": r"Connection to {host} closed|Remote daemon: .* on node {host}",
    "gloo": r"one or more processes exited with non-zero status",
}


@pytest.fixture(scope="module", autouse=True)
def termination_is_an_interrupt():
    """A run that is told to end takes its containers down, as after Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def image():
    return cluster.build_image("cpu", *BASES)


@pytest.fixture(scope="module")
def nodes(image):
    with cluster.Cluster(image, 3, "1gbit") as running:
        yield running


def containers(project="pqasgd-"):
    """All that is left of our projects on the engine."""
    names = cluster.docker("ps", "--all", "--format", "{{.Names}}") + cluster.docker(
        "network", "ls", "--format", "{{.Name}}"
    )
    names += cluster.docker("volume", "ls", "--format", "{{.Name}}")
    return [name for name in names.split() if name.startswith(project)]


def test_nodes_are_run_by_an_ordinary_user_with_keys_of_their_own(nodes):
    for node in nodes.nodes:
        assert cluster.docker("exec", node, "id", "-u").strip() == "1000"
    fingerprints = [cluster.docker("exec", node, "cat", ".cluster/host.pub").split()[1] for node in nodes.workers]
    assert len(set(fingerprints)) == len(nodes.workers)
    assert "PRIVATE" not in cluster.docker("exec", nodes.launcher, "sh", "-c", "cat /cluster/*")


def test_the_user_cannot_change_the_link(nodes):
    with pytest.raises(cluster.ClusterError, match="Operation not permitted"):
        cluster.docker("exec", nodes.workers[0], "tc", "qdisc", "del", "dev", "eth0", "root")
    assert "rate 1Gbit" in cluster.docker("exec", nodes.workers[0], "tc", "qdisc", "show", "dev", "eth0")


def test_no_key_is_in_the_image(image):
    find = ["run", "--rm", "--network", "none", "--user", "0", "--entrypoint", "find", image, "/etc", "/home", "/root"]
    found = cluster.docker(*find, "-name", "*_key", "-o", "-name", "id_*", "-o", "-name", "authorized_keys")
    assert found.split() == []


@pytest.mark.parametrize("launcher", ["mpi", "gloo"])
def test_a_job_reaches_all_workers(nodes, launcher):
    before = nodes.bytes_sent()
    nodes.run([*TRAINER, "--epochs", "1", "--bits", "4", "--period", "8", "--log-file", LOG], launcher)
    end = json.loads(cluster.docker("exec", nodes.workers[0], "tail", "-n", "1", LOG))
    assert end["event"] == "end"
    sent = nodes.bytes_sent()
    for worker in nodes.workers:  # counters do not come from the interface: it has sent what they say, and the start
        assert end["bytes_sent"] <= sent[worker] - before[worker]


def test_the_launcher_for_plain_ssh_reaches_the_hosts_and_names_one_that_is_missing(nodes):
    script = "/opt/pqasgd_horovod/scripts/run_on_hosts.sh"
    start = ["exec", "--env", f"PQASGD_INTERFACE={cluster.INTERFACE}", nodes.launcher, "sh", "-c"]
    write = 'for host; do echo "$host slots=1"; done > hosts && '
    job = f"exec bash {script} hosts {' '.join(TRAINER[1:])} --epochs 1 --log-file {LOG}.ssh"
    cluster.docker(*start, write + job, "sh", *nodes.hosts)
    assert '"end"' in cluster.docker("exec", nodes.workers[0], "tail", "-n", "1", f"{LOG}.ssh")
    with pytest.raises(cluster.ClusterError, match="ssh does not reach missing"):
        cluster.docker(*start, write + job, "sh", *nodes.hosts[:2], "missing")


@pytest.mark.parametrize("launcher", ["mpi", "gloo"])
def test_a_worker_that_dies_ends_the_job_on_all_others(image, launcher):
    with cluster.Cluster(image, 3) as nodes:
        program = [*TRAINER, "--epochs", "100000", "--log-file", LOG]
        with cluster.started(nodes.command(program, launcher)) as job:
            wait_until(lambda: steps_of(nodes) > 20, 180)
            cluster.docker("kill", nodes.workers[1])
            try:
                output, _ = job.communicate(timeout=END_SECONDS)
            except subprocess.TimeoutExpired:
                pytest.fail(f"the job was still there {END_SECONDS} s after one of its workers had died")
        assert job.returncode != 0
        assert re.search(SAYS[launcher].format(host=nodes.hosts[1]), output), output
        wait_until(lambda: not any(ranks_of(nodes, index) for index in (0, 2)), END_SECONDS)
        project = nodes.project
    assert containers(project) == []


def steps_of(nodes):
    """How far rank 0 is."""
    count = f"test ! -e {LOG} || wc -l < {LOG}"
    return int(cluster.docker("exec", nodes.workers[0], "sh", "-c", count).strip() or 0)


def ranks_of(nodes, index):
    """The trainers that run on a worker."""
    return [line for line in cluster.docker("top", nodes.workers[index]).splitlines() if "train.py" in line]


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing(image, number):
    before = set(containers())
    command = [sys.executable, str(SCRIPTS / "cluster_demo.py"), "--workers", "2"]
    for option, base in zip(("--base", "--build-base"), BASES, strict=True):
        command += [option, base] if base else []
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: set(containers()) > before, 300)
        process.send_signal(number)
        assert process.wait(120) == 128 + number
    finally:
        process.kill()
        process.wait()
    assert set(containers()) == before


def test_a_port_in_use_ends_a_node_with_the_message(image):
    command = ["run", "--rm", "--network", "none", "--entrypoint", "sh", image, "-c"]
    server = "import socket, time; own = socket.create_server((str(), 2222)); time.sleep(60)"
    occupy = f"python -c '{server}' & sleep 2; node.sh worker"
    with pytest.raises(cluster.ClusterError, match=r"(?s)a port is in use.*port 2222 is in use.*SSH_PORT=2223"):
        cluster.docker(*command, occupy)


def test_a_base_without_python_is_refused_with_the_message(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY nothing /\n")
    (tmp_path / "nothing").touch()
    cluster.docker("build", "--tag", "pqasgd_horovod-test:empty", str(tmp_path))
    try:
        with pytest.raises(
            cluster.ClusterError, match=r"(?s)the base image has no shell, and no Python.*debian_base\.sh"
        ):
            cluster.build_image("cpu", "pqasgd_horovod-test:empty", "pqasgd_horovod-test:empty")
    finally:
        cluster.docker("image", "rm", "pqasgd_horovod-test:empty")
