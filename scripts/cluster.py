#!/usr/bin/env python3
"""A cluster of containers on this machine: images, nodes, shaped links, jobs, and an end that leaves nothing behind.

    python scripts/cluster.py --image cpu [--base IMAGE --build-base IMAGE]

makes an image of docker/cpu.Dockerfile or docker/gpu.Dockerfile; scripts/cluster_demo.py runs jobs. DOCKER_HOST chooses
the engine, and DOCKER_BUILD_OPTIONS is put into the command line of `docker build` (--network none, say).
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import setup_env

ROOT = Path(__file__).resolve().parent.parent
COMPOSE_FILE = ROOT / "docker" / "compose.yaml"
CACHE = ROOT / "build" / "docker" / "cache"
IMAGES = {"cpu": {}, "gpu": {"HOROVOD_GPU_OPERATIONS": "NCCL"}}
"""What can be built, and what the set-up has to know about it."""

INTERFACE = "eth0"
READY_SECONDS = 60
COMMAND_SECONDS = 300
BUILD_SECONDS = 7200

OWN_BASE = (
    "make bases from a Debian mirror, `sudo docker/debian_base.sh`, and pass "
    "BASE_IMAGE=pqasgd_horovod-base:run BUILD_IMAGE=pqasgd_horovod-base:build (CUDA=FOLDER makes :cuda, for GPUs)"
)
CUDA_BASE = (
    "pass a BUILD_IMAGE with nvcc in PATH; `sudo CUDA=/usr/local/cuda docker/debian_base.sh` makes "
    "pqasgd_horovod-base:cuda of the toolkit in that folder"
)
# What the engine may say, what it means, and what then helps. The first that matches is shown.
EXPLANATIONS = (
    (
        r"permission denied.*(daemon|docker\.sock)|Got permission denied",
        "you may not use the Docker engine",
        "join its group, `sudo usermod -aG docker $USER`, and log in again",
    ),
    (
        r"Cannot connect to the Docker daemon|daemon running\?|ConnectionRefusedError|FileNotFoundError.*No such file",
        "no Docker engine answers",
        "start it, `sudo systemctl start docker`, or set DOCKER_HOST to one that runs",
    ),
    (
        r"port is already allocated|[Aa]ddress already in use|port \d+ is in use",
        "a port is in use on this machine",
        "see who holds it with `ss -ltnp`, or choose another one: SSH_PORT=2223",
    ),
    (
        r"Pool overlaps|available.* address pool",
        "the engine has no addresses left for another network",
        "remove networks that nothing uses: docker network prune",
    ),
    (r"the base image lacks nvcc", "the base image has no CUDA toolkit", CUDA_BASE),
    (r"the base image lacks|the base image's Python", "the base image does not fit", OWN_BASE),
    (r"/bin/sh.*(no such file|not found)", "the base image has no shell, and no Python", OWN_BASE),
    (
        r"pull access denied|manifest unknown|No such image|response from daemon: Get|failed to resolve|no such host",
        "the base image is neither here nor to be had from a registry",
        OWN_BASE,
    ),
    (
        r"[Nn]o space left on device",
        "the disk is full",
        "`docker system df` tells what takes the space; 8 GB are needed, for GPUs 22",
    ),
    (
        r"RTNETLINK|Specified qdisc",
        "the links cannot be shaped",
        "`modprobe sch_tbf`; and an engine that gives containers NET_ADMIN, as a rootless one may not",
    ),
)


class ClusterError(Exception):
    """Something failed; says what, and what to try."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(f"{message}\n  try: {remedy}")


def explain(command: Sequence[str], output: str) -> ClusterError:
    """Return the error for a command that failed, by what it printed."""
    lines = output.strip().splitlines()
    for pattern, meaning, remedy in EXPLANATIONS:
        if re.search(pattern, output, re.DOTALL):
            said = "\n".join(lines[-15:])
            return ClusterError(f"{meaning}; `{shlex.join(command[:4])}` said:\n{said}", remedy)
    said = "\n".join(lines[-40:])  # the report of a set-up that failed in an image is that long
    return ClusterError(f"`{shlex.join(command)}` failed:\n{said}", "see what it said above")


def run(command: Sequence[str], *, timeout: float = COMMAND_SECONDS, env: dict[str, str] | None = None) -> str:
    """Run a command and return what it printed; raise `ClusterError` if it fails or takes too long.

    A Ctrl-C in the terminal reaches this process only, which then ends the command before it cleans up.
    """
    with started(command, env) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise ClusterError(
                f"`{shlex.join(command[:6])}` took more than {timeout:.0f} s", "see whether the machine is overloaded"
            ) from None
    if process.returncode != 0:
        raise explain(command, output)
    return output


@contextlib.contextmanager
def started(command: Sequence[str], env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """Run a command beside the body, which ends it, with all that it has started."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | (env or {}),
            start_new_session=True,
        )
    except FileNotFoundError:
        raise ClusterError(
            f"{command[0]} is not there",
            "install Docker Engine and Compose; Debian: apt-get install docker.io docker-compose",
        ) from None
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def docker(*arguments: str, timeout: float = COMMAND_SECONDS) -> str:
    """Run a command of Docker's and return what it printed."""
    return run(["docker", *arguments], timeout=timeout)


def compose_command() -> list[str]:
    """Return how to call Compose: Docker's plugin, or the program before it."""
    try:
        docker("compose", "version")
    except ClusterError as error:
        if "is not there" in str(error):
            raise
    else:
        return ["docker", "compose"]
    run(["docker-compose", "version"])
    return ["docker-compose"]


def require_engine() -> None:
    """Raise `ClusterError` unless an engine answers."""
    docker("version")


# -- images --


def build_image(kind: str, base: str = "", build_base: str = "") -> str:
    """Build an image and return its name; only what has changed is built anew."""
    require_engine()
    arguments = ["--force-rm", "--file", str(ROOT / "docker" / f"{kind}.Dockerfile")]
    for name, image in (("BASE_IMAGE", base), ("BUILD_IMAGE", build_base)):
        arguments += ["--build-arg", f"{name}={image}"] if image else []
    arguments += [*shlex.split(os.environ.get("DOCKER_BUILD_OPTIONS", "")), str(ROOT)]
    name = f"pqasgd_horovod:{kind}"
    CACHE.mkdir(parents=True, exist_ok=True)
    docker("build", "--target", "system", "--tag", f"{name}-system", *arguments, timeout=BUILD_SECONDS)
    export_packages(kind, python_of(f"{name}-system"))
    docker("build", "--tag", name, *arguments, timeout=BUILD_SECONDS)
    return name


def python_of(image: str) -> str:
    """Return what names an image's Python in the cache, by asking it with the set-up's own function."""
    program = f"import platform, sys\n{inspect.getsource(setup_env.python_tag)}\nprint(python_tag())"
    command = ["run", "--rm", "--network", "none", "--entrypoint", "python3", image, "-c", program]
    return docker(*command).strip().splitlines()[-1]


def export_packages(kind: str, python: str) -> None:
    """Put what an image installs into its build context."""
    command = [sys.executable, str(ROOT / "scripts" / "setup_env.py"), "--export", str(CACHE), python]
    run(command, timeout=BUILD_SECONDS, env=IMAGES[kind])


# -- nodes --


class Cluster:
    """Containers of docker/compose.yaml: `with Cluster(image, 3) as cluster: cluster.run([..])`.

    Args:
        image: what the nodes run.
        num_workers: how many there are, besides the launcher.
        rate: of each node's link in tc's notation, 1gbit say; "" leaves it as it is.
    """

    def __init__(self, image: str, num_workers: int, rate: str = "") -> None:
        self.image, self.num_workers, self.rate = image, num_workers, rate
        self.project = f"pqasgd-{os.getpid()}-{secrets.token_hex(2)}"

    def __enter__(self) -> Cluster:
        require_engine()
        try:
            self._start()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _start(self) -> None:
        command = [*compose_command(), "-p", self.project, "-f", str(COMPOSE_FILE)]
        command += ["up", "-d", "--no-build", "--scale", f"worker={self.num_workers}"]
        run(command, env={"PQASGD_IMAGE": self.image})
        (self.launcher,) = self._containers("launcher")
        self.workers = self._containers("worker")
        # Open MPI takes no underscore in a host's name, as there may be in a container's.
        self.hosts = [docker("inspect", "--format", "{{.Config.Hostname}}", worker).strip() for worker in self.workers]
        self._wait_until_ready()
        if self.rate:
            for node in self.nodes:
                shape = f"qdisc replace dev {INTERFACE} root tbf rate {self.rate} burst 256kb latency 50ms"
                docker("exec", "--user", "0", node, "tc", *shape.split())

    @property
    def nodes(self) -> list[str]:
        """The names of all containers."""
        return [self.launcher, *self.workers]

    def _containers(self, service: str) -> list[str]:
        names = docker("ps", "--all", *self._of_project(), "--format", "{{.Names}}", *self._label("service", service))
        return sorted(names.split(), key=lambda name: (len(name), name))

    def _of_project(self) -> list[str]:
        return self._label("project", self.project)

    @staticmethod
    def _label(name: str, value: str) -> list[str]:
        return ["--filter", f"label=com.docker.compose.{name}={value}"]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        waiting = self.nodes
        while waiting:
            states = {
                node: docker("inspect", "--format", "{{.State.Status}} {{.State.Health.Status}}", node)
                for node in waiting
            }
            ended = [node for node, state in states.items() if not state.startswith("running")]
            if ended or time.monotonic() > deadline:
                node = (ended or waiting)[0]
                raise explain(
                    ["docker", "logs", node], f"{node} did not get ready: {states[node]}\n{docker('logs', node)}"
                )
            waiting = [node for node, state in states.items() if "running healthy" not in state]
            time.sleep(0.5)

    def command(self, program: Sequence[str], launcher: str = "mpi") -> list[str]:
        """Return the command line that runs a program on all workers, one rank on each."""
        hosts = ",".join(f"{host}:1" for host in self.hosts)
        own = ["horovodrun", f"--{launcher}", "-np", str(self.num_workers), "-H", hosts]
        own += ["--network-interfaces", INTERFACE, "--start-timeout", str(READY_SECONDS)]
        if launcher == "mpi":  # a rank that waits leaves the core to the others
            own += [f"--mpi-args=--mca mpi_yield_when_idle 1 --mca oob_tcp_if_include {INTERFACE}"]
        return ["docker", "exec", self.launcher, *own, *program]

    def run(self, program: Sequence[str], launcher: str = "mpi", timeout: float = COMMAND_SECONDS) -> str:
        """Run a program on all workers, and return what the ranks printed."""
        return run(self.command(program, launcher), timeout=timeout)

    def bytes_sent(self) -> dict[str, int]:
        """Return what each node's interface has sent so far, as the kernel counts it."""
        path = f"/sys/class/net/{INTERFACE}/statistics/tx_bytes"
        return {node: int(docker("exec", node, "cat", path)) for node in self.nodes}

    def remove(self) -> None:
        """Remove containers, network and volume; signals wait until that is done."""
        with signals_held():
            # By label, not by Compose: that also finds what a broken start has left.
            for kind, listing, removal in (
                ("container", ["ps", "--all"], ["rm", "--force", "--volumes"]),
                ("network", ["network", "ls"], ["network", "rm"]),
                ("volume", ["volume", "ls"], ["volume", "rm", "--force"]),
            ):
                if found := docker(*listing, "--quiet", *self._of_project()).split():
                    docker(*removal, *found)
                if left := docker(*listing, "--quiet", *self._of_project()).split():
                    raise ClusterError(
                        f"a {kind} is still there: {' '.join(left)}", f"docker {shlex.join([*removal, *left])}"
                    )


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait until the body is done."""
    held = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def main(argv: list[str] | None = None) -> None:
    """Build an image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", choices=IMAGES, required=True, help="which Dockerfile")
    add_base_arguments(parser)
    args = parser.parse_args(argv)
    print(f"built {build_image(args.image, args.base, args.build_base)}")


def add_base_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what chooses an image's base."""
    parser.add_argument(
        "--base", default="", metavar="IMAGE", help="what the image is built on (the Dockerfile's choice)"
    )
    parser.add_argument("--build-base", default="", metavar="IMAGE", help="what it is built with (the same)")


if __name__ == "__main__":
    try:
        main()
    except ClusterError as error:
        sys.exit(f"cluster.py: {error}")
