r"""What about that which was not sent: the residual, kept on each rank and added to what it sends next.

A lossy codec leaves :math:`u - Q(u)` behind. With error feedback it is not lost: each round sends
:math:`u = v + r` and keeps :math:`r \leftarrow u - Q(u)`, for what a rank codes and, in the two-phase exchange, for the
mean that the owner of a shard codes again. Everything then arrives sooner or later, whatever the codec drops.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ..codecs.base import FLOAT32, Codec
from ..errors import ArgumentError


@dataclasses.dataclass(frozen=True)
class Feedback:
    r"""Error feedback: :math:`u = v + r`, send :math:`Q(u)`, :math:`r \leftarrow u - Q(u)`.

    For gradients (``period=1``) and for the changes of a period. The residual is float32, one number for each element
    that is compressed, on each rank its own; in the two-phase exchange the owner of a shard has one more for the mean.
    It belongs to the checkpoint: save on every rank.

    The codec has to be a contraction, :math:`E\|Q(u) - u\|^2 < \|u\|^2`, or the residual could grow without bound:
    ``topk``, ``signsgd``, ``eden`` from 2 bits on, quantizers with many bits. Unbiased quantizers gain little by it.

    Source: Karimireddy, Rebjock, Stich, Jaggi, "Error feedback fixes SignSGD and other gradient compression schemes",
    ICML 2019, algorithm 2; for changes of a period Basu, Data, Karakus, Diggavi, "Qsparse-local-SGD", NeurIPS 2019,
    algorithm 1.

    >>> Feedback().config()
    {'id': 'residual'}
    """

    id: ClassVar[str] = "residual"

    def config(self) -> dict[str, Any]:
        """Return the configuration as a dict that JSON can hold."""
        return {"id": self.id, **dataclasses.asdict(self)}


def feedback_from_config(config: Mapping[str, Any] | None) -> Feedback | None:
    """Return the feedback that a ``config()`` describes; None for none.

    >>> feedback_from_config(Feedback().config())
    Feedback()
    """
    if config is None:
        return None
    arguments = dict(config)
    if arguments.pop("id", None) != Feedback.id:
        raise ArgumentError(f"feedback is {config!r}; its id must be {Feedback.id!r}")
    return Feedback(**arguments)


def check_feedback(feedback: Feedback | None, codecs: Mapping[str, Codec]) -> None:
    """Raise ArgumentError unless every codec, by the name of its argument, is fit for ``feedback``."""
    if feedback is None:
        return
    if not isinstance(feedback, Feedback):
        raise ArgumentError(f"feedback is {feedback!r}; it must be None or hvd.Feedback()")
    for argument, codec in codecs.items():
        if not codec.contractive:
            raise ArgumentError(
                f"feedback is {feedback} with {argument} {codec}, whose error can be larger than what it codes: the "
                "residual would grow from round to round. Use a contraction, such as eden(bits=2), topk or signsgd, "
                "or more bits, or no feedback"
            )


def check_not_stock(feedback: Feedback | None, compression: Any) -> None:
    """Raise ArgumentError if there is feedback where Horovod itself averages, with the ``compression`` of the user."""
    if feedback is not None:
        raise ArgumentError(
            f"feedback is {feedback} with compression={compression!r} and period=1, where Horovod averages and nothing "
            "is left to feed back: use a codec that sends less, or no feedback"
        )


class Residuals:
    """What one rank has not sent of a flat vector: that of the last round, and that of the round under way.

    Two arrays, so that a round that fails changes nothing.
    """

    def __init__(self, num_elements: int) -> None:
        self.kept: FLOAT32 = np.zeros(num_elements, np.float32)
        self._next: FLOAT32 = np.zeros(num_elements, np.float32)

    def pointers(self, start: int = 0) -> tuple[int, int]:
        """Return where the residual that is added, and the one that is written, have element ``start``."""
        return self.kept.ctypes.data + 4 * start, self._next.ctypes.data + 4 * start

    def keep(self, starts: Sequence[int], averaged: Sequence[int]) -> None:
        """After a round: keep what it left of the buckets that have a mean; ``starts`` are the limits of all."""
        if len(averaged) == len(starts) - 1:
            self.kept, self._next = self._next, self.kept
            return
        for bucket in averaged:
            span = slice(starts[bucket], starts[bucket + 1])
            self.kept[span] = self._next[span]
