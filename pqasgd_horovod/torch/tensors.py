"""Tensors of a model as the core sees them: dense memory of a known type, named alike on every rank."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.modules.batchnorm import _NormBase

from .. import native
from ..averaging.statistics import CommunicationStatistics
from ..errors import ArgumentError
from ..exchange.carriers import Bytes
from . import devices

GatherHandle = Callable[[], torch.Tensor]
"""Horovod's handle of a sparse gradient on its way: call it to wait for the mean."""

DTYPES = {
    torch.float32: native.DTYPE_F32,
    torch.float64: native.DTYPE_F64,
    torch.float16: native.DTYPE_F16,
    torch.bfloat16: native.DTYPE_BF16,
}


DEVICE_TYPES = ("cpu", "cuda")


def memory_order(tensor: torch.Tensor) -> list[int]:
    """Return the strides that matter: those of dimensions with more than one element, 0 for the others."""
    return [stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]


def is_dense(tensor: torch.Tensor) -> bool:
    """Return whether the elements fill their memory without gap or overlap, in whatever order."""
    expected = 1
    for stride, size in sorted(
        (stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


def matrix_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Return rows and columns of a dense tensor as a matrix: what is outermost in memory makes its rows.

    >>> matrix_of(torch.zeros(8, 3, 2, 2)), matrix_of(torch.zeros(5)), matrix_of(torch.zeros(4, 6).t())
    ((8, 12), (1, 5), (4, 6))
    """
    sizes = [size for size in tensor.shape if size > 1]
    strides = [stride for stride in memory_order(tensor) if stride]
    if len(sizes) < 2 or not tensor.numel():
        return 1, tensor.numel()
    rows = sizes[strides.index(max(strides))]
    return rows, tensor.numel() // rows


def check_tensor(what: str, tensor: torch.Tensor) -> None:
    """Raise ArgumentError unless the core can read and write the tensor's memory."""
    if tensor.device.type not in DEVICE_TYPES:
        raise ArgumentError(f"{what} is on {tensor.device}; it must be on the CPU, or on a GPU of CUDA's")
    if tensor.dtype not in DTYPES:
        raise ArgumentError(f"{what} has dtype {tensor.dtype}; it must be {', '.join(map(str, DTYPES))}")
    if tensor.layout != torch.strided:
        raise ArgumentError(f"{what} has layout {tensor.layout}; it must be {torch.strided}")
    if tensor.numel() and not is_dense(tensor):
        raise ArgumentError(
            f"{what} has shape {tuple(tensor.shape)} and strides {tuple(tensor.stride())}, which leave gaps in memory "
            "or overlap; "
            "make it dense first: tensor.data = tensor.data.contiguous()"
        )


def is_exchangeable(tensor: torch.Tensor) -> bool:
    """Return whether :func:`check_tensor` has nothing against it."""
    return (
        tensor.device.type in DEVICE_TYPES
        and tensor.dtype in DTYPES
        and tensor.layout == torch.strided
        and is_dense(tensor)
    )


class TensorMemory:
    """A parameter or a buffer, looked up anew each time since ``module.to()`` and assignments to ``.data`` move it."""

    def __init__(self, name: str, look_up: Callable[[], torch.Tensor], anchor_device: str | None = None) -> None:
        self.name = name
        self._look_up = look_up
        tensor = look_up()
        check_tensor(name, tensor)
        self.device = devices.device_of(tensor, anchor_device)
        self._place = tensor.device
        self.dtype = DTYPES[tensor.dtype]
        self.numel = tensor.numel()
        self.shape = tuple(tensor.shape)
        self.matrix = matrix_of(tensor)
        self.description = describe(tensor)
        self._form = _form(tensor)

    def pointer(self) -> int:
        """Return where the elements are now; raise ArgumentError if they are not what they were."""
        tensor = self._look_up()
        # At each average, of each tensor: words are made only where there is something to say.
        if tensor.layout != torch.strided or tensor.device != self._place or _form(tensor) != self._form:
            self._check(tensor)
        return tensor.data_ptr()

    def _check(self, tensor: torch.Tensor) -> None:
        check_tensor(self.name, tensor)
        if tensor.device != self._place:
            raise ArgumentError(
                f"{self.name} was on {self._place} when training began and is on {tensor.device} now; move the model "
                "before the first step"
            )
        if describe(tensor) != self.description:
            raise ArgumentError(
                f"{self.name} was {self.description} when training began and is {describe(tensor)} now; make such "
                "changes before the first step"
            )


class GradientMemory:
    """The gradient of a parameter, in the parameter's type and order in memory."""

    def __init__(self, name: str, parameter: torch.nn.Parameter) -> None:
        check_tensor(name, parameter)
        self.name = name
        self.parameter = parameter
        self.device = devices.device_of(parameter)
        self.dtype = DTYPES[parameter.dtype]
        self.numel = parameter.numel()
        self.shape = tuple(parameter.shape)
        self.matrix = matrix_of(parameter)
        self.description = describe(parameter)
        self._form = _form(parameter)
        self._tensor: torch.Tensor | None = None

    def is_current(self) -> bool:
        """Return whether the parameter still has the type, the shape and the order in memory that were laid out."""
        return self._form == _form(self.parameter)

    def pointer(self) -> int:
        """Return where the numbers to send are, and their mean will be; they stay there until :meth:`restore`.

        That is the gradient itself, or a copy of it where its type, its order in memory or its sparseness do not fit,
        or zeros where there is none.
        """
        if self._tensor is None:
            self._tensor = self._fitting_gradient()
        return self._tensor.data_ptr()

    def _fitting_gradient(self) -> torch.Tensor:
        gradient = self.parameter.grad
        if (
            gradient is not None
            and gradient.layout == torch.strided
            and gradient.dtype == self.parameter.dtype
            and memory_order(gradient) == memory_order(self.parameter)
        ):
            return gradient
        fitting = torch.zeros_like(self.parameter, requires_grad=False)
        if gradient is not None:
            fitting.copy_(gradient.to_dense() if gradient.is_sparse else gradient)
        return fitting

    def restore(self, keep_mean: bool) -> None:
        """Make the mean the gradient, sparse again if the gradient is sparse, or leave the gradient as it was.

        A frozen parameter without a gradient is not given one: the user's optimizer would decay it.
        """
        mean, self._tensor = self._tensor, None
        gradient = self.parameter.grad
        if mean is None or mean is gradient or not keep_mean:
            return
        if gradient is not None and gradient.is_sparse:
            self.parameter.grad = mean.to_sparse(gradient.sparse_dim())
        elif gradient is not None or self.parameter.requires_grad:
            self.parameter.grad = mean


def _sparse_nbytes(gradient: torch.Tensor) -> int:
    return gradient._values().nbytes + gradient._indices().nbytes


def counting(handle: GatherHandle, gradient: torch.Tensor, statistics: CommunicationStatistics) -> GatherHandle:
    """Return a handle that also counts the allgathers of values and indices, to which this rank gave ``gradient``'s."""
    own = _sparse_nbytes(gradient)

    def wait() -> torch.Tensor:
        mean = handle()  # what all ranks sent, one after the other
        statistics.count_allgather(own, _sparse_nbytes(mean))
        return mean

    return wait


def _form(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, tuple[int, ...]]:
    return tensor.dtype, tensor.shape, tensor.stride()


def describe(tensor: torch.Tensor) -> str:
    """Return type, shape and order in memory as text, to be compared between ranks."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} strides {memory_order(tensor)}"


def find_model(named_parameters: Any) -> torch.nn.Module | None:
    """Return the module whose ``named_parameters()`` this generator is, if it is one; the generator is not advanced."""
    if not inspect.isgenerator(named_parameters):
        return None
    owner = inspect.getgeneratorlocals(named_parameters).get("self")
    return owner if isinstance(owner, torch.nn.Module) else None


def select_buffers(model: torch.nn.Module, policy: str, anchor_device: str | None = None) -> Iterator[TensorMemory]:
    """Yield the buffers that ``policy`` averages; see :class:`~pqasgd_horovod.averaging.PeriodicAveraging`."""
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        if policy in ("local", "max_count") or (policy == "statistics" and not isinstance(module, _NormBase)):
            continue
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and id(buffer) not in seen:
                seen.add(id(buffer))
                path = f"{module_name}.{key}" if module_name else key
                yield TensorMemory(f"buffer {path}", functools.partial(module.get_buffer, key), anchor_device)


class LayerStatistics:
    """Running mean and variance of a normalization layer, which counts the batches that it has seen."""

    def __init__(self, name: str, layer: _NormBase) -> None:
        self.name = name
        self._layer = layer
        self.description = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in self._tensors())
        self.nbytes = sum(tensor.nbytes for tensor in self._tensors())

    def _tensors(self) -> list[torch.Tensor]:
        mean, variance = self._layer.running_mean, self._layer.running_var
        assert mean is not None
        assert variance is not None
        return [mean, variance]

    def count(self) -> int:
        """Return the number of batches."""
        return int(self._layer.num_batches_tracked or 0)

    def pack(self) -> bytes:
        """Return the statistics as bytes."""
        return b"".join(bytes_of(tensor).numpy().tobytes() for tensor in self._tensors())

    def _unpack(self, packed: Bytes) -> list[torch.Tensor]:
        both = torch.from_numpy(packed.copy()).split([tensor.nbytes for tensor in self._tensors()])
        return [part.clone().view(tensor.dtype) for part, tensor in zip(both, self._tensors(), strict=True)]

    def is_finite(self, packed: Bytes) -> bool:
        """Return whether there is no NaN or Inf in bytes of :meth:`pack`."""
        return all(bool(part.isfinite().all()) for part in self._unpack(packed))

    def adopt(self, count: int, packed: Bytes) -> None:
        """Take over a count and bytes of :meth:`pack`."""
        for tensor, part in zip(self._tensors(), self._unpack(packed), strict=True):
            tensor.copy_(part.view(tensor.shape))
        if self._layer.num_batches_tracked is not None:
            self._layer.num_batches_tracked.fill_(count)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements as bytes in host memory, a view if they are contiguous there."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def select_counted(model: torch.nn.Module, policy: str) -> list[LayerStatistics]:
    """Return the layers whose statistics are taken over from the rank with the largest count, if that is the policy."""
    return [
        LayerStatistics(name, module)
        for name, module in model.named_modules()
        if policy == "max_count" and isinstance(module, _NormBase) and module.running_mean is not None
    ]
