"""Which GPU a tensor is on, as the core knows it."""

from __future__ import annotations

import functools
import logging
import os

import horovod.torch as horovod
import torch

from ..averaging.devices import check_one_device
from ..errors import ArgumentError
from ..native import cuda

_NCCL_WITH_ALLTOALL = 2700

logger = logging.getLogger("pqasgd_horovod")


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
    library.check_device(f"cuda:{index}, {torch.cuda.get_device_name(index)}", index)
    device = cuda.Device(
        index,
        lambda: torch.cuda.current_stream(index).cuda_stream,
        numbers_on_host,
        library,
        host_messages=why_host_messages(),
    )
    _ = device.identity  # asked now, where an error is told to all ranks
    logger.info("tensors on cuda:%d are coded there", index)
    return device


def why_host_messages() -> str:
    """Return why Horovod cannot, or must not, carry memory of GPUs; empty if it can.

    PQASGD_GPU_MESSAGES=host forbids it; raises ArgumentError for another value.
    """
    wanted = os.environ.get("PQASGD_GPU_MESSAGES", "")
    if wanted not in ("", "host"):
        raise ArgumentError(f"PQASGD_GPU_MESSAGES is {wanted!r}; it must be 'host', or not be set")
    if wanted:
        return "PQASGD_GPU_MESSAGES is 'host'"
    if horovod.nccl_built() < _NCCL_WITH_ALLTOALL:
        return "Horovod was built without HOROVOD_GPU_OPERATIONS=NCCL, or with NCCL before 2.7"
    return ""


def to_tensor(memory: cuda.DeviceBytes) -> torch.Tensor:
    """Return these bytes of a GPU as a tensor, which keeps them alive."""
    return torch.as_tensor(memory, device=f"cuda:{memory.device.index}")


def from_tensor(tensor: torch.Tensor, device: cuda.Device) -> cuda.DeviceBytes:
    """Return the bytes of a tensor that Horovod has written, for work on the current stream."""
    # With HOROVOD_ENABLE_ASYNC_COMPLETION they come later, and Horovod lets the default stream wait for them.
    torch.cuda.current_stream(device.index).wait_stream(torch.cuda.default_stream(device.index))
    return cuda.DeviceBytes(tensor.data_ptr(), tensor.numel(), device, tensor)


def check_common_device(tensors: dict[str, torch.Tensor]) -> None:
    """Raise ArgumentError unless all tensors, by name, are on one device."""
    check_one_device({name: str(tensor.device) for name, tensor in tensors.items()}, "parameters")
