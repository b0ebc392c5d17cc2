#!/usr/bin/env python3
"""Run the tests of the native core with it built under AddressSanitizer and UndefinedBehaviorSanitizer.

Everything happens in a copy below build/sanitize: the checkout keeps its optimized library. Arguments go to pytest:

    python scripts/sanitize.py -k corrupted
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "sanitize"
COPIED = ("pqasgd_horovod", "tests", "scripts", "setup.cfg")
TESTED = ("tests/native", "tests/codecs", "tests/exchange", "pqasgd_horovod/codecs", "pqasgd_horovod/exchange")
NOT_OF_THE_CORE = (
    "tests/native/test_cuda.py::test_nvcc_has_compiled_them",  # the copy has no kernels of nvcc's, and no setup.py
    "tests/native/test_cuda.py::test_asking_for_them_without_a_compiler_is_an_error",
    "tests/exchange/test_placement.py::test_the_host_does_not_reach_them",  # waits for the signal that ASan reports
)
RUNTIMES = (
    "libasan.so",
    "libubsan.so",
    "libstdc++.so",
)  # the sanitizers' must come before all others in an uninstrumented Python


def build() -> None:
    """Copy the package and put a sanitized core into the copy."""
    for name in COPIED:
        target = COPY / name
        if (ROOT / name).is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__", "*.so", ".hypothesis"))
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    cmake_build = COPY / "cmake"
    subprocess.run(
        [
            "cmake", "-S", str(ROOT / "pqasgd_horovod" / "native"), "-B", str(cmake_build), "-DPQASGD_SANITIZE=ON",
            f"-DPQASGD_OUTPUT_DIR={COPY / 'pqasgd_horovod' / 'native'}", f"-DPython3_EXECUTABLE={sys.executable}",
        ],
        check=True,
    )  # fmt: skip
    jobs = str(len(os.sched_getaffinity(0)))
    subprocess.run(["cmake", "--build", str(cmake_build), "--parallel", jobs], check=True)


def runtime(name: str) -> str:
    """Return the compiler's path of a run-time library."""
    command = [os.environ.get("CXX") or "g++", f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        sys.exit(f"sanitize: the compiler has no {name}\n  try: install its sanitizer libraries (libasan and libubsan)")
    return path


def main() -> int:
    """Build, run pytest on the copy and return its status."""
    build()
    environment = os.environ | {
        "PYTHONPATH": str(COPY),
        "LD_PRELOAD": ":".join(runtime(name) for name in RUNTIMES),
        # No leak check: the interpreter itself leaks by design.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    where = [sys.executable, "-c", "import pqasgd_horovod.native as n; print(n.__file__)"]
    loaded = Path(
        subprocess.run(where, env=environment, cwd=COPY, capture_output=True, text=True, check=True).stdout.strip()
    )
    if not loaded.is_relative_to(COPY):
        sys.exit(f"sanitize: the package was imported from {loaded}, not from {COPY}")
    tests = [name for name in TESTED if (COPY / name).exists()]
    # A sanitizer's report ends the process; pytest must not have captured its file descriptor.
    pytest = [str(Path(sys.executable).with_name("pytest")), "--capture=sys", *tests]
    pytest += [*(f"--deselect={test}" for test in NOT_OF_THE_CORE), *sys.argv[1:]]
    status = subprocess.run(pytest, env=environment, cwd=COPY).returncode
    if status < 0:
        print(f"sanitize: the tests were ended by signal {-status}; the sanitizer's report is above", file=sys.stderr)
    return int(status != 0)


if __name__ == "__main__":
    sys.exit(main())
