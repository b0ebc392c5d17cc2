"""All of ``horovod.tensorflow``, and communication-efficient training: use it in place of ``horovod.tensorflow``.

Nothing of Horovod is changed. Names that Horovod has too (``Compression``, ``DistributedGradientTape``,
``DistributedOptimizer``, ``broadcast_variables``) do what Horovod's do, and more; they also work with Keras 3. For
``model.fit`` see :mod:`pqasgd_horovod.tensorflow.keras`.
"""

from typing import Any as _Any

from horovod.tensorflow import *  # noqa: F403
from horovod.tensorflow import Average as _Average
from horovod.tensorflow import global_process_set as _global_process_set

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
from .functions import broadcast_variables as broadcast_variables
from .functions import compressed_allreduce as compressed_allreduce
from .functions import decode_add as decode_add
from .functions import encode as encode
from .optimizer import distribute as _distribute
from .state import combine_states as combine_states
from .tape import DistributedGradientTape as DistributedGradientTape
from .tape import PartialDistributedGradientTape as PartialDistributedGradientTape
from .tape import tape_state as tape_state


def DistributedOptimizer(
    optimizer: _Any,
    name: str | None = None,
    use_locking: bool = False,
    device_dense: str = "",
    device_sparse: str = "",
    compression: _Any = Compression.none,
    sparse_as_dense: bool = False,
    backward_passes_per_step: int = 1,
    op: _Any = _Average,
    gradient_predivide_factor: float = 1.0,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: _Any = None,
    process_set: _Any = _global_process_set,
    scale_local_gradients: bool = True,
    **options: _Any,
) -> _Any:
    """Return a Keras 3 optimizer that trains on all ranks, for loops of one's own; its variables may be TensorFlow's.

    Arguments in the order of ``horovod.tensorflow.DistributedOptimizer`` (``use_locking`` has no meaning any more), and
    ``options`` are those of :func:`pqasgd_horovod.tensorflow.keras.DistributedOptimizer`, which describes all of them.

    >>> import keras, tensorflow as tf
    >>> import pqasgd_horovod.tensorflow as hvd
    >>> hvd.init()
    >>> x = tf.Variable(3.0)
    >>> optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.5), compression=hvd.Compression.eden(4), period=2)
    >>> with tf.GradientTape() as tape:
    ...     y = x * x
    >>> _ = optimizer.apply_gradients([(tape.gradient(y, x), x)])
    >>> float(x)
    0.0
    """
    return _distribute(
        optimizer,
        name=name,
        device_dense=device_dense,
        device_sparse=device_sparse,
        compression=compression,
        sparse_as_dense=sparse_as_dense,
        backward_passes_per_step=backward_passes_per_step,
        op=op,
        gradient_predivide_factor=gradient_predivide_factor,
        average_aggregated_gradients=average_aggregated_gradients,
        num_groups=num_groups,
        groups=groups,
        process_set=process_set,
        scale_local_gradients=scale_local_gradients,
        **options,
    )
