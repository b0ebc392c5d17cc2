"""Where numbers are: those of the model, and those that averages keep, which ops of this package touch there.

Messages, counters and what ranks say to each other are in host memory whatever the place, so that Horovod's CPU
collectives take them.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tensorflow as tf

from ..averaging.devices import check_one_device
from ..errors import ArgumentError
from ..native import cuda
from .carrier import HOST
from .library import load_kernels, ops
from .variables import VariableSpec, unwrap

logger = logging.getLogger("pqasgd_horovod")

F = TypeVar("F", bound=Callable[..., Any])


def on_host() -> Any:
    """What is made in this context is in host memory, whatever GPUs there are."""
    return tf.device(HOST)


def hosted(function: F) -> F:
    """Decorate a function that is traced as one, or as a branch of a graph: it does not know the devices around it."""

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        with on_host():
            return function(*arguments, **options)

    return run  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where averages keep and make their numbers, and where the model is; TensorFlow's names of devices."""

    device: str = HOST
    of_model: str = HOST
    gpu: int | None = None
    """Which GPU of CUDA's has the kernels of ops that touch these numbers, if one has."""

    def here(self) -> Any:
        """What is made in this context is where averages keep their numbers."""
        return tf.device(self.device)

    @property
    def reaches_model(self) -> bool:
        """Whether ops here can write the model's variables; else these are assigned what ops return."""
        return self.device == self.of_model


ON_HOST = Place()


def places_of(specs: Sequence[VariableSpec], variables: Sequence[Any]) -> dict[str, str]:
    """Return on which device each variable is, by its name."""
    return {spec.name: unwrap(variable).device for spec, variable in zip(specs, variables, strict=True)}


def choose_place(places: dict[str, str], anchor_device: str | None) -> Place:
    """Return the place for averages of variables that are in ``places``, by name.

    Raises ArgumentError unless they are on one device, a CPU or a GPU; NativeLibraryError if there are no kernels for
    GPUs, and DeviceError if they do not run on this one. With ``anchor_device="cpu"`` none are needed.
    """
    check_one_device({name: short_name(device) for name, device in places.items()}, "parameters")
    if not places:
        return ON_HOST
    name, device = next(iter(places.items()))
    gpu = gpu_of(device, name)
    if gpu is None:
        return Place(device, device)
    if anchor_device == "cpu":
        return Place(HOST, device)
    use_gpu(gpu)
    return Place(device, device, gpu)


def short_name(device: str) -> str:
    """Return what users call a device.

    >>> short_name("/job:localhost/replica:0/task:0/device:GPU:1")
    'GPU:1'
    """
    spec = tf.DeviceSpec.from_string(device)
    return f"{spec.device_type}:{spec.device_index}"


def gpu_of(device: str, name: str) -> int | None:
    """Return which GPU of CUDA's the variable ``name`` is on; None: it is on a CPU. Raise ArgumentError elsewhere."""
    kind = tf.DeviceSpec.from_string(device).device_type
    if kind == "CPU":
        return None
    if kind != "GPU":
        raise ArgumentError(f"{name} is on {short_name(device)}; it must be on the CPU, or on a GPU of CUDA's")
    with tf.init_scope(), tf.device(device):
        return int(ops.pqasgd_ordinal())


@functools.cache
def use_gpu(index: int) -> None:
    """Let ops on this GPU find their kernels; raise NativeLibraryError or DeviceError as :func:`choose_place`."""
    kernels = cuda.load()
    kernels.check_device(f"cuda:{index}", index)
    load_kernels(kernels)
    logger.info("variables on cuda:%d are coded there; messages travel through host memory, also with NCCL", index)
