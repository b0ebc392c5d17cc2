"""How coded numbers travel: one choice for all that an optimizer exchanges."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from .. import codecs
from ..codecs.base import Codec, Scheme, check_integer, is_number
from ..errors import ArgumentError
from ..exchange.base import NonFinitePolicy
from ..exchange.layout import DEFAULT_BUCKET_CAP_BYTES
from ..exchange.plan import check_method
from .feedback import Feedback, MomentumCorrection, check_feedback
from .policy import HasShape, Rule, check_names, decide, smaller_than
from .strategy import PeriodicAveraging
from .vector import TensorSpec

NON_FINITE_POLICIES = ("raise", "propagate")
HIERARCHIES = (None, "node")
DEFAULT_SMALL_TENSOR_THRESHOLD = 1024

Spec = TypeVar("Spec", bound=TensorSpec)


class Way(NamedTuple):
    """How a tensor travels; tensors of one way are one channel."""

    codec: Scheme
    second_codec: Codec | None = None
    method: str = "auto"


AS_IT_IS = Way(codecs.none())
"""Uncompressed, with whichever exchange sends fewer bytes."""


@dataclasses.dataclass(frozen=True)
class ExchangeConfig:
    """What every rank has to agree on about an exchange.

    Args:
        codec: what bytes stand for the numbers of tensors that no rule is about: a codec, or a scheme of its own such
            as ``codecs.powersgd()``. Tensors that it does not fit travel as they are.
        second_codec: the codec of the mean in the two-phase exchange; None: ``codec``. Its noise is not averaged over
            the ranks, so more bits pay.
        method: ``"allgather"``, ``"two_phase"``, or ``"auto"``: what the codec needs, or whichever sends fewer bytes.
        small_tensor_threshold: tensors of fewer elements travel uncompressed, together in one message. 0: none does.
            It is the rule that follows those of ``policy``.
        bucket_cap_mb: largest bucket, in MiB of float32. Larger: fewer messages; smaller: more overlap of coding and
            sending.
        seed: of all rounding noise, 64 bits; the same on every rank, which draw different numbers all the same.
        nonfinite: ``"raise"``: NaN or Inf on any rank raises NonFiniteError on every rank; ``"propagate"``: the mean of
            that bucket becomes NaN on every rank.
        feedback: None, or :class:`~.feedback.Feedback`: what was not sent is added to what is sent next.
        policy: which codec for which tensor; of these rules the first that matches decides. See :mod:`.policy`.
        hierarchy: None, or ``"node"``: the ranks of a node make their exact mean, and nodes exchange coded numbers.

    Raises ArgumentError for other values, for codecs that are not fit for the method, and for feedback on a codec that
    is no contraction.

    >>> from pqasgd_horovod import codecs
    >>> ExchangeConfig(codecs.eden(bits=2)).method
    'auto'
    """

    codec: Scheme
    second_codec: Codec | None = None
    method: str = "auto"
    small_tensor_threshold: int = DEFAULT_SMALL_TENSOR_THRESHOLD
    bucket_cap_mb: float = DEFAULT_BUCKET_CAP_BYTES / 2**20
    seed: int = 0
    nonfinite: NonFinitePolicy = "raise"
    feedback: Feedback | None = None
    policy: tuple[Rule, ...] = ()
    hierarchy: str | None = None

    def __post_init__(self) -> None:
        for argument, codec in self._codecs().items():
            way = self._way_of(codec) if argument == "compression" else self._way_by_rule(codec)
            names = ("exchange", argument, "second_compression")
            check_method(way.method, codec.message_codec, way.second_codec, names)
        if self.second_codec is not None and not isinstance(self.codec, Codec):
            raise ArgumentError(
                f"second_compression is {self.second_codec} with compression={self.codec}, which sends means as they "
                "are: leave second_compression out"
            )
        if self.policy and self.policy[-1].pattern is ... and self.codec != codecs.none():
            raise ArgumentError(
                f"compression is {self.codec} and policy ends with ..., which leaves nothing for it: give one of them"
            )
        if self.nonfinite not in NON_FINITE_POLICIES:
            raise ArgumentError(
                f"nonfinite is {self.nonfinite!r}; it must be one of {', '.join(map(repr, NON_FINITE_POLICIES))}"
            )
        if self.hierarchy not in HIERARCHIES:
            raise ArgumentError(f"hierarchy is {self.hierarchy!r}; it must be None or 'node'")
        threshold = check_integer("small_tensor_threshold", self.small_tensor_threshold, 0, 2**48)
        object.__setattr__(self, "small_tensor_threshold", threshold)
        object.__setattr__(self, "seed", check_integer("seed", self.seed, 0, 2**64 - 1))
        if not is_number(self.bucket_cap_mb) or not 0 < self.bucket_cap_mb <= 1024:
            raise ArgumentError(
                f"bucket_cap_mb is {self.bucket_cap_mb!r}; it must be a number above 0, at most 1024 MiB"
            )
        object.__setattr__(self, "bucket_cap_mb", float(self.bucket_cap_mb))
        coded = self._codecs()
        if self.second_codec is not None:
            coded["second_compression"] = self.second_codec
        check_feedback(self.feedback, coded)
        self._check_hierarchy()
        self._check_correction()

    def _check_hierarchy(self) -> None:
        for argument, codec in self._codecs().items():
            if self.hierarchy is not None and not isinstance(codec, Codec):
                raise ArgumentError(
                    f"hierarchy is {self.hierarchy!r} with {argument}={codec}, whose factors all ranks exchange: "
                    "leave hierarchy out, or use a codec of flat vectors such as Compression.eden(bits=2)"
                )

    def _check_correction(self) -> None:
        if self.correction is not None and self.hierarchy is not None:
            raise ArgumentError(
                f"hierarchy is {self.hierarchy!r} with feedback={self.feedback}; each rank applies momentum to its own "
                "gradients, and a node has only their mean: use one of them"
            )
        for argument, codec in self._codecs().items():
            if self.method == "two_phase" and self.correction is not None and self.correction.masks(codec):
                raise ArgumentError(
                    f"exchange is 'two_phase' with {argument}={codec} and feedback={self.feedback}; the owner of a "
                    "shard sends all of its own numbers there, and would clear all their momentum: use "
                    "exchange='allgather', or masking=False"
                )

    def at(self, step: int) -> ExchangeConfig:
        """Return the configuration of a step: while density warms up sparse codecs keep more than after it.

        >>> from pqasgd_horovod import codecs
        >>> config = ExchangeConfig(codecs.topk(density=0.001), feedback=MomentumCorrection(warmup_steps=100))
        >>> [config.at(step).codec.density for step in (0, 30, 100)]
        [0.25, 0.0625, 0.001]
        """
        return self.in_stage(0 if self.correction is None else self.correction.stage(step))

    @property
    def correction(self) -> MomentumCorrection | None:
        """The feedback, if it corrects momentum."""
        return self.feedback if isinstance(self.feedback, MomentumCorrection) else None

    def in_stage(self, stage: int) -> ExchangeConfig:
        """Return the configuration of a stage of the warm-up."""
        density = 0.0 if self.correction is None else self.correction.densities[stage]
        if not density:
            return self
        return dataclasses.replace(
            self,
            codec=self.codec.at_least(density),
            policy=tuple(dataclasses.replace(rule, codec=rule.codec.at_least(density)) for rule in self.policy),
        )

    def _codecs(self) -> dict[str, Scheme]:
        """Return every codec by the argument that it came with."""
        return {"compression": self.codec, **{f"policy[{i}]": rule.codec for i, rule in enumerate(self.policy)}}

    def check_for_parameters(self, averaging: PeriodicAveraging) -> None:
        """Raise ArgumentError unless codecs are fit for changes of parameters that are averaged in this way."""
        if self.correction is not None:
            raise ArgumentError(
                f"feedback is {self.feedback}; it is for gradients, period=1 without an outer optimizer: for changes "
                "of parameters, which have their momentum, use hvd.Feedback()"
            )
        for argument, codec in self._codecs().items():
            if averaging.is_sparse and not isinstance(codec, Codec):
                raise ArgumentError(
                    f"{argument} is {codec} with averaging={averaging}, which averages parts of the parameters in "
                    "turn; it needs whole matrices: use hvd.PeriodicAveraging without a selection, or a codec of flat "
                    "vectors such as Compression.eden(bits=2)"
                )
            if not codec.keeps_scale:
                raise ArgumentError(
                    f"{argument} is {codec}, which decodes to +-1: it is for gradients, period=1 without an outer "
                    "optimizer. For changes of parameters take one with a scale, such as Compression.signsgd()"
                )

    def check_for_join(self) -> None:
        """Raise ArgumentError unless a rank without data can send nothing."""
        for argument, codec in {**self._codecs(), "second_compression": self.second_codec}.items():
            if codec is not None and not codec.keeps_scale:
                raise ArgumentError(
                    f"{argument} is {codec}, in which a 0 is sent as +1: a rank without data would vote, so that "
                    "join() is not possible. Take a codec with a scale, such as Compression.signsgd(), or give every "
                    "rank as many batches"
                )

    def way_for(self, tensor: TensorSpec) -> Way:
        """Return how a tensor travels: with the codec of the first rule that matches, if it fits the tensor.

        >>> import numpy as np
        >>> from pqasgd_horovod import codecs
        >>> from pqasgd_horovod.averaging import ArrayView
        >>> config = ExchangeConfig(codecs.eden(bits=4), policy=(Rule("embed*", codecs.topk()),))
        >>> [config.way_for(ArrayView(name, np.zeros(5000))).codec.id for name in ("embedding", "output")]
        ['topk', 'eden']
        >>> config.way_for(ArrayView("bias", np.zeros(5)))
        Way(codec=NoCompression(), second_codec=None, method='auto')
        """
        way = self._chosen_for(tensor)
        return way if way.codec.fits(tensor.matrix) else AS_IT_IS

    def _chosen_for(self, tensor: HasShape) -> Way:
        small = Rule(smaller_than(self.small_tensor_threshold), codecs.none())
        rule = decide((*self.policy, small), tensor.name, tensor.shape)
        return self._way_of(self.codec) if rule is None else self._way_by_rule(rule.codec)

    @property
    def seed_of_tables(self) -> int:
        """The seed of sparse gradients: channels, which are numbered too, have seeds that follow each other."""
        return (self.seed + (1 << 32)) % 2**64

    def codec_of_rows(self, tensor: HasShape) -> Codec:
        """Return the codec of the rows of a sparse gradient: that of the tensor, if it codes flat vectors.

        Raises ArgumentError for one that the owner of a shard has to decode.
        """
        codec = self._chosen_for(tensor).codec
        if not isinstance(codec, Codec):
            return codecs.none()
        if codec.exchange_method not in (None, "allgather"):
            raise ArgumentError(
                f"the gradient of {tensor.name!r} is sparse, and its codec is {codec}: each rank has other rows, which "
                "go to all ranks. Use sparse_as_dense=True, another codec, or a policy with one for this parameter"
            )
        return codec

    def _way_of(self, codec: Scheme) -> Way:
        return Way(codec, self.second_codec if isinstance(codec, Codec) else None, self.method)

    def _way_by_rule(self, codec: Scheme) -> Way:
        """Return the way of what a rule chooses: what it leaves as it is stays so."""
        return AS_IT_IS if codec.lossless else self._way_of(codec)

    def by_way(self, tensors: Sequence[Spec]) -> list[tuple[Way, list[Spec]]]:
        """Return the tensors of each way that has any, those of ``compression`` first and uncompressed ones last."""
        ways = [self._way_of(self.codec), *(self._way_by_rule(rule.codec) for rule in self.policy)]
        members: dict[Way, list[Spec]] = {way: [] for way in (*(way for way in ways if way != AS_IT_IS), AS_IT_IS)}
        for tensor in tensors:
            members[self.way_for(tensor)].append(tensor)
        return [(way, found) for way, found in members.items() if found]

    def describe_codecs(self, tensors: Sequence[HasShape]) -> dict[str, Any]:
        """Return what the ranks compare of a policy: of each tensor its codec. Nothing where there is no policy."""
        return {"codecs": {t.name: self._chosen_for(t).codec.config() for t in tensors}} if self.policy else {}

    def check_names(self, tensors: Sequence[HasShape]) -> None:
        """Raise ArgumentError if the policy has a pattern that is for none of the tensors."""
        if self.policy:
            check_names(self.policy, tensors)

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
        own["policy"] = [rule.config() for rule in self.policy]
        return own
