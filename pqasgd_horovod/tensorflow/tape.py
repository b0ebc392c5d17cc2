"""``DistributedGradientTape``: a gradient tape whose gradients are means over the ranks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import horovod.tensorflow as horovod
import keras
import numpy as np
import tensorflow as tf

from ..averaging import ExchangeConfig, PeriodicAveraging
from ..averaging.config import DEFAULT_SMALL_TENSOR_THRESHOLD
from ..averaging.construction import Membership, check_process_set, construct_together
from ..averaging.feedback import Feedback, check_not_stock
from ..averaging.meeting import Purpose
from ..averaging.policy import Rule, describe_pattern, make_policy
from ..averaging.together import NO_ERROR, refused_together
from ..errors import ArgumentError, DesynchronizedError
from ..exchange import DEFAULT_BUCKET_CAP_BYTES
from ..exchange.base import NonFinitePolicy
from ..exchange.carriers import Bytes
from ..exchange.handshake import describe_difference, verify_same
from ..exchange.wire import format_by_rank
from .carrier import HorovodCarrier
from .compression import CodecCompressor, Compression, codec_of, vector_codec_of
from .gradients import GradientAverager, GradientSettings, check_groups, check_some, layout_of
from .meeting import Meeting, Records
from .optimizer import check_op, make_averager, scaled
from .traced import Turns, after, as_written, outside_of_graphs
from .variables import describe_variables, name_of, unwrap


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


class _Tapes:
    """All tapes of one process set: the lists of variables that went through them, and what averages each of them.

    The ranks meet these lists together, so that they are the same, in the same order, on all of them.
    """

    def __init__(self, process_set: Any) -> None:
        self._process_set = process_set
        alone = not process_set.included() or process_set.size() == 1
        self.carrier = None if alone else HorovodCarrier(process_set)
        self.turns = Turns()
        self.lists: list[dict[str, Any]] = []
        self.averagers: dict[tuple[Any, ...], GradientAverager] = {}
        self._compressors: dict[tuple[Any, ...], Any] = {}

    @as_written
    def averager_of(self, sources: list[Any], gradients: list[Any], settings: dict[str, Any]) -> GradientAverager:
        """Return what averages such gradients: made once, though a tape is made in every step."""
        with self.refused_together():
            specs, config = describe_variables(sources), settings["config"]
            layout = layout_of(specs, gradients)
            check_some(gradients)
            config.check_names(specs)
            identity = ((*layout, json.dumps(config.describe_codecs(specs))), *_identity(settings))
            self._check_compressor(identity, settings["compressor"])
        if identity not in self.averagers:
            with outside_of_graphs():
                averager = self._construct(layout, settings)
            self.averagers[identity] = averager
            self._compressors[identity] = settings["compressor"]
            _state.add(averager.state)
        return self.averagers[identity]

    def _check_compressor(self, identity: tuple[Any, ...], compressor: Any) -> None:
        before = self._compressors.get(identity, compressor)
        if before != compressor:
            raise ArgumentError(
                f"compression is another {type(before).__name__} object than before for these variables: a compressor "
                "of your own has to be made once, outside of the traced function"
            )

    def refused_together(self) -> AbstractContextManager[None]:
        """Let the others, whatever they are about to do, know of an error because of which this rank cannot go on."""
        carrier = self.carrier
        if carrier is None:
            return refused_together(None)

        def tell(refusal: Mapping[str, Any]) -> None:
            with outside_of_graphs():
                self._meet(refusal)
                verify_same(carrier, refusal, Membership(horovod, self._process_set, HorovodCarrier).name)

        return refused_together(tell)

    def _construct(self, layout: list[tuple[str, str]], settings: dict[str, Any]) -> GradientAverager:
        _, gradients, kind = _identity(settings)
        config = settings["config"]
        description = {
            **NO_ERROR,
            "sources": dict(layout),
            "source_order": [name for name, _ in layout],
            "exchange": config.config(),
            "arguments": {key: str(value) for key, value in vars(gradients).items()},
            "compression": kind.__name__,
        }
        meeting = self._meet(description)
        averaging = PeriodicAveraging(period=1)
        membership = Membership(horovod, self._process_set, HorovodCarrier)
        with construct_together(membership):
            averager: Any = make_averager(
                averaging, config, settings["gradients"], settings["compressor"], settings["stock"], membership, False,
                meeting,
            )  # fmt: skip
            membership.describe("DistributedGradientTape", averaging, config, op=gradients.op, check_consistency=False)
            membership.description.update(description)
        self.lists.append(description)
        return averager

    def _meet(self, description: Mapping[str, Any]) -> _TapeMeeting | None:
        """Go on if every rank has a list of variables that is new to it, or raise the same error on all of them."""
        if self.carrier is None:
            return None
        meeting = _TapeMeeting(self, self.carrier, description)
        meeting.tell(Purpose.LAYOUT, 0, 0)
        return meeting


class _TapeMeeting(Meeting):
    """Where all tapes meet, for one list of variables: a rank also says which list it is, and describes a new one."""

    def __init__(self, tapes: _Tapes, carrier: HorovodCarrier, description: Mapping[str, Any]) -> None:
        super().__init__(carrier, "pqasgd.tapes")
        self._tapes = tapes
        self._index = len(tapes.lists)
        self._description = description

    def agree(self, purpose: Purpose, steps: tf.Tensor, rounds: tf.Tensor, detail: Any = 0) -> Records:
        """Return what all ranks say, who are about to average this list; else DesynchronizedError is raised on all."""
        with after(self._tapes.turns.begin()):
            records = super().agree(purpose, steps, rounds, self._index)
        self._tapes.turns.end(records.words)
        return records

    def tell(self, purpose: Purpose, steps: int, rounds: int, detail: int = 0, **options: Any) -> None:
        """Say outside of any graph what this list is, and raise likewise."""
        text = json.dumps(self._description).encode()
        super().tell(purpose, steps, rounds, len(text), text=text, **options)

    def _explain(self, data: Bytes) -> None:
        words = data.view(np.int64)
        purposes, intents, descriptions = set(), [], []
        while words.size:
            purpose, steps, _, detail = words[:4].tolist()
            end = 4 if purpose == Purpose.AVERAGE else 4 - (-detail // 8)
            if purpose == Purpose.AVERAGE:
                intents.append(f"averaging list {detail} after {steps} averages of it")
                descriptions.append(self._tapes.lists[detail])
            else:
                descriptions.append(json.loads(words[4:end].tobytes()[:detail]))
                intents.append("meeting a new list" if descriptions[-1]["error"] is None else "raising an error")
            purposes.add(purpose)
            words = words[end:]
        if purposes == {Purpose.LAYOUT} or len(set(intents)) == 1:
            return  # what their new lists are is compared next
        difference = f"; {describe_difference(descriptions)}" if any(d != descriptions[0] for d in descriptions) else ""
        raise DesynchronizedError(
            f"{self._name}: the ranks do not average the same lists of variables: {format_by_rank(enumerate(intents))}"
            f"{difference}. Every rank has to take gradients of the same sources, by the same tapes, in the same order"
        )


_tapes: dict[tuple[int, ...], _Tapes] = {}


def _tapes_of(process_set: Any) -> _Tapes:
    check_process_set(horovod, process_set)
    identity = (process_set.process_set_id, *process_set.ranks)
    if identity not in _tapes:
        with outside_of_graphs():
            _tapes[identity] = _Tapes(process_set)
    return _tapes[identity]


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
        tapes = _tapes_of(self._settings["process_set"])
        return tapes.averager_of(sources, gradients, self._settings).average(gradients, sources)

    def join(self) -> NoReturn:
        """Raise ArgumentError: who joins takes over parameters and moments at the end, of which a tape has none."""
        raise ArgumentError(
            "join() was called on a tape, which does not know what is done with its gradients: take a plain "
            "tf.GradientTape, and wrap the optimizer in hvd.DistributedOptimizer, whose join() is for ranks with "
            "different numbers of batches; or give every rank as many: dataset.take(n) with the same n everywhere"
        )

    def communication_stats(self) -> dict[str, Any]:
        """Return running totals of all tapes with the same settings, as an optimizer's."""
        identity = _identity(self._settings)
        tapes = _tapes_of(self._settings["process_set"])
        averagers = [averager for key, averager in tapes.averagers.items() if key[1:] == identity]
        if len(averagers) != 1:
            raise ArgumentError(
                f"communication_stats() was called on a tape with settings by which {len(averagers)} lists of "
                "variables were averaged; it must be one: call it after gradient(), and tell tapes of other variables "
                "apart by their seed"
            )
        return averagers[0].communication_stats()


def _identity(settings: dict[str, Any]) -> tuple[Any, ...]:
    gradients: GradientSettings = settings["gradients"]
    if not isinstance(gradients.groups, int):  # variables cannot be compared, their names can
        names = tuple(tuple(map(name_of, group)) for group in gradients.groups)
        gradients = dataclasses.replace(gradients, groups=names)
    # A tape is made in every step, and so may the functions of its policy be: what they have decided tells them apart.
    config: ExchangeConfig = settings["config"]
    rules = tuple(Rule(json.dumps(describe_pattern(rule.pattern)), rule.codec) for rule in config.policy)
    compressor = settings["compressor"]
    kind = compressor if isinstance(compressor, type) else type(compressor)
    return (dataclasses.replace(config, policy=rules), gradients, kind)


@as_written
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
    feedback: Feedback | None = None,
    policy: Sequence[tuple[Any, Any]] | None = None,
) -> Any:
    r"""Wrap a gradient tape so that ``gradient()`` returns :math:`\frac1n \sum_i Q(g_i)`.

    Horovod's function of this name, which also takes variables of Keras 3 as sources, and any codec as ``compression``.
    The arguments are those of ``DistributedOptimizer``. Of gradients that are ``tf.IndexedSlices`` the rows are
    coded and sent, unless ``sparse_as_dense``. To resume bit-exactly put :func:`tape_state` into the checkpoint.

    >>> import tensorflow as tf, pqasgd_horovod.tensorflow as hvd
    >>> hvd.init()
    >>> x = tf.Variable(3.0)
    >>> with hvd.DistributedGradientTape(tf.GradientTape(), compression=hvd.Compression.eden(bits=4)) as tape:
    ...     y = x * x
    >>> float(tape.gradient(y, x))
    6.0
    """
    with _tapes_of(process_set).refused_together():
        codec = codec_of(compression)
        second_codec = None if second_compression is None else vector_codec_of(second_compression, "second_compression")
        rules = make_policy(policy, codec_of)
        if codec is None and rules:
            raise ArgumentError(f"compression is {compression!r} with a policy; it must be one of Compression then")
        stock = not rules and (codec is None or codec.commutes_with_sum)
        check_op(op, PeriodicAveraging(period=1), stock, gradient_predivide_factor)
        config = ExchangeConfig(
            codec or Compression.none.codec,
            second_codec,
            exchange,
            small_tensor_threshold,
            bucket_cap_mb,
            seed,
            nonfinite,
            feedback,
            rules,
        )
        if stock:
            check_not_stock(feedback, compression)
        settings = {
            "stock": stock,
            "config": config,
            "compressor": compression if codec is None else CodecCompressor(codec),
            "gradients": GradientSettings(
                op,
                gradient_predivide_factor,
                check_groups(groups, num_groups),
                sparse_as_dense,
                device_dense,
                device_sparse,
            ),
            "process_set": process_set,
            "scale_local_gradients": scale_local_gradients,
        }
    return _DistributedTape(gradtape, settings)


@as_written
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
    with _tapes_of(process_set).refused_together():
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
