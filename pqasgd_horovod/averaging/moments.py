"""What becomes of the inner optimizer's moments (momentum, second moments) at an average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..errors import MismatchError
from ..exchange.carriers import Carrier
from ..exchange.handshake import compare, describe_difference
from .together import NO_ERROR
from .vector import TensorView

MOMENT_POLICIES = ("local", "average", "reset")


class Moments(Protocol):
    """The moments of a framework's optimizer."""

    def views(self) -> Sequence[TensorView]:
        """Return those that are there now, with names that say whose they are."""
        ...

    def reset(self) -> None:
        """Make them what they are in a new optimizer."""
        ...


def common_moments(carrier: Carrier, own: Sequence[TensorView], name: str) -> list[TensorView]:
    """Return those of ``own`` that every rank has, in the same type and shape, sorted by name; collective.

    Optimizers make them at a parameter's first gradient, which need not come in the same step on every rank.
    """
    described = {view.name: view.description for view in own}
    documents = compare(carrier, {**NO_ERROR, "moments": described}, name).documents
    if any(document["error"] for document in documents):
        raise MismatchError(describe_difference(documents))
    everywhere = set(described.items()).intersection(*(document["moments"].items() for document in documents))
    return sorted((view for view in own if (view.name, view.description) in everywhere), key=lambda view: view.name)
