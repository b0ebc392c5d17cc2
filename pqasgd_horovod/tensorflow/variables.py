"""Variables of a model as the core knows them: by name, type and size, alike on every rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from .. import native
from ..errors import ArgumentError

DTYPES = {
    tf.float32: native.DTYPE_F32,
    tf.float64: native.DTYPE_F64,
    tf.float16: native.DTYPE_F16,
    tf.bfloat16: native.DTYPE_BF16,
}


@dataclasses.dataclass(frozen=True)
class VariableSpec:
    """A variable, or its gradient, before its memory is looked at."""

    name: str
    dtype: int
    numel: int
    shape: tuple[int, ...]
    description: str

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns: of each matrix what is outermost in memory makes its rows."""
        # Kernels have their outputs last, so that is what the columns are.
        columns = self.shape[-1] if len(self.shape) > 1 and self.numel else self.numel
        return (self.numel // columns, columns) if self.numel else (1, 0)


def is_keras(variable: Any) -> bool:
    """Return whether this is a variable of Keras 3, which holds the one of TensorFlow."""
    return hasattr(variable, "value") and not callable(variable.value)


def unwrap(variable: Any) -> tf.Variable:
    """Return TensorFlow's variable of one of Keras 3, or the variable itself."""
    return variable.value if is_keras(variable) else variable


def name_of(variable: Any) -> str:
    """Return the name of a variable, with the path of its layer if it is one of Keras 3."""
    return str(getattr(variable, "path", variable.name))


def describe_variables(variables: Sequence[Any]) -> list[VariableSpec]:
    """Return the specs of variables, in order, with names that are unlike each other.

    A name that appears again gets a number. Raises ArgumentError for a variable that is not of a float type, or has no
    fixed shape.
    """
    taken: dict[str, int] = {}
    specs = []
    for variable in variables:
        own, name = unwrap(variable), name_of(variable)
        dtype = tf.as_dtype(own.dtype)
        if dtype not in DTYPES:
            raise ArgumentError(
                f"variable {name!r} has dtype {dtype.name}; it must be "
                f"{', '.join(allowed.name for allowed in DTYPES)}: keep it out of the trainable variables"
            )
        if not own.shape.is_fully_defined():
            raise ArgumentError(f"variable {name!r} has shape {own.shape}; it must have a fixed shape")
        taken[name] = taken.get(name, 0) + 1
        if taken[name] > 1:
            name = f"{name}#{taken[name]}"
        description = f"{dtype.name} {own.shape.as_list()}"
        shape = tuple(own.shape.as_list())
        specs.append(VariableSpec(name, DTYPES[dtype], own.shape.num_elements(), shape, description))
    return specs
