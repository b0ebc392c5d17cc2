"""All of ``horovod.tensorflow.keras``, made to work under Keras 3, and communication-efficient training.

Use it in place of ``horovod.tensorflow.keras``: under Keras 3 that one's ``DistributedOptimizer`` communicates nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import horovod.tensorflow as horovod
import keras as _keras
from horovod.tensorflow.keras import *  # noqa: F403
from horovod.tensorflow.keras import allgather as allgather
from horovod.tensorflow.keras import allreduce as allreduce
from horovod.tensorflow.keras import broadcast as broadcast

from ... import recipes as recipes
from ...averaging import AdaptivePeriod as AdaptivePeriod
from ...averaging import Feedback as Feedback
from ...averaging import GrowingPeriod as GrowingPeriod
from ...averaging import MomentumCorrection as MomentumCorrection
from ...averaging import Nesterov as Nesterov
from ...averaging import PeriodicAveraging as PeriodicAveraging
from ...averaging import PostLocal as PostLocal
from ...averaging import Replace as Replace
from ...averaging import Rotation as Rotation
from ...averaging import SlowMo as SlowMo
from ...averaging import SparseAveraging as SparseAveraging
from ...averaging import larger_than as larger_than
from ...averaging import smaller_than as smaller_than
from ...averaging.config import DEFAULT_SMALL_TENSOR_THRESHOLD
from ...averaging.schedule import Schedule
from ...errors import ArgumentError
from ...exchange import DEFAULT_BUCKET_CAP_BYTES
from ...exchange.base import NonFinitePolicy
from .. import optimizer as _optimizer
from ..compression import CodecCompressor as CodecCompressor
from ..compression import Compression as Compression
from ..functions import broadcast_variables as broadcast_variables
from ..functions import compressed_allreduce as compressed_allreduce
from ..state import combine_states as combine_states

# Horovod has a module of this name, which its names above brought along.
callbacks = importlib.import_module(f"{__name__}.callbacks")


def DistributedOptimizer(
    optimizer: _keras.optimizers.Optimizer,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: Any = horovod.Average,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: Any = None,
    process_set: Any = horovod.global_process_set,
    scale_local_gradients: bool = True,
    *,
    period: int | Schedule | None = None,
    averaging: PeriodicAveraging | None = None,
    second_compression: Any = None,
    exchange: str = "auto",
    small_tensor_threshold: int = DEFAULT_SMALL_TENSOR_THRESHOLD,
    bucket_cap_mb: float = DEFAULT_BUCKET_CAP_BYTES / 2**20,
    seed: int = 0,
    nonfinite: NonFinitePolicy = "raise",
    feedback: Feedback | None = None,
    policy: Sequence[tuple[Any, Any]] | None = None,
    hierarchy: str | None = None,
    model: Any = None,
    check_consistency: bool = False,
    anchor_device: str | None = None,
) -> Any:
    r"""Return an optimizer of the same class and configuration that trains on all ranks, and sends little.

    With ``period=1`` gradients are averaged before each step: by Horovod itself if the codec commutes with a sum
    (``none``, ``fp16``), else :math:`g \leftarrow \frac1n \sum_i Q(g_i)`, exchanged while others are still computed.
    With ``period=p`` each step is local, and every ``p`` of them :math:`a \leftarrow a + \frac1n \sum_i Q(x_i - a)`,
    :math:`x_i \leftarrow a`, where the anchor :math:`a` is the last common model.

    Args:
        optimizer: any Keras 3 optimizer, not wrapped yet; a ``LossScaleOptimizer`` may be in it. Variables, of Keras or
            of TensorFlow, in float16, bfloat16, float32 or float64.
        name: a name for the optimizer.
        device_dense: as in Horovod where Horovod averages.
        device_sparse: as in Horovod.
        compression: what bytes stand for the numbers: one of :class:`Compression`.
        sparse_as_dense: send sparse gradients as dense, coded ones. Otherwise the rows that a rank has used are coded,
            and sent to every other rank with their numbers. Dense ones are fewer bytes where each of n ranks uses more
            than about 2/n of the rows in a step. (With ``period>1`` gradients are not sent at all.)
        gradient_predivide_factor: as in Horovod where Horovod averages; elsewhere dividing before and multiplying after
            would cancel.
        op: ``Average`` or ``Sum`` of gradients. ``Sum`` needs ``period=1``, ``Adasum`` needs stock compression too.
        backward_passes_per_step: how many calls of ``apply`` accumulate gradients before a step is taken.
        average_aggregated_gradients: divide what was accumulated by their number.
        num_groups: as ``groups``.
        groups: as in Horovod where Horovod averages. Elsewhere gradients are fused in buckets anyway. A model file has
            lists of variables as their positions among those that are trained: a model that is loaded has other paths.
        process_set: the ranks that train together.
        scale_local_gradients: divide gradients of local variables, if there are any, by the number of ranks.
        period: steps between averages, default 1, or a schedule. Short for
            ``averaging=PeriodicAveraging(period=...)``.
        averaging: the strategy: :class:`PeriodicAveraging`.
        second_compression: codec of the mean in the two-phase exchange, by default ``compression``. More bits there
            mean less noise.
        exchange: ``"allgather"``, ``"two_phase"``, or ``"auto"``: what the codec needs, or whichever sends fewer bytes.
        small_tensor_threshold: tensors of fewer elements (biases, norms) travel uncompressed, together in one message.
            0: none does.
        bucket_cap_mb: largest bucket, in MiB of float32. Larger: fewer messages; smaller: more overlap.
        seed: of all rounding noise; the same on every rank. No global generator is touched.
        nonfinite: ``"raise"``: NaN or Inf in what any rank sends raises the same error on every rank, before anything
            changes. ``"propagate"``: the mean becomes NaN on every rank; a loss scale with ``period=1`` uses that, and
            skips the step on all ranks alike.
        feedback: None, or :class:`Feedback`: what a contraction such as ``topk`` did not send is added to what is sent
            next; or :class:`MomentumCorrection`, for gradients and an optimizer without momentum: DGC. Each rank has
            its own residual: a model file holds that of the rank that wrote it, and :func:`combine_states` makes one
            state of all of them for another number of ranks.
        policy: which compression for which variables: a list of pairs of a pattern and one of :class:`Compression`, of
            which the first that matches decides. A pattern is a glob on the variable's path (``"*/bias"``),
            ``larger_than(n)`` or ``smaller_than(n)`` elements, a function of name and shape that returns True or
            False, which Keras saves as it does any function, or ``...`` for all others. ``small_tensor_threshold`` and
            then ``compression`` are for what no pattern matches. Moving statistics travel uncompressed in any case.
        hierarchy: None, or ``"node"``: the ranks of a node first make their mean, uncompressed, and only that is coded
            and exchanged with other nodes, once for each node. Needs ``hvd.init(process_sets="dynamic")`` and as many
            ranks on each node. Bytes are then counted between nodes.
        model: where to find BatchNormalization's moving statistics if no model is compiled with this optimizer, or
            ``gc.freeze()`` was called between then and the first step, after which it cannot be found.
        anchor_device: where anchors, residuals and means of parameters on a GPU are kept: None, beside them; ``"cpu"``:
            in host memory, for models that fill the GPU. Numbers are coded there, too.
        check_consistency: after each average compare checksums of all replicas (slow; for debugging). With ``period=1``
            nothing is compared.

    Returns:
        An optimizer that also has ``flush()``, ``communication_stats()`` and ``register_local_var()``. Counters and
        anchor are saved with the model, and by ``tf.train.Checkpoint``; save on every rank if inner state (momentum) is
        to resume bit-exactly, since that is local.

    Raises ArgumentError for values that are not allowed, and MismatchError on every rank if the ranks were given
    different ones. What goes wrong later, in a graph, is a ``tf.errors.OpError`` with the same text on every rank.

    Source: P. Jiang and G. Agrawal, "A Linear Speedup Analysis of Distributed Deep Learning with Sparse and Quantized
    Communication", NeurIPS 2018.

    >>> import keras, numpy as np
    >>> import pqasgd_horovod.tensorflow.keras as hvd
    >>> hvd.init()
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> optimizer = hvd.DistributedOptimizer(
    ...     keras.optimizers.SGD(0.1), compression=hvd.Compression.quantize(bits=4), period=8
    ... )
    >>> model.compile(optimizer, loss="mse")
    >>> history = model.fit(np.ones((16, 4)), np.ones((16, 2)), batch_size=4, verbose=0)
    >>> optimizer.communication_stats()["steps"]
    4
    """
    return _optimizer.distribute(
        optimizer,
        name=name,
        device_dense=device_dense,
        device_sparse=device_sparse,
        compression=compression,
        sparse_as_dense=sparse_as_dense,
        gradient_predivide_factor=gradient_predivide_factor,
        op=op,
        backward_passes_per_step=backward_passes_per_step,
        average_aggregated_gradients=average_aggregated_gradients,
        num_groups=num_groups,
        groups=groups,
        process_set=process_set,
        scale_local_gradients=scale_local_gradients,
        period=period,
        averaging=averaging,
        second_compression=second_compression,
        exchange=exchange,
        small_tensor_threshold=small_tensor_threshold,
        bucket_cap_mb=bucket_cap_mb,
        seed=seed,
        nonfinite=nonfinite,
        feedback=feedback,
        policy=policy,
        hierarchy=hierarchy,
        model=model,
        check_consistency=check_consistency,
        anchor_device=anchor_device,
    )


def load_model(
    filepath: Any,
    custom_optimizers: Any = None,
    custom_objects: dict[str, Any] | None = None,
    compression: Any = Compression.none,
    **options: Any,
) -> _keras.Model:
    """Load a model with its optimizer, and make that a :func:`DistributedOptimizer` if it is not one; collective.

    Horovod's function of this name. An optimizer that was distributed when the model was saved comes back as it was,
    counters and anchor included, and ``compression`` and ``options`` are not looked at. A plain one is wrapped with
    them, its state (momentum, iterations) included.

    Args:
        filepath: what ``model.save`` has written.
        custom_optimizers: classes of optimizers that Keras does not know.
        custom_objects: other classes and functions that Keras does not know, by name.
        compression: for a plain optimizer, as the following.
        options: other arguments of :func:`DistributedOptimizer`.

    Raises ArgumentError if the model was saved without an optimizer.

    >>> import os, tempfile
    >>> import keras
    >>> import pqasgd_horovod.tensorflow.keras as hvd
    >>> hvd.init()
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> model.compile(keras.optimizers.SGD(0.1), loss="mse")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save(os.path.join(folder, "model.keras"))
    ...     loaded = hvd.load_model(os.path.join(folder, "model.keras"), compression=hvd.Compression.eden(4), period=8)
    >>> loaded.optimizer.communication_stats()["steps"]
    0
    """
    known = {**{cls.__name__: cls for cls in custom_optimizers or ()}, **(custom_objects or {})}
    model = _keras.models.load_model(filepath, custom_objects=known)
    plain = getattr(model, "optimizer", None)
    if plain is None:
        raise ArgumentError(f"filepath is {filepath!r}; the model was saved without an optimizer: compile it anew")
    if not isinstance(plain, _optimizer.DistributedMethods):
        # Compiled anew: what the model saves later on is what it was compiled with.
        config = model.get_compile_config()
        wrapped = DistributedOptimizer(plain, compression=compression, **options)
        config["optimizer"] = _keras.saving.serialize_keras_object(wrapped)
        model.compile_from_config(config)
        if plain.built:
            model.optimizer.build(model.trainable_variables)
            for variable, saved in zip(model.optimizer.variables, plain.variables, strict=True):
                variable.assign(saved)
    return model
