"""Which coordinates an average is about: all of them, or a part in turn.

A selection cuts a channel's vector into fragments, each of whole buckets; one fragment is exchanged in each round. What
is where is arithmetic on sizes, so no index ever travels, and every payload has the same size in every rotation.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from ..codecs.base import check_integer
from ..errors import ArgumentError
from ..exchange.layout import cut_buckets, deal

_LARGEST = 2**31


@dataclasses.dataclass(frozen=True)
class Selection(abc.ABC):
    """The base of selections."""

    id: ClassVar[str]

    @property
    @abc.abstractmethod
    def num_fragments(self) -> int:
        """How many rounds it takes until every coordinate was averaged."""

    @abc.abstractmethod
    def cut(self, num_elements: int, alignment: int, bucket_cap_bytes: int) -> list[tuple[int, int]]:
        """Return the buckets of a vector in order: of each its elements, and the fragment that it belongs to.

        Cuts fall on multiples of ``alignment``. A fragment may be empty.
        """

    def config(self) -> dict[str, Any]:
        """Return the configuration as a dict that JSON can hold."""
        return {"id": self.id, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class All(Selection):
    """Every coordinate in every round.

    >>> All().cut(10_000, alignment=1024, bucket_cap_bytes=4 * 8192)
    [(5120, 0), (4880, 0)]
    """

    id = "all"

    @property
    def num_fragments(self) -> int:
        """One."""
        return 1

    def cut(self, num_elements: int, alignment: int, bucket_cap_bytes: int) -> list[tuple[int, int]]:
        """As few buckets as may be."""
        return [(size, 0) for size in cut_buckets(num_elements, alignment, bucket_cap_bytes)]


@dataclasses.dataclass(frozen=True)
class Rotation(Selection):
    """One of ``fragments`` equal parts in each round, in turn.

    Args:
        fragments: how many parts, at least 1.
        block: None: each part is one contiguous piece. Or the number of elements of the blocks that are dealt out to
            the parts in turn, so that each part has some of every layer; it is rounded up to whole blocks of the codec,
            and each block is a message of its own: less than 2^16 elements cost more in messages than in bytes.

    Raises ArgumentError for other values.

    >>> Rotation(fragments=3).cut(10_000, alignment=1024, bucket_cap_bytes=2**23)
    [(4096, 0), (3072, 1), (2832, 2)]
    >>> Rotation(fragments=2, block=3000).cut(10_000, alignment=1024, bucket_cap_bytes=2**23)
    [(3072, 0), (3072, 1), (3072, 0), (784, 1)]
    """

    id = "rotation"

    fragments: int = 8
    block: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "fragments", check_integer("fragments", self.fragments, 1, _LARGEST))
        if self.block is not None:
            object.__setattr__(self, "block", check_integer("block", self.block, 1, _LARGEST))

    @property
    def num_fragments(self) -> int:
        """As asked for."""
        return self.fragments

    def cut(self, num_elements: int, alignment: int, bucket_cap_bytes: int) -> list[tuple[int, int]]:
        """Contiguous parts cut into buckets, or blocks dealt out in turn."""
        if self.block is None:
            return [
                (size, fragment)
                for fragment, part in enumerate(deal(num_elements, self.fragments, alignment))
                for size in cut_buckets(part.num_elements, alignment, bucket_cap_bytes)
            ]
        block = -(-self.block // alignment) * alignment
        starts = range(0, num_elements, block)
        return [(min(block, num_elements - start), i % self.fragments) for i, start in enumerate(starts)]


SELECTIONS: Mapping[str, type[Selection]] = {cls.id: cls for cls in (All, Rotation)}
"""Selections by id."""


def selection_from_config(config: Mapping[str, Any]) -> Selection:
    """Return the selection that a ``config()`` describes.

    >>> selection_from_config(Rotation(fragments=4).config())
    Rotation(fragments=4, block=None)
    """
    arguments = dict(config)
    cls = SELECTIONS.get(arguments.pop("id", None))
    if cls is None:
        raise ArgumentError(f"selection is {config!r}; its id must be one of {', '.join(SELECTIONS)}")
    return cls(**arguments)
