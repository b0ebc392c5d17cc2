"""What is imported when, and that Horovod stays as it was installed; each in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pqasgd_horovod

PACKAGE = Path(pqasgd_horovod.__file__).parent
FRAMEWORKS = ("torch", "tensorflow", "keras", "horovod", "mpi4py")


def run(program: str, path: Path = PACKAGE.parent) -> str:
    """What a program prints that finds the package in ``path``."""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=path,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def imported_by(*modules: str) -> set[str]:
    program = f"import sys, {', '.join(modules)}; print(*(name for name in {FRAMEWORKS} if name in sys.modules))"
    return set(run(program).split())


def test_the_core_imports_no_framework():
    rooms = ("codecs", "exchange", "averaging", "native", "keys", "compression", "exchange.carriers.threads")
    assert imported_by(*(f"pqasgd_horovod.{room}" for room in rooms)) == set()


@pytest.mark.parametrize(
    ("front_end", "frameworks"),
    [
        ("torch", {"torch", "horovod"}),
        ("tensorflow", {"tensorflow", "keras", "horovod"}),
        ("tensorflow.keras", {"tensorflow", "keras", "horovod"}),
    ],
)
def test_a_front_end_imports_no_other_framework(front_end, frameworks):
    assert imported_by(f"pqasgd_horovod.{front_end}") == frameworks


@pytest.mark.parametrize(
    ("front_end", "modules"),
    [
        (
            "pqasgd_horovod.torch",
            "horovod.torch horovod.torch.optimizer horovod.torch.functions horovod.torch.mpi_ops torch.optim",
        ),
        (
            "pqasgd_horovod.tensorflow.keras",
            "horovod.tensorflow horovod.tensorflow.keras horovod.tensorflow.keras.callbacks horovod.tensorflow.mpi_ops "
            "horovod.tensorflow.functions horovod.tensorflow.compression keras.optimizers keras.callbacks",
        ),
    ],
    ids=["torch", "tensorflow"],
)
def test_nothing_of_horovod_or_the_framework_is_changed(front_end, modules):
    program = f"""
import importlib, types

modules = [importlib.import_module(name) for name in {modules.split()}]

def everything():
    found = {{}}
    for module in modules:
        for name, value in vars(module).items():
            found[module.__name__, name] = value
            if isinstance(value, type):
                for key, member in vars(value).items():
                    found[module.__name__, name, key] = member
    return found

before = everything()
importlib.import_module("{front_end}")
after = everything()
print([key for key in after if before.get(key) is not after[key] and not isinstance(after[key], types.ModuleType)])
"""
    assert run(program) == "[]"


@pytest.mark.parametrize(
    ("imports", "optimizer", "tensor"),
    [
        (
            "import torch, pqasgd_horovod.torch as hvd",
            "torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=1.0)",
            "torch.ones(3)",
        ),
        (
            "import keras, tensorflow as tf, pqasgd_horovod.tensorflow as hvd",
            "keras.optimizers.SGD()",
            "tf.ones(3)",
        ),
    ],
    ids=["torch", "tensorflow"],
)
def test_before_init_it_says_what_to_call(imports, optimizer, tensor):
    program = f"""
{imports}
for call in (lambda: hvd.DistributedOptimizer({optimizer}), lambda: hvd.compressed_allreduce({tensor})):
    try:
        call()
    except ValueError as error:
        print("hvd.init()" in str(error))
"""
    assert run(program).split() == ["True", "True"]


@pytest.fixture
def copied(tmp_path):
    """The package as if it were installed elsewhere, without TensorFlow's ops."""
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("*tensorflow-*.so", "__pycache__"))
    return tmp_path


IMPORT_OPS = """
try:
    import pqasgd_horovod.tensorflow
except ImportError as error:
    print(type(error).__name__, error)
"""


def test_without_tensorflows_ops_it_says_how_to_get_them(copied):
    text = run(IMPORT_OPS, copied)
    assert text.startswith("NativeLibraryError pqasgd_horovod was installed without TensorFlow's ops")
    assert "PQASGD_WITH_TENSORFLOW=1 pip install" in text
    assert "make setup" in text


def test_ops_for_another_tensorflow_are_not_loaded(copied):
    (built,) = PACKAGE.glob("tensorflow/*tensorflow-*.so")
    version = built.stem.rpartition("-")[2]
    shutil.copy(built, copied / PACKAGE.name / "tensorflow" / built.name.replace(version, "1.2.3"))
    text = run(IMPORT_OPS, copied)
    assert text.startswith(
        f"NativeLibraryError pqasgd_horovod was built against TensorFlow 1.2.3, and this is {version}."
    )
    assert "PQASGD_WITH_TENSORFLOW=1 pip install" in text
