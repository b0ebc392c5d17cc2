"""Which codec for which tensor: an ordered list of rules, of which the first that matches decides.

Biases and norms are few and sensitive, embeddings are large and hardly touched. The tensors of one codec are one
channel, one flat vector, so that what is decided by tensor costs no message by tensor.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..codecs.base import Scheme, check_integer
from ..errors import ArgumentError

_LARGEST = 2**48
_NAMES_SHOWN = 8
REST = "..."
"""What stands for Ellipsis in a configuration."""


@dataclasses.dataclass(frozen=True)
class LargerThan:
    """Matches tensors of more than ``num_elements`` elements.

    >>> LargerThan(100)("fc.weight", (20, 10)), LargerThan(200)("fc.weight", (20, 10))
    (True, False)
    """

    num_elements: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_elements", check_integer("num_elements", self.num_elements, 0, _LARGEST))

    def __call__(self, name: str, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape is larger."""
        return math.prod(shape) > self.num_elements


@dataclasses.dataclass(frozen=True)
class SmallerThan:
    """Matches tensors of fewer than ``num_elements`` elements.

    >>> SmallerThan(100)("fc.bias", (10,)), SmallerThan(10)("fc.bias", (10,))
    (True, False)
    """

    num_elements: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_elements", check_integer("num_elements", self.num_elements, 0, _LARGEST))

    def __call__(self, name: str, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape is smaller."""
        return math.prod(shape) < self.num_elements


class HasShape(Protocol):
    """What rules look at."""

    @property
    def name(self) -> str:
        """Name."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape."""
        ...


class Shaped(NamedTuple):
    """A name and a shape, where there is no more to know yet."""

    name: str
    shape: tuple[int, ...]


_BY_SIZE: Mapping[str, Callable[[int], Any]] = {"larger_than": LargerThan, "smaller_than": SmallerThan}


def larger_than(num_elements: int) -> LargerThan:
    """Return the pattern of tensors of more than ``num_elements`` elements, for ``policy=``.

    >>> larger_than(100_000)
    LargerThan(num_elements=100000)
    """
    return LargerThan(num_elements)


def smaller_than(num_elements: int) -> SmallerThan:
    """Return the pattern of tensors of fewer than ``num_elements`` elements, for ``policy=``.

    >>> smaller_than(1024)
    SmallerThan(num_elements=1024)
    """
    return SmallerThan(num_elements)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A pattern, and the codec of the tensors that it matches."""

    pattern: Any
    """A glob on the name, Ellipsis for whatever is left, or a function of name and shape."""
    codec: Scheme

    def matches(self, name: str, shape: Sequence[int]) -> bool:
        """Return whether the pattern matches; raise ArgumentError if a function does not say."""
        if self.pattern is ...:
            return True
        if isinstance(self.pattern, str):
            return fnmatch.fnmatchcase(name, self.pattern)
        answer = self.pattern(name, tuple(shape))
        if not isinstance(answer, (bool, np.bool_)):
            raise ArgumentError(
                f"policy: {describe_pattern(self.pattern)} returned {answer!r} for {name!r} of shape {tuple(shape)}; "
                "a function of name and shape must return True or False"
            )
        return bool(answer)

    def config(self) -> list[Any]:
        """Return what of the rule JSON can hold: a function is its name."""
        return [describe_pattern(self.pattern), self.codec.config()]


def describe_pattern(pattern: Any) -> Any:
    """Return what stands for a pattern in a configuration.

    >>> describe_pattern("*.bias"), describe_pattern(...), describe_pattern(larger_than(5))
    ('*.bias', '...', {'larger_than': 5})
    """
    if pattern is ...:
        return REST
    if isinstance(pattern, str):
        return pattern
    for key, kind in _BY_SIZE.items():
        if type(pattern) is kind:
            return {key: pattern.num_elements}
    return {"function": getattr(pattern, "__qualname__", type(pattern).__qualname__)}


def pattern_from_config(config: Any) -> Any:
    """Return the pattern that :func:`describe_pattern` describes, if it is no function.

    >>> pattern_from_config({"larger_than": 5})
    LargerThan(num_elements=5)
    """
    if isinstance(config, Mapping):
        ((key, number),) = config.items()
        return _BY_SIZE[key](number)
    return ... if config == REST else config


def make_policy(policy: Any, codec_of: Callable[[Any, str], Scheme | None]) -> tuple[Rule, ...]:
    """Return the rules of a ``policy=``, a list of pairs of pattern and compression; None: no rules.

    ``codec_of`` returns the codec of a compression, which has the name of an argument; None for one of the user's own.

    Raises ArgumentError for what is no such list, and for rules that Ellipsis leaves nothing.

    >>> from pqasgd_horovod import codecs
    >>> make_policy([("*.bias", codecs.none())], lambda codec, argument: codec)
    (Rule(pattern='*.bias', codec=NoCompression()),)
    """
    if policy is None:
        return ()
    wanted = 'it must be a list of pairs, such as [("*.bias", Compression.none), (..., Compression.quantize(4))]'
    if not isinstance(policy, Sequence) or isinstance(policy, str):
        raise ArgumentError(f"policy is {policy!r}; {wanted}")
    rules = []
    for i, entry in enumerate(policy):
        if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) != 2:
            raise ArgumentError(f"policy[{i}] is {entry!r}; {wanted}")
        pattern, compression = entry
        if not (isinstance(pattern, str) or pattern is ... or callable(pattern)):
            raise ArgumentError(
                f"policy[{i}] has the pattern {pattern!r}; it must be a glob on names such as '*.bias', "
                "hvd.larger_than(100_000), a function of name and shape that returns True or False, or ... for all the "
                "others"
            )
        codec = codec_of(compression, f"policy[{i}]")
        if codec is None:
            raise ArgumentError(f"policy[{i}] has {compression!r}; it must be one of Compression, not one of your own")
        rules.append(Rule(pattern, codec))
    if any(rule.pattern is ... for rule in rules[:-1]):
        raise ArgumentError("policy has rules after ..., which matches all that is left: put it last")
    return tuple(rules)


def check_names(rules: Sequence[Rule], tensors: Sequence[HasShape]) -> None:
    """Raise ArgumentError if a glob is the first to match none of the tensors: most likely it is misspelt."""
    decided = {tensor.name: decide(rules, tensor.name, tensor.shape) for tensor in tensors}
    for rule in rules:
        if not isinstance(rule.pattern, str) or any(found is rule for found in decided.values()):
            continue
        taken = next((name for name in decided if rule.matches(name, ())), None)
        if taken is not None:
            earlier = decided[taken]
            assert earlier is not None
            raise ArgumentError(
                f"policy: all that {rule.pattern!r} matches, such as {taken!r}, is matched by an earlier rule, "
                f"{describe_pattern(earlier.pattern)!r}; the first that matches decides: put it before that one"
            )
        names = ", ".join(map(repr, list(decided)[:_NAMES_SHOWN]))
        more = f" and {len(decided) - _NAMES_SHOWN} more" if len(decided) > _NAMES_SHOWN else ""
        raise ArgumentError(f"policy: {rule.pattern!r} matches none of the parameters, which are {names}{more}")


def decide(rules: Sequence[Rule], name: str, shape: Sequence[int]) -> Rule | None:
    """Return the first rule that matches a tensor, or None.

    >>> from pqasgd_horovod import codecs
    >>> rules = (Rule("*.bias", codecs.none()), Rule(larger_than(50), codecs.topk()), Rule(..., codecs.eden(4)))
    >>> [decide(rules, name, shape).codec.id for name, shape in (("a.bias", (99,)), ("a.w", (99,)), ("b.w", (5,)))]
    ['none', 'topk', 'eden']
    """
    return next((rule for rule in rules if rule.matches(name, shape)), None)
