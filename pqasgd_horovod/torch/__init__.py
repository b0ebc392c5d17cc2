"""All of ``horovod.torch``, and communication-efficient training: use it in place of ``horovod.torch``.

Nothing of Horovod is changed; names that are also here (``Compression``, ``DistributedOptimizer``, ``broadcast_optimizer_state``) do what Horovod's do, and more.
"""

from horovod.torch import *  # noqa: F403

from ..averaging import PeriodicAveraging
from .carrier import HorovodCarrier
from .compression import CodecCompressor, Compression
from .functions import broadcast_optimizer_state, compressed_allreduce
from .optimizer import DistributedOptimizer

__all__ = [
    *(name for name in dir(__import__("horovod.torch").torch) if not name.startswith("_")),
    "CodecCompressor",
    "HorovodCarrier",
    "PeriodicAveraging",
    "compressed_allreduce",
]
