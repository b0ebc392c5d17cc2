"""Codecs: what bytes stand for these numbers?

Every codec is a class in :data:`registry`, and here by its id: ``codecs.none()``, ``codecs.fp16()``, ``codecs.bf16()``,
``codecs.maxscale(bits=4)``, ``codecs.qsgd(bits=4)``, ``codecs.terngrad()``, ``codecs.eden(bits=4)``,
``codecs.natural()``, ``codecs.signsgd()``, ``codecs.onebit()``, ``codecs.topk(density=0.01)``, ``codecs.randomk()``,
``codecs.threshold(value)``. A new codec is a new file in this folder with a class under ``@register``; nothing else
needs to know of it. ``codecs.powersgd()`` is no codec of a flat vector, but a :class:`Scheme` that sends matrices.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from .base import Codec, Scheme, from_config, register, registry, schemes
from .eden import Eden
from .sparse import chain

if TYPE_CHECKING:  # for type checkers and editors; at run time these come from the registry
    from .cast import Bf16 as bf16  # noqa: F401
    from .cast import Fp16 as fp16  # noqa: F401
    from .cast import NoCompression as none  # noqa: F401
    from .eden import Eden as eden  # noqa: F401
    from .low_rank import PowerSgd as powersgd  # noqa: F401
    from .natural import Natural as natural  # noqa: F401
    from .sign import OneBit as onebit  # noqa: F401
    from .sign import SignSgd as signsgd  # noqa: F401
    from .sparse import RandomK as randomk  # noqa: F401
    from .sparse import Threshold as threshold  # noqa: F401
    from .sparse import TopK as topk  # noqa: F401
    from .uniform import MaxScale as maxscale  # noqa: F401
    from .uniform import Qsgd as qsgd  # noqa: F401
    from .uniform import TernGrad as terngrad  # noqa: F401

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
globals().update(schemes)

__all__ = ["Codec", "Scheme", "chain", "from_config", "quantize", "register", "registry", "schemes", *sorted(schemes)]


def quantize(bits: int) -> Codec:
    """Return the codec with the least error at ``bits`` bits for each number, 1 to 8, that is right on average.

    Or nearly so: the docstring of ``eden`` has its bias. Signs alone have a smaller error at 1 bit, 0.36 (``signsgd``),
    but one that does not average out over ranks and steps.

    The error is q = E|Q(v) - v|^2 / |v|^2, here on Gaussian numbers at the default block sizes. eden* rounds at random;
    it is exactly unbiased, as the three to its right are. terngrad takes 1.67 bits.

    ====  ========  ========  ========  ========  ========
    bits  eden      eden*     maxscale  qsgd      terngrad
    ====  ========  ========  ========  ========  ========
    1     0.57      11        -         -         -
    2     0.133     0.903     1.59      17.1      1.59
    3     0.0357    0.163     0.197     5.02      -
    4     0.00955   0.0354    0.0362    1.58      -
    5     0.0025    0.0083    0.00789   0.379     -
    6     0.000643  0.00201   0.00185   0.0888    -
    7     0.000163  0.000494  0.000448  0.0215    -
    8     4.1e-05   0.000123  0.00011   0.00529   -
    ====  ========  ========  ========  ========  ========

    Raises ArgumentError for other ``bits``.

    >>> quantize(bits=2)
    Eden(bits=2, block_size=1024, rounding='nearest')
    """
    return Eden(bits=bits)
