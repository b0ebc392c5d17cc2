"""What one rank cannot do all ranks learn of, before they wait for what it will never send."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..errors import MismatchError, PqasgdError
from ..exchange.carriers import Carrier
from ..exchange.handshake import verify_same

NO_ERROR = {"error": None}
"""A part of what ranks compare where one of them may have an error to tell instead."""


def told(error: Exception) -> dict[str, str]:
    """Return what a rank with an error says in the place of :data:`NO_ERROR`."""
    return {"error": f"{type(error).__name__}: {error}"}


Telling = Callable[[Mapping[str, Any]], object]
"""Takes part in a comparison of the ranks, with what :func:`told` returns."""


def telling(carrier: Carrier | None, name: str) -> Telling | None:
    """Return what takes part in :func:`verify_same` under this name; None for a rank that is alone."""
    return None if carrier is None else functools.partial(verify_same, carrier, name=name)


@contextlib.contextmanager
def refused_together(tell: Telling | None) -> Iterator[None]:
    """Tell the other ranks of an error, where they compare what they have; None: there are no others.

    All raise MismatchError then, unless all have the same one, which is raised itself.
    """
    try:
        yield
    except Exception as error:
        if tell is not None:
            tell(told(error))
        raise


@contextlib.contextmanager
def succeed_together(
    carrier: Carrier | None, name: str, describe: Callable[[], Mapping[str, Any]] = dict
) -> Iterator[None]:
    """Do something on all ranks or on none; collective.

    Afterwards the ranks compare what ``describe`` returns, or learn of an error that some had: those raise it, the
    others MismatchError.

    >>> from pqasgd_horovod.exchange.carriers.threads import run_ranks
    >>> def program(carrier):
    ...     with succeed_together(carrier, "example"):
    ...         if carrier.rank == 1:
    ...             raise OSError("no")
    >>> run_ranks(2, program)
    Traceback (most recent call last):
      ...
    pqasgd_horovod.errors.MismatchError: the ranks have to agree on error: it is null on rank 0; "OSError: no" on rank 1
    """
    try:
        yield
    except MismatchError:
        raise  # in which all ranks have taken part
    except Exception as error:
        if carrier is not None:
            with contextlib.suppress(PqasgdError):
                verify_same(carrier, told(error), name)
        raise
    if carrier is not None:
        verify_same(carrier, {**NO_ERROR, **describe()}, name)
