#!/usr/bin/env python3
"""On a machine with a GPU: build what is needed, run the GPU tests and the benchmark. ``make gpu-check`` runs it.

Needs this checkout, a CUDA toolkit (nvcc), CMake, a C++ compiler, and a Python with PyTorch for CUDA. Packages that are
missing (pytest, Horovod and what they need) come from a folder of wheels and source distributions that travels with the
checkout, or from pip's index where the folder is not there. Fill it where an index can be reached, for the Python of
the machine with the GPU:

    python3 scripts/gpu_check.py --fill --python-version 3.12

Nothing is installed outside of ``build/gpu``. Ends with an error that says what is missing, if anything is.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from apply_patch import apply_patch
from setup_env import HOROVOD_SDIST_SHA256, HOROVOD_VERSION, nccl_flags

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
CARRIED = BUILD / "carried"
SITE = BUILD / "site"
# What each package that may be missing is imported as.
PACKAGES = {
    "numpy": "numpy",
    "pytest": "pytest",
    "pytest-timeout": "pytest_timeout",
    "hypothesis": "hypothesis",
    "setuptools": "setuptools",
    "wheel": "wheel",
    "cloudpickle": "cloudpickle",
    "psutil": "psutil",
    "PyYAML": "yaml",
    "packaging": "packaging",
}


class CheckError(Exception):
    """This machine lacks something; the message says what, and what to do."""


def cuda_home() -> str:
    """Return the folder of the CUDA toolkit."""
    return os.environ.get("CUDA_HOME", "/usr/local/cuda")


def environment() -> dict[str, str]:
    """Return the environment in which what is built here is found first."""
    path = os.pathsep.join([str(ROOT), str(SITE), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    programs = os.pathsep.join([str(SITE / "bin"), os.environ.get("PATH", ""), f"{cuda_home()}/bin"])
    chosen = {"PQASGD_WITH_CUDA": "1", "PQASGD_WITHOUT_TENSORFLOW": "1"}
    return {**os.environ, **chosen, "PYTHONPATH": path, "PATH": programs}


def run(what: str, command: Sequence[str], **variables: str) -> None:
    """Run a command and show its output; raise CheckError if it fails."""
    print(f"== {what}", flush=True)
    status = subprocess.run(command, cwd=ROOT, env={**environment(), **variables}, check=False).returncode
    if status:
        raise CheckError(f"{what} failed with exit status {status}; its output is above")


def check_machine() -> None:
    """Raise CheckError unless there is a GPU, and what it takes to compile for it."""
    search = environment()["PATH"]
    lacking = [name for name in ("nvcc", "cmake", "c++") if shutil.which(name, path=search) is None]
    if lacking:
        raise CheckError(f"not found: {', '.join(lacking)}; install the CUDA toolkit, CMake and a C++ compiler")
    if importlib.util.find_spec("torch") is None:
        raise CheckError(f"PyTorch is not installed for {sys.executable}: run this with the Python that has it")
    question = "import torch; assert torch.cuda.is_available(), 'torch.cuda.is_available() is False'"
    asked = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, check=False)
    if asked.returncode:
        reason = asked.stderr.strip().splitlines()[-1]
        raise CheckError(f"no GPU was found ({reason}): see `nvidia-smi`, and whether PyTorch is a build for CUDA")


def pip(*arguments: str) -> list[str]:
    """Return the command for this Python's pip."""
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]


def fill(python_version: str) -> None:
    """Download everything that may be missing, for another Python on x86-64 Linux."""
    CARRIED.mkdir(parents=True, exist_ok=True)
    names = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
    platforms = [f"--platform={name}_x86_64" for name in names]
    chosen = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python_version}", *platforms]
    run("wheels", pip("download", *chosen, "-d", str(CARRIED), *PACKAGES))
    download_horovod(CARRIED)


def download_horovod(folder: Path) -> None:
    """Download Horovod's source distribution."""
    chosen = ["--no-deps", "--no-build-isolation", "--no-binary=horovod", "-d", str(folder)]
    run("Horovod's source", pip("download", *chosen, f"horovod=={HOROVOD_VERSION}"))


def install_packages() -> None:
    """Install packages that are missing."""
    missing = [name for name, module in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        source = ["--no-index", "--find-links", str(CARRIED)] if CARRIED.is_dir() else []
        run(f"packages: {', '.join(missing)}", pip("install", *source, "--target", str(SITE), *missing))


def find_nccl() -> dict[str, str]:
    """Return what Horovod is built with to use the NCCL of HOROVOD_NCCL_HOME, or PyTorch's; empty: there is none."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    return nccl_flags(Path(torch.origin).parents[1], BUILD / "nccl")


def build_horovod() -> None:
    """Build Horovod for PyTorch, with Gloo, and with NCCL where that is."""
    found = subprocess.run(
        [sys.executable, "-c", "import horovod.torch"], env=environment(), capture_output=True, check=False
    )
    if not found.returncode:
        return
    with tempfile.TemporaryDirectory() as folder:
        sdist = CARRIED / f"horovod-{HOROVOD_VERSION}.tar.gz"
        if not sdist.is_file():
            download_horovod(Path(folder))
            sdist = Path(folder) / sdist.name
        if hashlib.sha256(sdist.read_bytes()).hexdigest() != HOROVOD_SDIST_SHA256:
            raise CheckError(f"{sdist} is not the source distribution that the patch is for: remove it and fill again")
        shutil.unpack_archive(sdist, folder)
        source = Path(folder) / f"horovod-{HOROVOD_VERSION}"
        apply_patch(ROOT / "scripts" / f"horovod-{HOROVOD_VERSION}.patch", source)
        flags = {
            "HOROVOD_WITH_PYTORCH": "1",
            "HOROVOD_WITHOUT_TENSORFLOW": "1",
            "HOROVOD_WITHOUT_MXNET": "1",
            "HOROVOD_WITHOUT_MPI": "1",
            "HOROVOD_WITH_GLOO": "1",
            "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
            "MAKEFLAGS": f"-j{len(os.sched_getaffinity(0))}",
        }
        flags.update(find_nccl())
        if Path(cuda_home(), "bin", "nvcc").is_file():  # a script in PATH may stand for it, beside which is no toolkit
            flags["HOROVOD_CUDA_HOME"] = cuda_home()
        install = pip("install", "--no-index", "--no-build-isolation", "--no-deps", "--target", str(SITE), str(source))
        run("Horovod", install, **flags)


def say_what_of_nccl() -> None:
    """Say whether the training that follows takes NCCL, and why not if it does not."""
    question = "import torch, horovod.torch as h; print(h.nccl_built(), torch.cuda.device_count())"
    asked = subprocess.run(
        [sys.executable, "-c", question], env=environment(), capture_output=True, text=True, check=True
    )
    built, num_devices = map(int, asked.stdout.split())
    reason = "" if built else "Horovod was built without it: PyTorch brought none, and HOROVOD_NCCL_HOME names no other"
    if built and num_devices < 2:
        reason = "two ranks share one GPU, which it refuses; messages travel through host memory"
    print(f"== NCCL: {f'not run, {reason}' if reason else f'version {built}, two GPUs'}", flush=True)


def main() -> None:
    """Check this machine, build, test and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--fill", action="store_true", help="only fill build/gpu/carried, where an index can be reached"
    )
    parser.add_argument("--python-version", default="3.12", help="of the machine with the GPU (default: 3.12)")
    parser.add_argument("--without-horovod", action="store_true", help="only the kernels and averages in one process")
    parser.add_argument("--elements", type=int, default=1 << 28, help="of the benchmark (default: 2^28)")
    arguments = parser.parse_args()
    try:
        if arguments.fill:
            fill(arguments.python_version)
            return
        check_machine()
        install_packages()
        run("the core and the kernels", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"])
        training: list[str] = []
        if not arguments.without_horovod:
            build_horovod()
            ranks = [sys.executable, "-m", "horovod.runner.launch", "--gloo", "-np", "2"]
            training = [*ranks, sys.executable, "scripts/gpu_training.py"]
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
        run("tests", [*pytest, "tests/gpu"])
        run("benchmark", [sys.executable, "scripts/bench_gpu.py", "--elements", str(arguments.elements)])
        if training:
            say_what_of_nccl()
            run("training on two ranks", training)
    except CheckError as error:
        raise SystemExit(f"gpu-check: {error}") from None


if __name__ == "__main__":
    main()
