r"""What about that which was not sent: the residual, kept on each rank and added to what it sends next.

A lossy codec leaves :math:`u - Q(u)` behind. With error feedback it is not lost: each round sends
:math:`u = v + r` and keeps :math:`r \leftarrow u - Q(u)`, for what a rank codes and, in the two-phase exchange, for the
mean that the owner of a shard codes again. Everything then arrives sooner or later, whatever the codec drops.

What arrives late has missed the momentum of the steps between. With momentum correction each rank therefore applies
momentum to its own gradients, before anything is dropped, and what it accumulates is the velocity.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .. import native
from ..codecs.base import FLOAT32, Scheme, check_flag, check_integer, is_number
from ..errors import ArgumentError
from .outer import Coefficients

if TYPE_CHECKING:
    from ..native.cuda import Device


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


_WARMUP_STAGES = 4


@dataclasses.dataclass(frozen=True)
class MomentumCorrection(Feedback):
    r"""Error feedback on the velocity: with ``topk`` deep gradient compression (DGC).

    Of its gradient g each rank makes, and keeps, a velocity u and what was not sent, v:

    .. math:: u \leftarrow m u + g, \qquad v \leftarrow v + u, \qquad \text{send } Q(v), \quad v \leftarrow v - Q(v)

    (with ``nesterov`` :math:`v \leftarrow v + g + m u`), and with ``masking`` :math:`u_k \leftarrow 0` wherever a
    sparse codec has sent :math:`v_k`, so that no stale momentum drives it on. The mean over the ranks takes the place
    of the gradient; the optimizer's own momentum has to be 0. Tensors that travel as they are have a velocity too, and
    send all of it: momentum SGD. A weight decay of the optimizer is not multiplied by momentum: give it
    :math:`1/(1 - m)` times as much. Gradients must not have a loss scale that changes: velocities would mix scales.

    For gradients, ``period=1``. Two float32 numbers for each parameter are kept on each rank, and belong to the
    checkpoint: save on every rank.

    Args:
        momentum: m, from 0 to below 1.
        nesterov: Nesterov's momentum, as in ``torch.optim.SGD``.
        masking: momentum factor masking. Sparse codecs then take ``exchange="allgather"``, which ``"auto"`` chooses:
            in the other one the owner of a shard sends all of its own numbers, and would lose all their momentum.
        clip_norm: None, or the largest norm, above 0, of the mean of all gradients together, as of
            ``clip_grad_norm_``; each of n ranks clips its own to :math:`n^{-1/2}` of it. Nothing is sent before
            backward has ended then.
        warmup_steps: steps in which sparse codecs keep more: 25 %, 6.25 %, 1.6 % and 0.4 % of the numbers, or their own
            density if it is larger, each for a quarter of these steps. The ranks lay out their messages anew between.

    Raises ArgumentError for other values.

    Source: Lin, Han, Mao, Wang, Dally, "Deep gradient compression: reducing the communication bandwidth for
    distributed training", ICLR 2018, algorithms 2 and 4, and appendix B.

    >>> MomentumCorrection(momentum=0.9).coefficients
    Coefficients(decay=0.9, a=1.0, b=0.0)
    >>> correction = MomentumCorrection(warmup_steps=100)
    >>> [correction.densities[correction.stage(step)] for step in (0, 25, 99, 100)]
    [0.25, 0.0625, 0.00390625, 0.0]
    """

    id = "momentum_correction"

    momentum: float = 0.9
    nesterov: bool = False
    masking: bool = True
    clip_norm: float | None = None
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if not is_number(self.momentum) or not 0 <= self.momentum < 1:
            raise ArgumentError(f"momentum is {self.momentum!r}; it must be a number from 0 to below 1")
        for name in ("nesterov", "masking"):
            check_flag(name, getattr(self, name))
        if self.clip_norm is not None and (not is_number(self.clip_norm) or not 0 < self.clip_norm < float("inf")):
            raise ArgumentError(f"clip_norm is {self.clip_norm!r}; it must be None or a number above 0")
        object.__setattr__(self, "momentum", float(self.momentum))
        object.__setattr__(self, "clip_norm", None if self.clip_norm is None else float(self.clip_norm))
        object.__setattr__(self, "warmup_steps", check_integer("warmup_steps", self.warmup_steps, 0, 2**48))

    @property
    def coefficients(self) -> Coefficients:
        """The step that makes velocity and increment of velocity and gradient; see :func:`.outer.outer_step`."""
        return Coefficients(self.momentum, self.momentum if self.nesterov else 1.0, 1.0 if self.nesterov else 0.0)

    def masks(self, codec: Scheme) -> bool:
        """Return whether the momentum of what ``codec`` has sent is cleared: where it sends all that would be all."""
        return self.masking and codec.selects

    @property
    def densities(self) -> tuple[float, ...]:
        """Of each stage of the warm-up, and after it, the part of the numbers that is kept at least."""
        return (*(0.25 ** (1 + stage) for stage in range(_WARMUP_STAGES)), 0.0) if self.warmup_steps else (0.0,)

    def stage(self, step: Any, minimum: Callable[[Any, int], Any] = min) -> Any:
        """Return which of the ``densities`` a step has; ``minimum`` is that of the framework of ``step``."""
        return minimum(_WARMUP_STAGES * step // self.warmup_steps, _WARMUP_STAGES) if self.warmup_steps else 0

    def clipping(self, norm: float, size: int) -> float:
        """Return what a gradient of this norm is multiplied by on each of ``size`` ranks.

        >>> MomentumCorrection(clip_norm=1.0).clipping(norm=2.0, size=4)
        0.25
        """
        limit = self.clip_limit(size)
        # What is not finite is reported where it is sent.
        return limit / norm if limit < norm < math.inf else 1.0

    def clip_limit(self, size: int) -> float:
        """Return the largest norm that a gradient keeps on each of ``size`` ranks."""
        return math.inf if self.clip_norm is None else self.clip_norm / math.sqrt(size)


FEEDBACKS: Mapping[str, type[Feedback]] = {cls.id: cls for cls in (Feedback, MomentumCorrection)}
"""Feedbacks by id."""


def feedback_from_config(config: Mapping[str, Any] | None) -> Feedback | None:
    """Return the feedback that a ``config()`` describes; None for none.

    >>> feedback_from_config(Feedback().config())
    Feedback()
    """
    if config is None:
        return None
    arguments = dict(config)
    cls = FEEDBACKS.get(arguments.pop("id", None))
    if cls is None:
        raise ArgumentError(f"feedback is {config!r}; its id must be one of {', '.join(FEEDBACKS)}")
    return cls(**arguments)


def check_feedback(feedback: Feedback | None, codecs: Mapping[str, Scheme]) -> None:
    """Raise ArgumentError unless every codec, by the name of its argument, is fit for ``feedback``."""
    if feedback is None:
        for argument, codec in codecs.items():
            if codec.needs_feedback:
                raise ArgumentError(
                    f"feedback is None with {argument} {codec}, which sends the same few directions again and again: "
                    "what lies in others would be lost for good. Pass feedback=hvd.Feedback()"
                )
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


def check_not_stock(feedback: Feedback | None, compression: Any, hierarchy: str | None = None) -> None:
    """Raise ArgumentError if there is feedback, or a hierarchy, where Horovod itself averages, with ``compression``."""
    if hierarchy is not None:
        raise ArgumentError(
            f"hierarchy is {hierarchy!r} with compression={compression!r} and period=1, where Horovod averages: set "
            "HOROVOD_HIERARCHICAL_ALLREDUCE=1 for its own hierarchy, or use a codec or a period"
        )
    if feedback is not None:
        raise ArgumentError(
            f"feedback is {feedback} with compression={compression!r} and period=1, where Horovod averages and nothing "
            "is left to feed back: use a codec that sends less, or no feedback"
        )


def check_no_momentum(feedback: Feedback | None, settings: Sequence[tuple[str, Any]]) -> None:
    """Raise ArgumentError if momentum is corrected and the user's optimizer has any, among its ``settings``."""
    for name, value in settings:
        if isinstance(feedback, MomentumCorrection) and value:
            raise ArgumentError(
                f"optimizer has {name}={value!r} with feedback={feedback}, which applies momentum before anything is "
                f"compressed, and once is enough: make the optimizer with {name}=0"
            )


class Velocities:
    """The velocity of one rank's gradients, a flat vector, and by how much it lets grow what is to be sent.

    Two arrays of the first, so that a round that fails changes nothing.
    """

    def __init__(
        self, num_elements: int, correction: MomentumCorrection, masks: bool, device: Device | None = None
    ) -> None:
        self._device = device
        self._coefficients = correction.coefficients
        self._masks = masks
        self.kept, self._next, self._increment = (native.zeros(num_elements, device=device) for _ in range(3))
        self.clipping = 1.0
        """What gradients are multiplied by."""

    def advance(self, gradients: native.Source, start: int, span: slice) -> None:
        """Make velocity and increment of ``span``, whose gradients begin at element ``start`` of their source."""
        velocity, increment = self._next[span], self._increment[span]
        native.gather(gradients, start, increment)
        if self.clipping != 1:
            np.multiply(increment, np.float32(self.clipping), out=increment)
        np.copyto(velocity, self.kept[span])
        native.outer(*self._coefficients, velocity, increment, self._device)

    def source(self, residuals: Residuals | None, coder: Device | None) -> native.Source:
        """Return what is to be sent: the increment, plus what was not sent before; ``coder`` codes it, None: a CPU."""
        segment = (self._increment.ctypes.data, native.DTYPE_F32, self._increment.size)
        pointers = None if residuals is None else residuals.pointers()
        return native.Source([segment], None, (self._increment, residuals), pointers, coder)

    def keep(self, starts: Sequence[int], averaged: Sequence[int], residuals: Residuals | None) -> None:
        """After a round, and before :meth:`Residuals.keep`: keep the velocity of the buckets that have a mean."""
        for bucket in averaged:
            span = slice(starts[bucket], starts[bucket + 1])
            if self._masks and residuals is not None:
                residuals.clear_where_sent(span, self._increment[span], self._next[span])
            self.kept[span] = self._next[span]


class Residuals:
    """What one rank has not sent of a flat vector: that of the last round, and that of the round under way.

    Two arrays, so that a round that fails changes nothing.
    """

    def __init__(self, num_elements: int, device: Device | None = None) -> None:
        self.kept, self._next = (native.zeros(num_elements, device=device) for _ in range(2))

    def pointers(self, start: int = 0) -> tuple[int, int]:
        """Return where the residual that is added, and the one that is written, have element ``start``."""
        return self.kept.ctypes.data + 4 * start, self._next.ctypes.data + 4 * start

    def clear_where_sent(self, span: slice, given: FLOAT32, velocity: FLOAT32) -> None:
        """Set ``velocity`` to 0 where anything was sent of ``given`` and the residual; ``given`` is used up."""
        np.add(given, self.kept[span], out=given)  # as it was encoded
        velocity[given != self._next[span]] = 0

    def keep(self, starts: Sequence[int], averaged: Sequence[int]) -> None:
        """After a round: keep what it left of the buckets that have a mean; ``starts`` are the limits of all."""
        if len(averaged) == len(starts) - 1:
            self.kept, self._next = self._next, self.kept
            return
        for bucket in averaged:
            span = slice(starts[bucket], starts[bucket + 1])
            self.kept[span] = self._next[span]
