"""Compile the native libraries with CMake when the package is built. All that describes the package is in setup.cfg.

The core is always built. TensorFlow's ops are built against the TensorFlow that is installed, as Horovod builds its
own, and the kernels for GPUs where there is nvcc. PQASGD_WITH_TENSORFLOW=1 and PQASGD_WITH_CUDA=1 make their absence an
error, PQASGD_WITHOUT_TENSORFLOW=1 and PQASGD_WITHOUT_CUDA=1 leave them out.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

PACKAGE = Path(__file__).resolve().parent / "pqasgd_horovod"
CORE = "pqasgd_horovod.native.libpqasgd_core"
CUDA = "pqasgd_horovod.native.libpqasgd_cuda"
TENSORFLOW = "pqasgd_horovod.tensorflow.libpqasgd_tensorflow"
ASK_TENSORFLOW = (
    "import json, tensorflow as tf; print('\\n' + json.dumps([tf.__version__, tf.sysconfig.get_compile_flags(),"
    " tf.sysconfig.get_link_flags()]))"
)


def with_tensorflow() -> bool:
    """Return whether TensorFlow's ops are to be built."""
    asked, refused = (os.environ.get(f"PQASGD_{name}_TENSORFLOW") == "1" for name in ("WITH", "WITHOUT"))
    if refused and not asked:
        return False
    found = importlib.util.find_spec("tensorflow") is not None
    if asked and not found:
        raise SystemExit(
            "PQASGD_WITH_TENSORFLOW=1, and TensorFlow is not installed where the package is built: install it first, "
            "and give pip --no-build-isolation"
        )
    return found


def find_nvcc() -> str | None:
    """Return the path of CUDA's compiler, if there is one."""
    folders = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [*(f"{folder}/bin" for folder in folders if folder), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(places))


def with_cuda() -> bool:
    """Return whether the kernels for GPUs are to be built."""
    asked, refused = (os.environ.get(f"PQASGD_{name}_CUDA") == "1" for name in ("WITH", "WITHOUT"))
    if refused and not asked:
        return False
    found = find_nvcc() is not None
    if asked and not found:
        raise SystemExit(
            "PQASGD_WITH_CUDA=1, and nvcc was found neither in CUDA_HOME/bin nor in PATH: install the CUDA toolkit, or "
            "name its folder in CUDA_HOME"
        )
    return found


def ask_tensorflow() -> tuple[str, list[str], list[str]]:
    """Return TensorFlow's version, and the flags to compile and to link against it."""
    result = subprocess.run(
        [sys.executable, "-c", ASK_TENSORFLOW],
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise SystemExit(
            f"TensorFlow is installed, but cannot be imported:\n{result.stderr}\n"
            "repair it, or leave it out with PQASGD_WITHOUT_TENSORFLOW=1"
        )
    version, compile_flags, link_flags = json.loads(result.stdout.splitlines()[-1])
    return version, compile_flags, link_flags


class BuildWithCMake(build_ext):
    """Let CMake make the libraries, into the checkout for an editable install and into the wheel otherwise."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return a library's path: it is plain C behind ctypes, so its name carries no Python version.

        That of TensorFlow's ops carries TensorFlow's.
        """
        path = str(Path(*fullname.split(".")))
        return f"{path}-{self.tensorflow[0]}.so" if fullname == TENSORFLOW else f"{path}.so"

    @property
    def tensorflow(self) -> tuple[str, list[str], list[str]]:
        """What TensorFlow says about itself, asked once."""
        if not hasattr(self, "_tensorflow"):
            self._tensorflow = ask_tensorflow()
        return self._tensorflow

    def build_extension(self, ext: Extension) -> None:
        """Configure and build; CMake compiles again only what has changed."""
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / ext.name.rpartition(".")[2]
        build.mkdir(parents=True, exist_ok=True)
        source = PACKAGE / "native"
        options = [f"-DPython3_EXECUTABLE={sys.executable}"]
        if ext.name == CUDA:
            source /= "cuda"
            options.append(f"-DPQASGD_NVCC={find_nvcc()}")
        if ext.name == TENSORFLOW:
            source = PACKAGE / "tensorflow" / "ops"
            version, compile_flags, link_flags = self.tensorflow
            options = [
                f"-DTF_VERSION={version}",
                f"-DTF_COMPILE_FLAGS={' '.join(compile_flags)}",
                f"-DTF_LINK_FLAGS={' '.join(link_flags)}",
                f"-DPQASGD_CORE={Path(self.get_ext_fullpath(CORE)).resolve()}",
            ]
        configure = [
            "cmake", "-S", str(source), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", f"-DPQASGD_OUTPUT_DIR={output}",
            *options,
        ]  # fmt: skip
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(len(os.sched_getaffinity(0)))
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)
        except FileNotFoundError as error:
            raise SystemExit(
                "building pqasgd_horovod needs CMake 3.16 or later and a C++17 compiler; cmake was not found"
            ) from error


class AnyPython(bdist_wheel):
    """One wheel serves every Python of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the wheel's tags: any Python 3, no ABI, this platform."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(name, sources=[])
        for name, built in ((CORE, True), (TENSORFLOW, with_tensorflow()), (CUDA, with_cuda()))
        if built
    ],
    cmdclass={"build_ext": BuildWithCMake, "bdist_wheel": AnyPython},
)
