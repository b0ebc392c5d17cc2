"""``DistributedGradientTape``: a gradient tape whose gradients are means over the ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

import horovod.tensorflow as horovod
import keras
import tensorflow as tf

from ..averaging import ExchangeConfig, PeriodicAveraging
from ..averaging.config import DEFAULT_SMALL_TENSOR_THRESHOLD
from ..averaging.construction import Membership, construct_together
from ..errors import ArgumentError
from ..exchange import DEFAULT_BUCKET_CAP_BYTES
from ..exchange.base import NonFinitePolicy
from .carrier import HorovodCarrier
from .compression import CodecCompressor, Compression, codec_of
from .gradients import CodedGradients, GradientAverager, GradientSettings, StockGradients, layout_of
from .optimizer import check_op, scaled
from .traced import outside_of_graphs
from .variables import describe_variables, name_of, unwrap

_averagers: dict[tuple[Any, ...], GradientAverager] = {}
_compressors: dict[tuple[Any, ...], Any] = {}


class TapeState(tf.Module):
    """What all tapes of a program have counted, in the order in which their variables were first seen."""

    def add(self, state: tf.Module) -> None:
        """Hold the state of one more list of variables."""
        setattr(self, f"tape_{sum(name.startswith('tape_') for name in vars(self))}", state)


_state = TapeState(name="pqasgd_tapes")


def tape_state() -> TapeState:
    """Return what tapes have counted, for a ``tf.train.Checkpoint``: it keys the rounding noise.

    A tape is made anew in each step, so that it cannot hold anything itself.

    >>> import tensorflow as tf, pqasgd_horovod.tensorflow as hvd
    >>> checkpoint = tf.train.Checkpoint(tapes=hvd.tape_state())
    """
    return _state


class _DistributedTape:
    """What a wrapped tape does differently; Horovod's tape, or the user's, is within it."""

    def __init__(self, tape: tf.GradientTape, settings: dict[str, Any]) -> None:
        self._tape = tape
        self._settings = settings
        self._local: list[Any] = []
        self._local_layers: list[keras.Layer] = []

    def __enter__(self) -> _DistributedTape:
        self._tape.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._tape.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tape, name)

    def register_local_source(self, source: Any) -> None:
        """Keep a variable's gradients to this rank."""
        self._local.append(unwrap(source))

    def register_local_layer(self, layer: keras.Layer) -> None:
        """Keep the gradients of a layer's variables to this rank."""
        self._local_layers.append(layer)

    def _local_sources(self) -> list[Any]:
        return [*self._local, *(unwrap(v) for layer in self._local_layers for v in layer.trainable_weights)]

    def gradient(self, target: Any, sources: Any, output_gradients: Any = None, **options: Any) -> Any:
        """Return the gradients of ``target``, each the mean, or the sum, over all ranks; collective."""
        flat = tf.nest.flatten(sources)
        gradients = tf.nest.flatten(
            self._tape.gradient(target, [unwrap(source) for source in flat], output_gradients, **options)
        )
        local = self._local_sources()
        shared = [i for i, source in enumerate(flat) if not any(unwrap(source) is own for own in local)]
        means = self._average([gradients[i] for i in shared], [flat[i] for i in shared]) if shared else []
        if self._settings["scale_local_gradients"]:
            size = self._settings["process_set"].size()
            gradients = [None if gradient is None else scaled(gradient, 1.0 / size) for gradient in gradients]
        for i, mean in zip(shared, means, strict=True):
            gradients[i] = mean
        return tf.nest.pack_sequence_as(sources, gradients)

    def _average(self, gradients: list[Any], sources: list[Any]) -> list[Any]:
        layout = layout_of(describe_variables(sources), gradients)
        return _averager_of(layout, self._settings).average(gradients, sources)

    def communication_stats(self) -> dict[str, Any]:
        """Return running totals of all tapes with the same settings, as an optimizer's."""
        averagers = [averager for key, averager in _averagers.items() if key[1:] == _identity(self._settings)]
        if len(averagers) != 1:
            raise ArgumentError(f"communication_stats: {len(averagers)} lists of variables have gone through this tape")
        return averagers[0].communication_stats()


def _identity(settings: dict[str, Any]) -> tuple[Any, ...]:
    process_set = tuple(settings["process_set"].ranks)
    gradients: GradientSettings = settings["gradients"]
    groups = gradients.groups
    if isinstance(groups, tuple):  # variables cannot be compared, their names can
        gradients = dataclasses.replace(gradients, groups=tuple(tuple(map(name_of, group)) for group in groups))
    compressor = settings["compressor"]
    kind = compressor if isinstance(compressor, type) else type(compressor)
    return (process_set, settings["config"], gradients, kind)


def _averager_of(layout: list[tuple[str, str]], settings: dict[str, Any]) -> GradientAverager:
    """Return what averages such gradients: made once, though a tape is made in every step."""
    identity = (tuple(layout), *_identity(settings))
    compressor = _compressors.setdefault(identity, settings["compressor"])
    if compressor != settings["compressor"]:
        raise ArgumentError(
            f"compression is another {type(compressor).__name__} object than before for these variables: a compressor "
            "of your own has to be made once, outside of the traced function"
        )
    if identity not in _averagers:
        with outside_of_graphs():
            membership = Membership(horovod, settings["process_set"], HorovodCarrier)
            with construct_together(membership):
                carrier: Any = membership.carrier
                config: ExchangeConfig = settings["config"]
                averager: GradientAverager
                if settings["stock"]:
                    itemsize = 2 if config.codec.id == "fp16" else None
                    averager = StockGradients(
                        carrier, settings["gradients"], settings["compressor"], itemsize, name=membership.name
                    )
                else:
                    averager = CodedGradients(carrier, settings["gradients"], config, name=membership.name)
                membership.describe(
                    "DistributedGradientTape",
                    PeriodicAveraging(period=1),
                    config,
                    op=settings["gradients"].op,
                    check_consistency=False,
                    sources=dict(layout),
                )
            _averagers[identity] = averager
            _state.add(averager.state)
    return _averagers[identity]


def DistributedGradientTape(
    gradtape: tf.GradientTape,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    op: Any = horovod.Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    process_set: Any = horovod.global_process_set,
    scale_local_gradients: bool = True,
    *,
    second_compression: Any = None,
    exchange: str = "auto",
    small_tensor_threshold: int = DEFAULT_SMALL_TENSOR_THRESHOLD,
    bucket_cap_mb: float = DEFAULT_BUCKET_CAP_BYTES / 2**20,
    seed: int = 0,
    nonfinite: NonFinitePolicy = "raise",
) -> Any:
    r"""Wrap a gradient tape so that ``gradient()`` returns :math:`\frac1n \sum_i Q(g_i)`.

    Horovod's function of this name, which also takes variables of Keras 3 as sources, and any codec as ``compression``.
    The arguments are those of ``DistributedOptimizer``. Gradients that are ``tf.IndexedSlices`` travel as they are,
    unless ``sparse_as_dense``. To resume bit-exactly put :func:`tape_state` into the checkpoint.

    >>> import tensorflow as tf, pqasgd_horovod.tensorflow as hvd
    >>> hvd.init()
    >>> x = tf.Variable(3.0)
    >>> with hvd.DistributedGradientTape(tf.GradientTape(), compression=hvd.Compression.eden(bits=4)) as tape:
    ...     y = x * x
    >>> float(tape.gradient(y, x))
    6.0
    """
    codec = codec_of(compression)
    second_codec = None if second_compression is None else codec_of(second_compression, "second_compression")
    stock = codec is None or codec.commutes_with_sum
    check_op(op, PeriodicAveraging(period=1), stock, gradient_predivide_factor)
    config = ExchangeConfig(
        codec or Compression.none.codec,
        second_codec,
        exchange,
        small_tensor_threshold,
        bucket_cap_mb,
        seed,
        nonfinite,
    )
    lists = groups or num_groups
    settings = {
        "stock": stock,
        "config": config,
        "compressor": compression if codec is None else CodecCompressor(codec),
        "gradients": GradientSettings(
            op,
            gradient_predivide_factor,
            tuple(map(tuple, lists)) if isinstance(lists, list) else lists,
            sparse_as_dense,
            device_dense,
            device_sparse,
        ),
        "process_set": process_set,
        "scale_local_gradients": scale_local_gradients,
    }
    return _DistributedTape(gradtape, settings)


def PartialDistributedGradientTape(
    gradtape: tf.GradientTape,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    op: Any = horovod.Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    process_set: Any = horovod.global_process_set,
    local_layers: Any = None,
    scale_local_gradients: bool = True,
    **options: Any,
) -> Any:
    """Wrap a gradient tape like :func:`DistributedGradientTape`, but keep the gradients of some layers to this rank.

    Horovod's function of this name; ``local_layers`` is a Keras layer, or several, and ``options`` are the other
    function's.

    >>> import keras, tensorflow as tf, pqasgd_horovod.tensorflow as hvd
    >>> hvd.init()
    >>> layer = keras.layers.Dense(1)
    >>> with hvd.PartialDistributedGradientTape(tf.GradientTape(), local_layers=layer) as tape:
    ...     y = layer(tf.ones((1, 2)))
    >>> [gradient.shape for gradient in tape.gradient(y, layer.trainable_weights)]
    [TensorShape([2, 1]), TensorShape([1])]
    """
    layers = [local_layers] if isinstance(local_layers, keras.Layer) else list(local_layers or ())
    for layer in layers:
        if not isinstance(layer, keras.Layer):
            raise ArgumentError(f"local_layers has {layer!r}; it must be Keras layers, or one")
    tape = DistributedGradientTape(
        gradtape,
        device_dense,
        device_sparse,
        compression,
        sparse_as_dense,
        op,
        gradient_predivide_factor,
        num_groups,
        groups,
        process_set,
        scale_local_gradients,
        **options,
    )
    for layer in layers:
        # A layer that has no weights yet gets them while the tape records.
        tape.register_local_layer(layer)
    return tape
