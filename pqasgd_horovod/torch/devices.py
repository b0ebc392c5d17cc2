"""Which GPU a tensor is on, as the core knows it."""

from __future__ import annotations

import functools
import logging

import torch

from ..errors import ArgumentError
from ..native import cuda

logger = logging.getLogger("pqasgd_horovod")

ANCHOR_DEVICES = (None, "cpu")


def check_anchor_device(anchor_device: str | None) -> None:
    """Raise ArgumentError unless ``anchor_device`` is one of :data:`ANCHOR_DEVICES`."""
    if anchor_device not in ANCHOR_DEVICES:
        raise ArgumentError(
            f"anchor_device is {anchor_device!r}; it must be None, beside the parameters, or 'cpu', in host memory"
        )


def device_of(tensor: torch.Tensor, anchor_device: str | None = None) -> cuda.Device | None:
    """Return the GPU that a tensor is on; None: it is in host memory.

    Raises NativeLibraryError if there are no kernels for GPUs, DeviceError if they do not run on this one.
    """
    if tensor.device.type != "cuda":
        return None
    return _device(tensor.get_device(), anchor_device == "cpu")


@functools.cache
def _device(index: int, numbers_on_host: bool) -> cuda.Device:
    library = cuda.load()
    with torch.cuda.device(index):
        library.check_device(f"cuda:{index}, {torch.cuda.get_device_name(index)}")
    logger.info(
        "tensors on cuda:%d are coded there; messages travel through pinned host memory, also where Horovod has NCCL",
        index,
    )
    return cuda.Device(index, lambda: torch.cuda.current_stream(index).cuda_stream, numbers_on_host, library)


def check_common_device(tensors: dict[str, torch.Tensor]) -> None:
    """Raise ArgumentError unless all tensors, by name, are on one device."""
    found = {str(tensor.device): name for name, tensor in reversed(tensors.items())}
    if len(found) > 1:
        places = ", ".join(f"{name} is on {place}" for place, name in sorted(found.items()))
        raise ArgumentError(f"{places}; all parameters must be on one device: move the model as a whole")
