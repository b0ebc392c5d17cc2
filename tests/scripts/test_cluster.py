"""A cluster's driver with a Docker that only answers: what it says when something is wrong, and that it cleans up."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cluster
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fake_docker(tmp_path, monkeypatch):
    """A `docker` that runs a piece of shell script, and the list of what it was called with."""
    calls = tmp_path / "calls"
    calls.touch()

    def install(script):
        path = tmp_path / "docker"
        path.write_text(f'#!/bin/sh\necho "$*" >> {calls}\n{script}\n')
        path.chmod(0o755)
        return calls

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return install


WRONG = {
    "no engine": (
        "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?",
        "no Docker engine answers",
        "systemctl start docker",
    ),
    "no permission": (
        "permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock",
        "you may not use the Docker engine",
        "usermod -aG docker",
    ),
    "port in use": (
        "Error response from daemon: driver failed programming external connectivity: port is already allocated",
        "a port is in use",
        "SSH_PORT=2223",
    ),
    "port of a node in use": (
        "node.sh worker: port 2222 is in use on node1",
        "a port is in use",
        "SSH_PORT=2223",
    ),
    "no addresses": (
        "could not find an available, non-overlapping IPv4 address pool among the defaults",
        "no addresses left",
        "docker network prune",
    ),
    "base without Python": (
        "docker/system.sh: the base image lacks python3 tini, and has no apt-get to install them with",
        "the base image does not fit",
        "docker/debian_base.sh",
    ),
    "base without a CUDA toolkit": (
        "docker/system.sh: the base image lacks nvcc, the compiler of the CUDA toolkit",
        "no CUDA toolkit",
        "CUDA=/usr/local/cuda docker/debian_base.sh",
    ),
    "base without a shell": (
        'OCI runtime create failed: exec: "/bin/sh": stat /bin/sh: no such file or directory: unknown',
        "no shell, and no Python",
        "docker/debian_base.sh",
    ),
    "no registry": (
        "Error response from daemon: Get https://registry.example.com/v2/: dial tcp: lookup: no such host",
        "nor to be had from a registry",
        "docker/debian_base.sh",
    ),
    "disk full": ("write /layer.tar: no space left on device", "the disk is full", "docker system df"),
}


@pytest.mark.parametrize(("said", "meaning", "remedy"), WRONG.values(), ids=WRONG)
def test_what_the_engine_says_is_explained(fake_docker, said, meaning, remedy):
    fake_docker(f"cat << 'END' >&2\n{said}\nEND\nexit 1")
    with pytest.raises(cluster.ClusterError) as raised:
        cluster.build_image("cpu")
    message, _, advice = str(raised.value).partition("\n  try: ")
    assert meaning in message
    assert said in message
    assert remedy in advice


def test_other_errors_are_shown_as_they_are(fake_docker):
    fake_docker("echo something else; exit 3")
    with pytest.raises(cluster.ClusterError, match=r"(?s)`docker version` failed:.*something else"):
        cluster.require_engine()


def test_the_report_of_a_set_up_that_failed_in_an_image_is_shown_whole(fake_docker):
    fake_docker("echo first error; seq 30; exit 1")
    with pytest.raises(cluster.ClusterError, match="first error"):
        cluster.require_engine()


def test_without_docker_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(cluster.ClusterError, match=r"docker is not there\n  try: install Docker Engine"):
        cluster.require_engine()


def test_an_engine_that_hangs_is_an_error(fake_docker):
    fake_docker("sleep 60")
    started = time.monotonic()
    with pytest.raises(cluster.ClusterError, match="took more than 1 s"):
        cluster.docker("version", timeout=1)
    assert time.monotonic() - started < 30


def test_the_demo_ends_with_the_message_and_without_a_traceback(fake_docker):
    fake_docker("echo Cannot connect to the Docker daemon at unix:///x; exit 1")
    command = [sys.executable, str(ROOT / "scripts" / "cluster_demo.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("cluster_demo.py: no Docker engine answers")
    assert "Traceback" not in result.stderr


def test_without_compose_nothing_is_built(fake_docker, tmp_path, monkeypatch):
    calls = fake_docker("case $1 in compose) echo unknown; exit 1 ;; esac")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    compose = tmp_path / "docker-compose"
    compose.write_text("#!/bin/sh\necho no plugin either >&2\nexit 1\n")
    compose.chmod(0o755)
    command = [sys.executable, str(ROOT / "scripts" / "cluster_demo.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert "no plugin either" in result.stderr
    assert "build" not in calls.read_text()


# An engine with one launcher and one worker, until they are removed; a job runs for ever.
ENGINE = """
case $* in
ps*--format*service=launcher*) echo launcher ;;
ps*--format*service=worker*) echo worker_1 ;;
ps*--quiet*) [ -e {removed} ] || echo 0123 ;;
rm*) touch {removed} ;;
inspect*) echo running {health} ;;
exec*horovodrun*) sleep 600 ;;
logs*) echo what the node has said ;;
esac
"""
JOB = """
import signal, sys
import cluster, cluster_demo
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, cluster_demo.end_on_signal)
with cluster.Cluster("image", 1, "1gbit") as nodes:
    nodes.run(["true"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_removes_the_containers(fake_docker, tmp_path, number):
    calls = fake_docker(ENGINE.format(removed=tmp_path / "removed", health="healthy"))
    env = os.environ | {"PYTHONPATH": str(ROOT / "scripts")}
    process = subprocess.Popen([sys.executable, "-c", JOB], env=env)
    try:
        wait_until(lambda: "horovodrun" in calls.read_text())
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    finally:
        process.kill()
        process.wait()
    text = calls.read_text()
    assert "tc qdisc replace dev eth0 root tbf rate 1gbit" in text
    assert "rm --force --volumes 0123" in text


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_node_that_does_not_get_ready_is_an_error_with_its_log(fake_docker, tmp_path, monkeypatch):
    calls = fake_docker(ENGINE.format(removed=tmp_path / "removed", health="starting"))
    monkeypatch.setattr(cluster, "READY_SECONDS", 1)
    with pytest.raises(cluster.ClusterError, match=r"(?s)launcher did not get ready.*what the node has said"):
        cluster.Cluster("image", 1).__enter__()
    assert "rm --force --volumes 0123" in calls.read_text()


def test_what_cannot_be_removed_is_an_error(fake_docker):
    fake_docker("case $* in ps*) echo 0123 ;; esac")
    with pytest.raises(cluster.ClusterError, match=r"still there: 0123\n  try: docker rm"):
        cluster.Cluster("image", 1).remove()


def test_the_image_is_asked_for_its_python_with_the_function_of_the_set_up(fake_docker):
    calls = fake_docker('shift 6; eval "python=\\${$#}"; exec python3 -c "$python"')
    assert cluster.python_of("image") == cluster.setup_env.python_tag()
    assert "--network none" in calls.read_text()


def test_options_of_make_reach_the_demo(fake_docker):
    make = shutil.which("make")
    command = [make, "-n", "cluster-demo", "BASE_IMAGE=base:run", "BUILD_IMAGE=base:build"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "scripts/cluster_demo.py --base base:run --build-base base:build" in result.stdout
