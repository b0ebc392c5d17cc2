"""All of ``horovod.torch``, and communication-efficient training: use it in place of ``horovod.torch``.

Nothing of Horovod is changed. Names that Horovod has too (``Compression``, ``DistributedOptimizer``,
``broadcast_optimizer_state``) do what Horovod's do, and more.
"""

from horovod.torch import *  # noqa: F403

from .. import recipes as recipes
from ..averaging import AdaptivePeriod as AdaptivePeriod
from ..averaging import Feedback as Feedback
from ..averaging import GrowingPeriod as GrowingPeriod
from ..averaging import MomentumCorrection as MomentumCorrection
from ..averaging import Nesterov as Nesterov
from ..averaging import PeriodicAveraging as PeriodicAveraging
from ..averaging import PostLocal as PostLocal
from ..averaging import Replace as Replace
from ..averaging import Rotation as Rotation
from ..averaging import SlowMo as SlowMo
from ..averaging import SparseAveraging as SparseAveraging
from ..averaging import larger_than as larger_than
from ..averaging import smaller_than as smaller_than
from .carrier import HorovodCarrier as HorovodCarrier
from .compression import CodecCompressor as CodecCompressor
from .compression import Compression as Compression
from .functions import broadcast_optimizer_state as broadcast_optimizer_state
from .functions import combine_states as combine_states
from .functions import compressed_allreduce as compressed_allreduce
from .optimizer import DistributedOptimizer as DistributedOptimizer
