"""What gpu-check says where it cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


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
