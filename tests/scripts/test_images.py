"""What containers are made from, checked without an engine; `make test-cluster` builds and runs them."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
KINDS = ("cpu", "gpu")
SCRIPTS = sorted([*DOCKER.glob("*.sh"), *(ROOT / "scripts").glob("*.sh"), ROOT / "scripts" / "slurm.sbatch"])


def instructions(kind):
    """The instructions of a Dockerfile, one string each."""
    lines = (DOCKER / f"{kind}.Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    return [" ".join(line.split()) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


# -- Dockerfiles --


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_gets_every_version_from_the_one_list(kind):
    for instruction in instructions(kind):
        assert "==" not in instruction, instruction
        assert "pip install" not in instruction, instruction
        assert "apt-get" not in instruction, instruction  # docker/system.sh has the packages, for both stages
        assert not instruction.startswith("ADD "), instruction


@pytest.mark.parametrize("kind", KINDS)
def test_bases_are_arguments_with_a_pinned_default(kind):
    bases = {}
    stages = []
    for instruction in instructions(kind):
        if match := re.fullmatch(r"ARG (\w+)=(\S+)", instruction):
            bases[match[1]] = match[2]
        if match := re.fullmatch(r"FROM (\S+) AS (\w+)", instruction):
            stages.append(match[2])
            assert match[1] in ("${BASE_IMAGE}", "${BUILD_IMAGE}", *stages), instruction
    assert stages == ["base", "system", "build", "run"]  # unfit bases end a build before it has compiled anything
    assert set(bases) == {"BASE_IMAGE", "BUILD_IMAGE"}
    for name, base in bases.items():
        assert base == "${BASE_IMAGE}" or re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-\S+", base), (name, base)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_run_by_an_ordinary_user_and_tests_itself_as_that_user(kind):
    own = instructions(kind)
    run = own[own.index("FROM base AS run") :]
    (user,) = (index for index, line in enumerate(run) if line.startswith("USER "))
    assert run[user] == "USER trainer"
    (check,) = (index for index, line in enumerate(run) if "horovodrun --check-build" in line)
    assert check > user
    assert "pqasgd_horovod.torch" in run[check]
    assert "pqasgd_horovod.tensorflow" in run[check]
    for name in ("LABEL", "HEALTHCHECK", "EXPOSE", "ENTRYPOINT"):
        assert any(line.startswith(f"{name} ") for line in run), name


@pytest.mark.parametrize("kind", KINDS)
def test_no_key_is_made_while_an_image_is_built(kind):
    for instruction in instructions(kind):
        assert "ssh-keygen" not in instruction, instruction
        assert not re.search(r"(?i)(password|secret|token|id_rsa|id_ed25519)", instruction), instruction
    assert "rm -f /etc/ssh/ssh_host_*" in (DOCKER / "system.sh").read_text()  # Debian's package makes some


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_image_copies_is_there_and_not_ignored(kind):
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for instruction in instructions(kind):
        if instruction.startswith("COPY ") and "--from" not in instruction:
            for source in instruction.split()[1:-1]:
                assert source == "build/docker/cache" or list(ROOT.glob(source)), source
                assert any(source.startswith(line[1:]) for line in ignored if line.startswith("!")), source


def test_the_images_differ_in_cuda_only():
    cpu, gpu = (instructions(kind) for kind in KINDS)
    differences = [(ours, theirs) for ours, theirs in zip(cpu, gpu, strict=True) if ours != theirs]
    kinds = [ours.split()[0] for ours, _ in differences]
    assert kinds == ["ARG", "ARG", "RUN", "ENV", "ENV", "RUN", "LABEL"], differences
    (system, system_with_cuda), (check, check_with_nccl) = (pair for pair in differences if pair[0].startswith("RUN"))
    assert system_with_cuda == f"{system}-cuda"
    assert check_with_nccl.startswith(check)  # that of the other image, and then its own


def test_the_gpu_image_fails_to_build_without_nccl_or_kernels():
    (check,) = (line for line in instructions("gpu") if "horovodrun --check-build" in line)
    # TensorFlow first: PyTorch would have loaded NCCL for it.
    assert "import horovod.tensorflow as f, horovod.torch as t; assert f.nccl_built() and t.nccl_built()" in check
    assert "pqasgd_horovod.native.cuda" in check
    assert "||" not in check
    assert ";" not in re.sub(r'"[^"]*"', "", check)


# -- compose.yaml --


def test_compose_has_a_launcher_and_workers_on_a_private_network():
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    assert set(compose["services"]) == {"launcher", "worker"}
    for name, service in compose["services"].items():
        assert service["command"] == [name]
        assert service["networks"] == ["cluster"]
        assert service["volumes"] == ["keys:/cluster"]
        assert service["cap_drop"] == ["ALL"]
        assert service["cap_add"] == ["NET_ADMIN"]
        assert not {"ports", "privileged", "network_mode", "environment", "container_name"} & set(service)
        assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    assert compose["networks"] == {"cluster": {"internal": True}}
    assert compose["volumes"] == {"keys": {}}


# -- shell scripts --


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse(path):
    shell = "bash" if "bash" in path.read_text().splitlines()[0] else "sh"
    subprocess.run([shell, "-n", str(path)], check=True)
    if program := shutil.which("shellcheck"):  # no Python package has it
        result = subprocess.run([program, str(path)], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout


def shell(script, *arguments, path="", **environment):
    """Run one of our scripts with a PATH of its own; return exit code and output."""
    command = [shutil.which("bash"), str(script), *arguments]
    env = {"PATH": path or os.environ["PATH"], **environment}
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=30, check=False)
    return result.returncode, result.stdout + result.stderr


def program(folder, name, text):
    """Put a program into a folder, and return the folder."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!{shutil.which('bash')}\n{text}\n")
    (folder / name).chmod(0o755)
    return folder


def test_a_base_without_python_is_an_error_that_says_what_to_do(tmp_path):
    code, output = shell(DOCKER / "system.sh", "run", path=str(tmp_path))
    assert code == 1
    assert "the base image lacks python3" in output
    assert "has no apt-get" in output
    assert "docker/debian_base.sh" in output


def test_a_base_that_cannot_install_is_an_error_that_says_what_to_do(tmp_path):
    code, output = shell(DOCKER / "system.sh", "build", path=str(program(tmp_path / "bin", "apt-get", "exit 100")))
    assert code == 1
    assert "the base image lacks python3" in output
    assert "(no network?)" in output
    assert "docker/debian_base.sh" in output


def test_a_base_that_apt_does_not_mend_is_an_error_that_names_what_is_missing(tmp_path):
    tools = program(tmp_path / "bin", "apt-get", "exit 0")
    program(tools, "rm", "exit 0")
    code, output = shell(DOCKER / "system.sh", "run", path=str(tools))
    assert code == 1
    assert "the base image lacks python3, and apt-get did not change that" in output


def test_a_base_without_nvcc_is_an_error_of_the_gpu_image_only(tmp_path):
    apt = str(program(tmp_path / "bin", "apt-get", "exit 100"))
    code, output = shell(DOCKER / "system.sh", "build-cuda", path=apt)
    assert code == 1
    assert "the base image lacks nvcc" in output
    assert "BUILD_IMAGE" in output
    assert "CUDA=FOLDER docker/debian_base.sh" in output
    assert "nvcc" not in shell(DOCKER / "system.sh", "build", path=apt)[1]
    program(tmp_path / "bin", "nvcc", "exit 0")
    assert "the base image lacks python3" in shell(DOCKER / "system.sh", "build-cuda", path=apt)[1]


def test_packages_for_building_include_those_for_running():
    run, build = (shell(DOCKER / "system.sh", stage, "--packages")[1].split() for stage in ("run", "build"))
    assert set(run) < set(build)


def test_a_port_in_use_is_an_error_that_names_it(tmp_path):
    fake = program(tmp_path / "bin", "ss", "echo LISTEN 0 128 0.0.0.0:22")  # where iproute2 is not installed
    path = os.environ["PATH"] if shutil.which("ss") else f"{fake}:{os.environ['PATH']}"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        code, output = shell(DOCKER / "node.sh", "worker", path=path, HOME=str(tmp_path), SSH_PORT=port)
    assert code == 1
    assert f"port {port} is in use" in output
    assert "SSH_PORT=" in output


def test_a_node_without_the_shared_volume_is_an_error(tmp_path):
    assert not Path("/cluster").exists()
    code, output = shell(DOCKER / "node.sh", "launcher", HOME=str(tmp_path))
    assert code == 1
    assert "/cluster is not writable" in output


def test_bases_need_root_and_their_tools(tmp_path):
    path = program(tmp_path / "bin", "id", "echo 1000")
    code, output = shell(DOCKER / "debian_base.sh", path=f"{path}:{os.environ['PATH']}")
    assert code == 1
    assert "sudo docker/debian_base.sh" in output
    program(path, "id", "echo 0")
    program(path, "dirname", "echo .")
    code, output = shell(DOCKER / "debian_base.sh", path=str(path))
    assert code == 1
    assert "debootstrap is not there" in output
    program(path, "debootstrap", "exit 0")
    program(path, "docker", "exit 0")
    code, output = shell(DOCKER / "debian_base.sh", path=str(path), CUDA=str(tmp_path))
    assert code == 1
    assert f"CUDA={tmp_path} is no CUDA toolkit: it has no bin/nvcc" in output
