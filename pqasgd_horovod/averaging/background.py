"""A function that runs beside the training thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from ..errors import CollectiveTimeoutError
from ..exchange.carriers import patiently

Result = TypeVar("Result")


class Background(Generic[Result]):
    """A call of ``function`` in a thread of its own, which does not keep the process from ending.

    What the function uses is its own until it has ended: there are no locks.

    >>> Background(lambda: 6 * 7).result()
    42
    """

    def __init__(self, function: Callable[[], Result]) -> None:
        self._function = function
        self._result: list[Result] = []
        self.error: BaseException | None = None
        """What the function has raised."""
        self._thread = threading.Thread(target=self._run, name="pqasgd exchange", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with patiently():
                self._result.append(self._function())
        except BaseException as error:  # whatever it is, it is raised where the result is asked for
            self.error = error

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the function has ended; raise CollectiveTimeoutError after ``timeout`` seconds."""
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise CollectiveTimeoutError(f"the exchange under way did not end within {timeout} s")

    def result(self) -> Result:
        """Wait, and return what the function has returned, or raise what it has raised."""
        self.wait()
        if self.error is not None:
            raise self.error
        return self._result[0]
