"""Code that runs in the caller's graph, or in one of its own: Horovod knows ops by names, and eager ops have none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import tensorflow as tf
from tensorflow.python.ops.variables import default_variable_creator_v2

from .library import translate

F = TypeVar("F", bound=Callable[..., Any])


def as_written(function: F) -> F:
    """Decorate a function that AutoGraph is to leave alone: it would rewrite all that is called here, in minutes."""
    left_alone: F = tf.autograph.experimental.do_not_convert(function)
    return left_alone


class Traced:
    """Calls a function in the graph that is being traced, or eagerly as a ``tf.function`` that is kept."""

    def __init__(self) -> None:
        self._functions: dict[Callable[..., Any], Any] = {}

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return ``function(*arguments)``; called eagerly it raises this package's errors, not TensorFlow's."""
        if not tf.executing_eagerly():
            return function(*arguments)
        if function not in self._functions:
            self._functions[function] = tf.function(function, autograph=False)
        try:
            return self._functions[function](*arguments)
        except tf.errors.OpError as error:
            raise translate(error) from None


@contextlib.contextmanager
def outside_of_graphs() -> Iterator[None]:
    """Run what is here eagerly, once, though a graph is being traced; variables that are made belong to no function.

    A ``tf.function`` that takes note of variables traces itself twice, and allows no others in any later trace.
    """
    with tf.init_scope(), tf.variable_creator_scope(lambda _, **options: default_variable_creator_v2(None, **options)):
        yield


def run_once(function: Callable[[], Any]) -> Any:
    """Return ``function()``, run as a graph that is not kept.

    A concrete function: of many functions that are each called once TensorFlow warns, as if they were one that is
    traced again and again.
    """
    return tf.function(function, autograph=False).get_concrete_function()()


def counter(name: str) -> tf.Variable:
    """Return a variable that counts, on the CPU."""
    with tf.device("CPU:0"):
        return tf.Variable(0, dtype=tf.int64, trainable=False, name=name)


def when(condition: Any, then: Callable[[], None] | None, otherwise: Callable[[], None] | None = None) -> None:
    """``if`` in a graph."""

    def branch(function: Callable[[], None] | None) -> Callable[[], tf.Tensor]:
        def run() -> tf.Tensor:
            if function is not None:
                function()
            return tf.constant(True)

        return run

    tf.cond(condition, branch(then), branch(otherwise))


def after(*ready: Any) -> Any:
    """What is made in this context runs when ``ready`` ops and tensors are done; eager ones, which are None, are."""
    return tf.control_dependencies([item for item in ready if item is not None])


class Turns:
    """What comes to a name more than once in a graph takes turns, in the order of the program.

    Nothing else orders collectives, and Horovod refuses one whose name is in use.
    """

    def __init__(self) -> None:
        self._ended = counter("turns")  # TensorFlow orders what reads and writes a variable

    def begin(self) -> tf.Tensor:
        """Return what is there when the turns before are over."""
        return self._ended.value()

    def end(self, *ready: Any) -> None:
        """Let the next turn begin when ``ready`` ops and tensors are done."""
        with after(*ready):
            self._ended.assign_add(1)
