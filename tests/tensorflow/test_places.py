"""Where numbers are: what is chosen, and what is refused. That GPUs do the same is asked on two ranks."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tensorflow.python.framework import kernels as registered

from pqasgd_horovod import native
from pqasgd_horovod.errors import ArgumentError, DeviceError, NativeLibraryError
from pqasgd_horovod.native import cuda
from pqasgd_horovod.tensorflow import library, places
from pqasgd_horovod.tensorflow.places import Place, choose_place
from tests.native.cuda_on_cpu import build

NODE = "/job:localhost/replica:0/task:0/device:"
CPU, GPU = f"{NODE}CPU:0", f"{NODE}GPU:0"
CORE = Path(native.__file__).with_name("libpqasgd_core.so")
HOST_ONLY = (
    "Agree", "Await", "Clock", "DecodeAdd", "DecodeAddVariable", "Digest", "Encode", "LandRows", "PackRows", "Verdict",
    "Project", "Backproject", "Reconstruct",
)  # fmt: skip


@pytest.fixture
def library_at(monkeypatch):
    """Let the kernels be those of a path, and GPU:0 be the first GPU of CUDA's, or another."""

    def choose(path, index=0):
        monkeypatch.setenv("PQASGD_CUDA_LIBRARY", str(path))
        monkeypatch.setattr(places, "gpu_of", lambda device, name: index if "GPU" in device else None)
        cuda.load.cache_clear()
        places.use_gpu.cache_clear()

    yield choose
    cuda.load.cache_clear()
    places.use_gpu.cache_clear()


def test_numbers_are_beside_the_model_or_in_host_memory(library_at):
    library_at(build())
    assert choose_place({"w": CPU}, None) == choose_place({"w": CPU}, "cpu") == Place(CPU, CPU)
    assert choose_place({"w": GPU, "b": GPU}, None) == Place(GPU, GPU, gpu=0)
    library_at("none")
    away = choose_place({"w": GPU}, "cpu")
    assert away == Place(places.HOST, GPU)
    assert not away.reaches_model


@pytest.mark.parametrize(
    ("path", "index", "error", "text"),
    [
        ("/none.so", 0, NativeLibraryError, "the kernels for GPUs, none.so, could not be loaded .*PQASGD_WITH_CUDA=1"),
        (CORE, 0, NativeLibraryError, "libpqasgd_core.so has no pq_cuda_abi_version: it is from another version"),
        (None, 5, DeviceError, "the kernels cannot run on cuda:5: invalid device ordinal. They were compiled for"),
    ],
    ids=["no library", "another library", "another device"],
)
def test_without_kernels_that_run_there_a_gpu_is_refused(path, index, error, text, library_at):
    library_at(path or build(), index)
    with pytest.raises(error, match=text):
        choose_place({"w": GPU}, None)


def test_other_places_are_refused():
    with pytest.raises(ArgumentError, match=r"w is on GPU:0, b is on GPU:1; all parameters must be on one device"):
        choose_place({"w": GPU, "b": f"{NODE}GPU:1"}, None)
    with pytest.raises(ArgumentError, match=r"w is on TPU:0; it must be on the CPU, or on a GPU of CUDA's"):
        choose_place({"w": f"{NODE}TPU:0"}, None)


def test_ops_that_touch_numbers_have_kernels_for_gpus():
    """All but those that see messages and flags only, or are for CPUs. What is not a number is on the host."""
    kinds = {"Pqasgd" + name: {"CPU"} for name in HOST_ONLY}
    found = {}
    for name in dir(library.ops):
        if name.startswith("Pqasgd"):
            kernels = registered.get_registered_kernels_for_op(name).kernel
            found[name] = {kernel.device_type for kernel in kernels}
            for kernel in kernels:
                if kernel.device_type == "GPU" and name == "PqasgdMean":
                    on_host = set(kernel.host_memory_arg)
                    assert {"received", "message", "flags", "new_flags", "residuals"} <= on_host
                    assert not {"tensors", "anchors", "mean"} & on_host
    assert len(found) > 20
    assert found == {name: kinds.get(name, {"CPU", "GPU"}) for name in found}


def test_the_ops_need_no_library_of_cudas():
    (path,) = Path(library.__file__).parent.glob("libpqasgd_tensorflow-*.so")
    needed = subprocess.run(["readelf", "-d", path], check=True, capture_output=True, text=True).stdout
    assert "libpqasgd_core.so" in needed
    assert "cuda" not in needed
