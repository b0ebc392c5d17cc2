r"""How the mean is applied: the outer optimizer, which sees one averaged change :math:`\bar\delta` in each period.

Every rank has the same mean and does the same arithmetic, so nothing is sent, and replicas stay bit-identical.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..codecs.base import FLOAT32, is_number
from ..errors import ArgumentError

AnchorArray = NDArray[np.float32] | NDArray[np.float64]


class Coefficients(NamedTuple):
    """An outer step: ``momentum = decay * momentum + delta``, ``delta = a * momentum + b * delta``."""

    decay: float
    a: float
    b: float


@dataclasses.dataclass(frozen=True)
class Outer(abc.ABC):
    """The base of outer optimizers."""

    id: ClassVar[str]
    uses_learning_rate: ClassVar[bool] = False
    """True if the inner learning rate enters, which the ranks then agree on."""

    @abc.abstractmethod
    def coefficients(self, learning_rate_ratio: float) -> Coefficients | None:
        """Return what is done with the mean; None: the anchor moves by it.

        ``learning_rate_ratio`` is the inner learning rate now over that at the last average.
        """

    def config(self) -> dict[str, Any]:
        """Return the configuration as a dict that JSON can hold."""
        return {"id": self.id, **dataclasses.asdict(self)}


def _check_fraction(name: str, value: float) -> float:
    if not is_number(value) or not 0.0 <= value < 1.0:
        raise ArgumentError(f"{name} is {value!r}; it must be a number from 0 to below 1")
    return float(value)


def _check_rate(name: str, value: float) -> float:
    if not is_number(value) or not 0.0 < value < float("inf"):
        raise ArgumentError(f"{name} is {value!r}; it must be a number above 0")
    return float(value)


@dataclasses.dataclass(frozen=True)
class Replace(Outer):
    r"""The paper's: :math:`a \leftarrow a + \bar\delta`.

    >>> Replace().coefficients(1.0) is None
    True
    """

    id = "replace"

    def coefficients(self, learning_rate_ratio: float) -> Coefficients | None:
        """The anchor moves by the mean."""
        return None


@dataclasses.dataclass(frozen=True)
class SlowMo(Outer):
    r"""Slow momentum: :math:`u \leftarrow \beta u - \bar\delta/\gamma`, :math:`a \leftarrow a - \alpha\gamma u`.

    What is kept is :math:`v = -\gamma u`, float32, one number for each parameter:
    :math:`v \leftarrow \beta\,\frac{\gamma}{\gamma'}\,v + \bar\delta`, :math:`a \leftarrow a + \alpha v`, with
    the inner learning rate :math:`\gamma` now and :math:`\gamma'` at the last average, which the ranks agree on.

    Args:
        beta: slow momentum, from 0 to below 1. Larger: smoother, and further ahead. 0 with ``alpha=1`` is
            :class:`Replace`.
        alpha: slow learning rate, above 0.

    Raises ArgumentError for other values.

    Source: Wang, Tantia, Ballas, Rabbat, "SlowMo: improving communication-efficient distributed SGD with slow
    momentum", ICLR 2020, algorithm 1.

    >>> SlowMo(beta=0.5, alpha=0.7).coefficients(learning_rate_ratio=0.1)
    Coefficients(decay=0.05, a=0.7, b=0.0)
    """

    id = "slowmo"
    uses_learning_rate = True

    beta: float = 0.5
    alpha: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", _check_fraction("beta", self.beta))
        object.__setattr__(self, "alpha", _check_rate("alpha", self.alpha))

    def coefficients(self, learning_rate_ratio: float) -> Coefficients | None:
        """Decay in units of the learning rate; move along the momentum."""
        return Coefficients(self.beta * learning_rate_ratio, self.alpha, 0.0)


@dataclasses.dataclass(frozen=True)
class Nesterov(Outer):
    r"""Nesterov's momentum on the mean of changes.

    .. math:: m \leftarrow \mu m + \bar\delta, \qquad a \leftarrow a + \eta(\bar\delta + \mu m).

    With AdamW inside and periods of 50 to 500 it is DiLoCo.

    Args:
        lr: outer learning rate :math:`\eta`, above 0.
        momentum: :math:`\mu`, from 0 to below 1. Larger: smoother, and further ahead. 0 with ``lr=1`` is
            :class:`Replace`.

    Raises ArgumentError for other values.

    Source: Douillard et al., "DiLoCo: distributed low-communication training of language models", 2023, algorithm 1.

    >>> Nesterov(lr=0.5, momentum=0.5).coefficients(1.0)
    Coefficients(decay=0.5, a=0.25, b=0.5)
    """

    id = "nesterov"

    lr: float = 0.7
    momentum: float = 0.9

    def __post_init__(self) -> None:
        object.__setattr__(self, "lr", _check_rate("lr", self.lr))
        object.__setattr__(self, "momentum", _check_fraction("momentum", self.momentum))

    def coefficients(self, learning_rate_ratio: float) -> Coefficients | None:
        """As ``torch.optim.SGD(nesterov=True)`` on the negative mean."""
        return Coefficients(self.momentum, self.lr * self.momentum, self.lr)


@dataclasses.dataclass(frozen=True)
class OuterOptimizer(Outer):
    r"""Any optimizer of the framework: it steps the anchor, with :math:`-\bar\delta` for a gradient.

    What ``PeriodicAveraging(outer=...)`` makes of what is no outer optimizer of this package. Every rank steps by
    itself on the same bytes; that replicas stay bit-identical then rests on the framework's arithmetic, which may
    differ between instruction sets and numbers of threads: use identical machines, and ``check_consistency`` to see.

    Args:
        optimizer: what the front end makes one from: in PyTorch a callable that is given parameters, in Keras an
            optimizer or its serialized configuration.
        description: what all ranks and a checkpoint have to agree on; JSON.

    Source: Reddi et al., "Adaptive federated optimization", ICLR 2021.
    """

    id = "optimizer"

    optimizer: Any
    description: Any = None

    def coefficients(self, learning_rate_ratio: float) -> Coefficients | None:
        """None: the optimizer itself moves the anchor."""
        return None

    def config(self) -> dict[str, Any]:
        """Return the description."""
        return {"id": self.id, "optimizer": self.description}


class OuterStepper(Protocol):
    """A framework's optimizer in the place of an outer step."""

    def place(self, anchors: Mapping[str, AnchorArray]) -> None:
        """Make the optimizer of these parameters; those that it had keep their state."""
        ...

    def step(self, anchors_and_means: Mapping[str, tuple[AnchorArray, FLOAT32]]) -> None:
        """Move the anchors, in place, by the means of the changes."""
        ...

    def state_dict(self) -> Any:
        """Return a copy of what is saved."""
        ...

    def load_state_dict(self, state: Any) -> None:
        """Take over what was saved, for the next :meth:`place`; None: begin anew."""
        ...


def outer_step(coefficients: Coefficients, momentum: FLOAT32, delta: FLOAT32) -> None:
    """Do an outer step in place: the NumPy specification of :func:`pqasgd_horovod.native.outer`.

    >>> momentum, delta = np.ones(1, np.float32), np.full(1, 2.0, np.float32)
    >>> outer_step(Coefficients(decay=0.5, a=1.0, b=3.0), momentum, delta)
    >>> momentum, delta
    (array([2.5], dtype=float32), array([8.5], dtype=float32))
    """
    decay, a, b = (np.float32(number) for number in coefficients)
    momentum *= decay
    momentum += delta
    delta *= b
    delta += a * momentum


OUTERS: Mapping[str, type[Outer]] = {cls.id: cls for cls in (Replace, SlowMo, Nesterov, OuterOptimizer)}
"""Outer optimizers by id."""


def outer_from_config(config: Mapping[str, Any]) -> Outer:
    """Return the outer optimizer that a ``config()`` describes.

    >>> outer_from_config(SlowMo(beta=0.25).config())
    SlowMo(beta=0.25, alpha=1.0)
    """
    arguments = dict(config)
    cls = OUTERS.get(arguments.pop("id", None))
    if cls is None:
        raise ArgumentError(f"outer is {config!r}; its id must be one of {', '.join(OUTERS)}")
    return cls(**arguments)
