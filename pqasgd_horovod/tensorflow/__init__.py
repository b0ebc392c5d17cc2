"""All of ``horovod.tensorflow``, and communication-efficient training: use it in place of ``horovod.tensorflow``."""

from horovod.tensorflow import *  # noqa: F403

from ..averaging import PeriodicAveraging as PeriodicAveraging
from .carrier import HorovodCarrier as HorovodCarrier
from .compression import CodecCompressor as CodecCompressor
from .compression import Compression as Compression
