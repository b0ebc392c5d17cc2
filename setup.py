"""Compile the native core with CMake when the package is built. All that describes the package is in setup.cfg."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).resolve().parent / "pqasgd_horovod" / "native"
LIBRARY = "libpqasgd_core"


class BuildWithCMake(build_ext):
    """Let CMake make the library, into the checkout for an editable install and into the wheel otherwise."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the library's path: it is plain C behind ctypes, so its name carries no Python version."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Configure and build; CMake compiles again only what has changed."""
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "native"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(SOURCE), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
            f"-DPQASGD_OUTPUT_DIR={output}", f"-DPython3_EXECUTABLE={sys.executable}",
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
    ext_modules=[Extension(f"pqasgd_horovod.native.{LIBRARY}", sources=[])],
    cmdclass={"build_ext": BuildWithCMake, "bdist_wheel": AnyPython},
)
