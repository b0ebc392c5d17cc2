"""Ways onto a cluster that need one to run: manifests against what their documentation allows, scripts with fakes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
MANIFESTS = sorted((SCRIPTS / "kubernetes").glob("*.yaml"))

# MPIJob v2beta1 and the parts of a pod that we use, as the API's documentation has them: a type, a set of values, a
# list of one kind, or a mapping, where "!" marks what has to be there.
CONTAINER = {
    "name!": str,
    "image!": str,
    "imagePullPolicy": {"Always", "IfNotPresent", "Never"},
    "command": [str],
    "args": [str],
    "env": [{"name!": str, "value": str}],
    "securityContext": {"runAsUser": int, "allowPrivilegeEscalation": bool},
    "readinessProbe": {"tcpSocket": {"port!": int}, "initialDelaySeconds": int, "periodSeconds": int},
    "resources": {
        "requests": {"cpu": str, "memory": str, "nvidia.com/gpu": int},
        "limits": {"cpu": str, "memory": str, "nvidia.com/gpu": int},
    },
}
REPLICAS = {
    "replicas": int,
    "restartPolicy": {"Never", "OnFailure"},
    "template!": {"metadata": dict, "spec!": {"containers!": [CONTAINER], "volumes": [dict], "nodeSelector": dict}},
}
MPI_JOB = {
    "apiVersion!": {"kubeflow.org/v2beta1"},
    "kind!": {"MPIJob"},
    "metadata!": {"name!": str, "namespace": str, "labels": dict},
    "spec!": {
        "slotsPerWorker": int,
        "sshAuthMountPath": str,
        "mpiImplementation": {"OpenMPI", "Intel", "MPICH"},
        "launcherCreationPolicy": {"AtStartup", "WaitForWorkersReady"},
        "runLauncherAsWorker": bool,
        "runPolicy": {
            "cleanPodPolicy": {"None", "Running", "All"},
            "ttlSecondsAfterFinished": int,
            "activeDeadlineSeconds": int,
            "backoffLimit": int,
            "suspend": bool,
        },
        "mpiReplicaSpecs!": {"Launcher!": REPLICAS, "Worker!": REPLICAS},
    },
}


def mistakes(value, schema, where="manifest"):
    """What of a value its schema does not allow."""
    if isinstance(schema, set):
        return [] if value in schema else [f"{where}: {value!r} is none of {sorted(schema)}"]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{where}: {value!r} is no list"]
        return [text for index, item in enumerate(value) for text in mistakes(item, schema[0], f"{where}[{index}]")]
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{where}: {value!r} is no mapping"]
        known = {name.rstrip("!"): inner for name, inner in schema.items()}
        found = [f"{where}: no {name[:-1]}" for name in schema if name.endswith("!") and name[:-1] not in value]
        found += [f"{where}: {name} is not a field" for name in value if name not in known]
        shared = [name for name in value if name in known]
        return found + [text for name in shared for text in mistakes(value[name], known[name], f"{where}.{name}")]
    right = isinstance(value, schema) and not (schema is int and isinstance(value, bool))
    return [] if right else [f"{where}: {value!r} is no {schema.__name__}"]


def read(path):
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_are_what_the_operator_documents(path):
    assert mistakes(read(path), MPI_JOB) == []


def test_the_check_of_manifests_finds_mistakes():
    manifest = read(MANIFESTS[0])
    spec = manifest["spec"]
    manifest["apiVersion"] = "kubeflow.org/v1"
    spec["cleanPodPolicy"] = "Running"  # where v1 has it
    spec["slotsPerWorker"] = "1"
    del spec["mpiReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["image"]
    spec["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]["args"][2] = 4
    assert mistakes(manifest, MPI_JOB) == [
        "manifest.apiVersion: 'kubeflow.org/v1' is none of ['kubeflow.org/v2beta1']",
        "manifest.spec: cleanPodPolicy is not a field",
        "manifest.spec.slotsPerWorker: '1' is no int",
        "manifest.spec.mpiReplicaSpecs.Launcher.template.spec.containers[0].args[2]: 4 is no str",
        "manifest.spec.mpiReplicaSpecs.Worker.template.spec.containers[0]: no image",
    ]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_fit_the_image(path):
    spec = read(path)["spec"]
    kind = path.stem.removeprefix("mpijob-")
    launcher, worker = (spec["mpiReplicaSpecs"][name] for name in ("Launcher", "Worker"))
    ranks = worker["replicas"] * spec["slotsPerWorker"]
    (starts,), (works,) = (each["template"]["spec"]["containers"] for each in (launcher, worker))
    assert launcher["replicas"] == 1
    assert starts["args"][:3] == ["mpirun", "-np", str(ranks)]
    assert works["args"] == ["worker"]
    for container in (starts, works):
        assert container["image"].endswith(f":{kind}")
        assert container["securityContext"]["runAsUser"] == 1000
    dockerfile = (ROOT / "docker" / f"{kind}.Dockerfile").read_text()
    assert "--uid 1000 --shell /bin/sh trainer" in dockerfile
    assert spec["sshAuthMountPath"] == "/home/trainer/.ssh"
    assert f"EXPOSE {works['readinessProbe']['tcpSocket']['port']}" in dockerfile
    (script,) = (argument for argument in starts["args"] if argument.startswith("/opt/"))
    assert (ROOT / Path(script).relative_to("/opt/pqasgd_horovod")).is_file()
    assert ("nvidia.com/gpu" in works["resources"]["limits"]) == (kind == "gpu")


# -- Slurm --


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose programs print their arguments."""
    (tmp_path / "scripts").mkdir()
    for name in ("run_on_hosts.sh", "slurm.sbatch"):
        shutil.copy(SCRIPTS / name, tmp_path / "scripts")
    for name in ("mpirun", "horovodrun"):
        put(tmp_path / ".venv" / "bin" / name, 'echo "$(basename "$0") $*"')
    put(tmp_path / ".venv" / "bin" / "python", "echo 0.1.0")
    return tmp_path


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def bash(folder, script, *arguments, **environment):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PQASGD_"))}
    env |= {"PATH": f"{folder}/bin:{os.environ['PATH']}", **environment}
    command = ["bash", str(folder / "scripts" / script), *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env, timeout=30, check=False)
    return result.returncode, result.stdout, result.stderr


def slurm(folder, *arguments, **environment):
    job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(folder), "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "2"}
    return bash(folder, "slurm.sbatch", *arguments, **job, **environment)


def test_slurm_starts_one_rank_per_task(checkout):
    code, output, errors = slurm(checkout, "scripts/train.py", "--bits", "4", PQASGD_INTERFACE="ib0")
    assert (code, errors) == (0, "")
    assert output.startswith("mpirun -np 8 --bind-to none --map-by ppr:2:node --mca btl_tcp_if_include ib0 ")
    assert output.endswith(f"{checkout}/.venv/bin/python scripts/train.py --bits 4\n")


def test_a_requeued_slurm_job_resumes_if_there_is_a_checkpoint(checkout):
    arguments = ("scripts/train.py", "--checkpoint", "run.pt")
    assert slurm(checkout, *arguments)[1].endswith("scripts/train.py --checkpoint run.pt\n")
    (checkout / "run.pt").touch()
    assert slurm(checkout, *arguments)[1].endswith("scripts/train.py --checkpoint run.pt --resume\n")


def test_slurm_says_what_is_missing(checkout):
    assert "no program to train" in slurm(checkout)[2]
    assert "this is no Slurm job" in bash(checkout, "slurm.sbatch", "train.py")[2]
    shutil.rmtree(checkout / ".venv")
    code, _, errors = slurm(checkout, "train.py")
    assert code == 1
    assert "after make setup" in errors


# -- ssh --

HOSTS = "# two\nnode1 slots=2\nnode2   # one rank\n"


def on_hosts(folder, ssh, *arguments, hosts=HOSTS, **environment):
    put(folder / "bin" / "ssh", ssh)
    (folder / "hosts").write_text(hosts)
    return bash(folder, "run_on_hosts.sh", "hosts", *(arguments or ("train.py",)), **environment)


def test_hosts_are_asked_and_then_started(checkout):
    code, output, errors = on_hosts(checkout, "echo 0.1.0", "train.py", "--bits", "4", PQASGD_INTERFACE="eth0")
    assert (code, errors) == (0, "")
    assert output == "horovodrun --mpi -np 3 -H node1:2,node2:1 --network-interfaces eth0 python train.py --bits 4\n"
    code, output, _ = on_hosts(checkout, "echo 0.1.0", PQASGD_LAUNCHER="gloo", SSH_PORT="2222")
    assert output == "horovodrun --gloo -np 3 -H node1:2,node2:1 --ssh-port 2222 python train.py\n"


@pytest.mark.parametrize(
    ("ssh", "message", "remedy"),
    [
        ("echo no route to host; exit 255", "ssh does not reach node1: no route to host", "ssh -v node1"),
        ("echo 0.0.9", "node1 has pqasgd_horovod 0.0.9, and this host 0.1.0", "the same checkout"),
        ("echo no such file; exit 127", "does not load on node1: no such file", "make setup there"),
    ],
)
def test_a_host_that_does_not_fit_is_named_before_anything_starts(checkout, ssh, message, remedy):
    code, output, errors = on_hosts(checkout, ssh)
    assert code == 1
    assert output == ""
    assert message in errors
    assert remedy in errors


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        ("", "names no host"),
        ("node1 slots=0\n", "line 1: 'node1 slots=0' is not a host"),
        ("node1\nnode2 max=3\n", "line 2: 'node2 max=3' is not a host"),
        ("node1;reboot\n", "line 1: 'node1;reboot' is not a host"),
    ],
)
def test_a_bad_hostfile_is_an_error_that_names_the_line(checkout, hosts, message):
    code, _, errors = on_hosts(checkout, "echo 0.1.0", hosts=hosts)
    assert code == 1
    assert message in errors


def test_an_unknown_launcher_is_an_error(checkout):
    assert "PQASGD_LAUNCHER=srun is neither mpi nor gloo" in on_hosts(checkout, "", PQASGD_LAUNCHER="srun")[2]
