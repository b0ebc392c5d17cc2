"""How coded numbers travel: one choice for all that an optimizer exchanges."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..codecs.base import Codec, check_integer
from ..errors import ArgumentError
from ..exchange.base import NonFinitePolicy
from ..exchange.layout import DEFAULT_BUCKET_CAP_BYTES
from ..exchange.plan import check_method
from .feedback import Feedback, check_feedback

NON_FINITE_POLICIES = ("raise", "propagate")
HIERARCHIES = (None, "node")
DEFAULT_SMALL_TENSOR_THRESHOLD = 1024


@dataclasses.dataclass(frozen=True)
class ExchangeConfig:
    """What every rank has to agree on about an exchange.

    Args:
        codec: what bytes stand for the numbers.
        second_codec: the codec of the mean in the two-phase exchange; None: ``codec``. Its noise is not averaged over
            the ranks, so more bits pay.
        method: ``"allgather"``, ``"two_phase"``, or ``"auto"``: what the codec needs, or whichever sends fewer bytes.
        small_tensor_threshold: tensors of fewer elements travel uncompressed, together in one message. 0: none does.
        bucket_cap_mb: largest bucket, in MiB of float32. Larger: fewer messages; smaller: more overlap of coding and
            sending.
        seed: of all rounding noise, 64 bits; the same on every rank, which draw different numbers all the same.
        nonfinite: ``"raise"``: NaN or Inf on any rank raises NonFiniteError on every rank; ``"propagate"``: the mean of
            that bucket becomes NaN on every rank.
        feedback: None, or :class:`~.feedback.Feedback`: what was not sent is added to what is sent next.
        hierarchy: None, or ``"node"``: the ranks of a node make their exact mean, and nodes exchange coded numbers.

    Raises ArgumentError for other values, for codecs that are not fit for the method, and for feedback on a codec that
    is no contraction.

    >>> from pqasgd_horovod import codecs
    >>> ExchangeConfig(codecs.eden(bits=2)).method
    'auto'
    """

    codec: Codec
    second_codec: Codec | None = None
    method: str = "auto"
    small_tensor_threshold: int = DEFAULT_SMALL_TENSOR_THRESHOLD
    bucket_cap_mb: float = DEFAULT_BUCKET_CAP_BYTES / 2**20
    seed: int = 0
    nonfinite: NonFinitePolicy = "raise"
    feedback: Feedback | None = None
    hierarchy: str | None = None

    def __post_init__(self) -> None:
        check_method(self.method, self.codec, self.second_codec, ("exchange", "compression", "second_compression"))
        if self.nonfinite not in NON_FINITE_POLICIES:
            raise ArgumentError(
                f"nonfinite is {self.nonfinite!r}; it must be one of {', '.join(map(repr, NON_FINITE_POLICIES))}"
            )
        if self.hierarchy not in HIERARCHIES:
            raise ArgumentError(f"hierarchy is {self.hierarchy!r}; it must be None or 'node'")
        check_integer("small_tensor_threshold", self.small_tensor_threshold, 0, 2**48)
        check_integer("seed", self.seed, 0, 2**64 - 1)
        if not isinstance(self.bucket_cap_mb, (int, float)) or not 0 < self.bucket_cap_mb <= 1024:
            raise ArgumentError(
                f"bucket_cap_mb is {self.bucket_cap_mb!r}; it must be a number above 0, at most 1024 MiB"
            )
        coded = {"compression": self.codec}
        if self.second_codec is not None:
            coded["second_compression"] = self.second_codec
        check_feedback(self.feedback, coded)

    def check_for_parameters(self) -> None:
        """Raise ArgumentError unless the codec is fit for changes of parameters, and not for gradients only."""
        if not self.codec.keeps_scale:
            raise ArgumentError(
                f"compression is {self.codec}, which decodes to +-1: it is for gradients, period=1 without an outer "
                "optimizer. For changes of parameters take one with a scale, such as Compression.signsgd()"
            )

    @property
    def bucket_cap_bytes(self) -> int:
        """Largest bucket in bytes of float32."""
        return max(1, int(self.bucket_cap_mb * 2**20))

    def config(self) -> dict[str, Any]:
        """Return the configuration as a dict that JSON can hold."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        own["codec"] = self.codec.config()
        own["second_codec"] = None if self.second_codec is None else self.second_codec.config()
        own["feedback"] = None if self.feedback is None else self.feedback.config()
        return own
