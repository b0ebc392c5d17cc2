"""What is imported when, and that Horovod stays as it was installed; each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

FRAMEWORKS = ("torch", "tensorflow", "keras", "horovod", "mpi4py")


def run(program: str) -> str:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def imported_by(*modules: str) -> set[str]:
    program = f"import sys, {', '.join(modules)}; print(*(name for name in {FRAMEWORKS} if name in sys.modules))"
    return set(run(program).split())


def test_the_core_imports_no_framework():
    rooms = ("codecs", "exchange", "averaging", "native", "keys", "exchange.carriers.threads")
    assert imported_by(*(f"pqasgd_horovod.{room}" for room in rooms)) == set()


def test_the_torch_front_end_imports_no_other_framework():
    assert imported_by("pqasgd_horovod.torch") == {"torch", "horovod"}


def test_nothing_of_horovod_or_torch_is_changed():
    program = """
import types
import horovod.torch, horovod.torch.optimizer, horovod.torch.functions, horovod.torch.mpi_ops, torch.optim

def everything():
    found = {}
    for module in (horovod.torch, horovod.torch.optimizer, horovod.torch.functions, horovod.torch.mpi_ops, torch.optim):
        for name, value in vars(module).items():
            found[module.__name__, name] = value
            if isinstance(value, type):
                for key, member in vars(value).items():
                    found[module.__name__, name, key] = member
    return found

before = everything()
import pqasgd_horovod.torch as hvd
after = everything()
print([key for key in after if before.get(key) is not after[key] and not isinstance(after[key], types.ModuleType)])
"""
    assert run(program) == "[]"


def test_before_init_it_says_what_to_call():
    program = """
import torch, pqasgd_horovod.torch as hvd
for call in (
    lambda: hvd.DistributedOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=1.0)),
    lambda: hvd.compressed_allreduce(torch.ones(3)),
):
    try:
        call()
    except ValueError as error:
        print("hvd.init()" in str(error))
"""
    assert run(program).split() == ["True", "True"]
