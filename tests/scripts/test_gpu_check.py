"""What gpu-check says where it cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu_check(monkeypatch, tmp_path):
    """The script as a module, which finds nothing yet."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import gpu_check

    monkeypatch.setattr(gpu_check, "BUILD", tmp_path / "build")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    for name in ("HOROVOD_NCCL_HOME", "LDFLAGS"):
        monkeypatch.delenv(name, raising=False)
    spec = SimpleNamespace(origin=str(tmp_path / "site" / "torch" / "__init__.py"))
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: spec)
    return gpu_check


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_pytorchs_nccl_is_taken_and_not_the_toolkits(gpu_check, tmp_path):
    touch(tmp_path / "cuda" / "include" / "nccl.h")  # a process that loads PyTorch would hold two
    assert gpu_check.find_nccl() == {}
    package = tmp_path / "site" / "nvidia" / "nccl"
    touch(package / "include" / "nccl.h", package / "lib" / "libnccl.so.2")
    for _ in range(2):  # on top of what an earlier run has left
        found = gpu_check.find_nccl()
        home = Path(found["HOROVOD_NCCL_HOME"])
        assert (home / "include" / "nccl.h").is_file()
        assert (home / "lib" / "libnccl.so").resolve() == (package / "lib" / "libnccl.so.2").resolve()
        assert found["HOROVOD_GPU_OPERATIONS"] == "NCCL"
        assert found["HOROVOD_NCCL_LINK"] == "SHARED"
        assert found["LDFLAGS"] == f"-Wl,-rpath,'{package / 'lib'}'"


def test_an_nccl_that_is_named_goes_first(gpu_check, monkeypatch, tmp_path):
    package = tmp_path / "site" / "nvidia" / "nccl"
    touch(package / "include" / "nccl.h", package / "lib" / "libnccl.so.2")
    monkeypatch.setenv("HOROVOD_NCCL_HOME", "/opt/nccl")
    assert gpu_check.find_nccl() == {"HOROVOD_GPU_OPERATIONS": "NCCL", "HOROVOD_NCCL_HOME": "/opt/nccl"}


def check(**environment):
    command = [sys.executable, str(ROOT / "scripts" / "gpu_check.py")]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_without_compilers_it_names_them(tmp_path):
    result = check(PATH=str(tmp_path), CUDA_HOME=str(tmp_path))
    assert result.returncode == 1
    assert "gpu-check: not found: nvcc, cmake, c++; install the CUDA toolkit" in result.stderr


def test_without_a_gpu_it_says_so(tmp_path):
    for name in ("nvcc", "cmake", "c++"):
        (tmp_path / name).touch(0o755)
    result = check(PATH=f"{tmp_path}:{os.environ['PATH']}", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 1
    assert "gpu-check: no GPU was found (AssertionError: torch.cuda.is_available() is False)" in result.stderr
