"""Tensors laid end to end, seen as one flat vector."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from .. import native
from ..errors import ArgumentError
from .devices import check_one_device
from .feedback import Residuals
from .outer import AnchorArray

if TYPE_CHECKING:
    from ..native.cuda import Device


class TensorSpec(Protocol):
    """What is known of a tensor of the model before its memory is looked at; each front end has its own."""

    @property
    def name(self) -> str:
        """Name, the same on every rank and unlike any other."""
        ...

    @property
    def dtype(self) -> int:
        """``native.DTYPE_*``."""
        ...

    @property
    def numel(self) -> int:
        """Number of elements."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape."""
        ...

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the matrix that the elements are, in their order in memory; one row if it is none."""
        ...

    @property
    def description(self) -> str:
        """Type, shape and order in memory, to be compared between ranks."""
        ...


class TensorView(TensorSpec, Protocol):
    """A tensor of the model, as dense memory of a known type."""

    @property
    def device(self) -> Device | None:
        """The GPU whose memory it is; None: that of the host."""
        ...

    def pointer(self) -> int:
        """Return where the elements are now; raise ArgumentError if type, size or order in memory have changed."""
        ...


_CODES = {
    np.dtype(np.float16): native.DTYPE_F16,
    np.dtype(np.float32): native.DTYPE_F32,
    np.dtype(np.float64): native.DTYPE_F64,
}


class ArrayView:
    """A NumPy array as an averager sees it, for programs without a framework; assign ``array`` to move it.

    The array is contiguous, of float16, float32 or float64. :meth:`pointer` raises ArgumentError if it has been
    replaced by one of another type or shape. With a ``device`` the array is memory that it reaches.

    >>> ArrayView("x", np.zeros(3, np.float32)).description
    'float32 (3,)'
    """

    def __init__(self, name: str, array: NDArray[np.floating], device: Device | None = None) -> None:
        self.name = name
        self.device = device
        self.array = array
        self.dtype = _CODES[array.dtype]
        self.numel = array.size
        self.shape = array.shape
        rows = array.shape[0] if array.ndim > 1 and array.size else 1
        self.matrix = (rows, array.size // rows)
        self.description = f"{array.dtype} {array.shape}"

    def pointer(self) -> int:
        """Return where the elements are now."""
        array = self.array
        if f"{array.dtype} {array.shape}" != self.description or not array.flags.c_contiguous:
            raise ArgumentError(f"{self.name} was {self.description} and is another array now")
        return array.ctypes.data


def anchor_dtype(tensor: TensorSpec) -> np.dtype:
    """Return the type of a tensor's anchor: float64 for float64, float32 for all narrower types."""
    return np.dtype(np.float64 if tensor.dtype == native.DTYPE_F64 else np.float32)


def common_device(tensors: Sequence[TensorView]) -> Device | None:
    """Return the GPU, or None for the host, that all tensors are on; raise ArgumentError if there are several."""
    check_one_device({tensor.name: str(tensor.device or "cpu") for tensor in tensors}, "tensors of an optimizer")
    return tensors[0].device if tensors else None


class FlatLayout:
    """Where the elements of ``specs``, in order, lie in one vector of ``num_elements``."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self.names = [spec.name for spec in specs]
        self.matrices = [spec.matrix for spec in specs]
        self.offsets = [0, *itertools.accumulate(spec.numel for spec in specs)]
        self.num_elements = self.offsets[-1]

    def sizes(self) -> list[int]:
        """Return the number of elements of each tensor."""
        return [stop - start for start, stop in itertools.pairwise(self.offsets)]

    def tensors_in(self, start: int, stop: int) -> range:
        """Return the indices of the tensors that elements ``start`` to ``stop`` belong to."""
        if stop <= start:
            return range(0)
        return range(bisect.bisect_right(self.offsets, start) - 1, bisect.bisect_left(self.offsets, stop))

    def span(self, index: int) -> slice:
        """Return where tensor ``index`` lies."""
        return slice(self.offsets[index], self.offsets[index + 1])


class FlatVector(FlatLayout):
    """The elements of ``tensors``, in order, as one vector that the core reads and writes."""

    def __init__(self, tensors: Sequence[TensorView]) -> None:
        super().__init__(tensors)
        self.tensors = tuple(tensors)
        self.device = common_device(tensors)

    def source(
        self, anchor: AnchorArray | None = None, residuals: Residuals | None = None, part: range | None = None
    ) -> native.Source:
        """Return the vector as the native core reads and writes it, minus ``anchor``, plus what was not sent before.

        Or only the tensors in ``part``, without an anchor. Memory is looked up now, and must stay where it is while the
        source is in use.
        """
        tensors = self.tensors if part is None else self.tensors[part.start : part.stop]
        segments = [(tensor.pointer(), tensor.dtype, tensor.numel) for tensor in tensors]
        pair = None
        if anchor is not None:
            pair = (anchor.ctypes.data, native.DTYPE_F64 if anchor.dtype == np.float64 else native.DTYPE_F32)
        start = 0 if part is None else self.offsets[part.start]
        pointers = None if residuals is None else residuals.pointers(start)
        return native.Source(segments, pair, (tensors, anchor, residuals), pointers, self.device)

    def gather(self, dtype: np.dtype) -> AnchorArray:
        """Return a copy of the elements, in the type of an anchor."""
        values: AnchorArray = native.zeros(self.num_elements, dtype, self.device)
        native.gather(self.source(), 0, values)
        return values
