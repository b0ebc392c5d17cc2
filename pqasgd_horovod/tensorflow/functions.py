"""Functions beside the optimizer: an averaged tensor, variables for everybody, a codec by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import horovod.tensorflow as horovod
import numpy as np
import tensorflow as tf
from horovod.tensorflow import mpi_ops

from ..averaging import ExchangeConfig
from ..averaging.channel import plan_channel
from ..averaging.together import NO_ERROR, refused_together
from ..averaging.vector import FlatLayout
from ..codecs.base import Codec, check_key
from ..errors import ArgumentError, DesynchronizedError
from ..exchange.base import NonFinitePolicy
from ..exchange.carriers import Bytes
from ..exchange.handshake import HANDSHAKE_TIMEOUT_SECONDS, verify_same
from ..exchange.wire import format_by_rank
from .carrier import HorovodCarrier
from .compression import Compression, vector_codec_of
from .graph import GraphChannel, Problems, Round
from .library import ops
from .meeting import MeetingPoint
from .places import short_name
from .traced import Traced, Turns, after, as_written, counter, outside_of_graphs, run_once
from .variables import DTYPES, VariableSpec, name_of, unwrap


def encode(values: tf.Tensor, codec: Codec, key: int | tf.Tensor = 0, *, shared_key: int | tf.Tensor = 0) -> tf.Tensor:
    """Return the payload of a tensor: the bytes that ``codec.encode`` makes of its elements, in row-major order.

    Args:
        values: float16, bfloat16, float32 or float64, any shape.
        codec: one of :mod:`pqasgd_horovod.codecs`.
        key: 64-bit key of all random numbers, an integer or a uint64 scalar.
        shared_key: likewise, of what all ranks draw alike; only ``randomk`` does.

    Returns:
        uint8 vector of ``codec.payload_nbytes`` of the number of elements.

    Raises tf.errors.InvalidArgumentError for NaN, Inf and numbers beyond the codec's range.

    >>> import tensorflow as tf, pqasgd_horovod.tensorflow as hvd
    >>> from pqasgd_horovod import codecs
    >>> hvd.encode(tf.constant([1.0, -2.0]), codecs.fp16()).numpy().tobytes().hex()
    '003c00c0'
    """
    return ops.pqasgd_encode(
        values=values, key=_key(key), shared_key=_key(shared_key, "shared_key"), codec=list(codec.native_spec)
    )


def decode_add(
    payload: tf.Tensor,
    destination: Any,
    codec: Codec,
    key: int | tf.Tensor = 0,
    weight: float | tf.Tensor = 1.0,
    *,
    shared_key: int | tf.Tensor = 0,
) -> tf.Tensor | None:
    """Add ``weight`` times the decoded payload to ``destination``.

    Args:
        payload: uint8 vector from :func:`encode` with the same keys.
        destination: float16, bfloat16, float32 or float64, any shape. A variable is changed in place; of a tensor a new
            one is returned. The decoded numbers are float32; they are added in float32, or in float64, and the sum is
            rounded to the type of the destination.
        codec: the codec of the payload.
        key: the 64-bit key of the payload.
        weight: finite number.
        shared_key: the 64-bit key that all ranks share.

    Returns:
        The sum, or None if ``destination`` is a variable.

    Raises ArgumentError for another type, tf.errors.DataLossError if the payload is truncated or corrupted.

    >>> import tensorflow as tf, pqasgd_horovod.tensorflow as hvd
    >>> from pqasgd_horovod import codecs
    >>> total = tf.Variable([1.0, 1.0])
    >>> hvd.decode_add(hvd.encode(tf.constant([2.0, 4.0]), codecs.none()), total, codecs.none(), weight=0.5)
    >>> total.numpy()
    array([2., 3.], dtype=float32)
    """
    own = unwrap(destination)
    if not isinstance(own, tf.Variable):
        own = tf.convert_to_tensor(own)
    if own.dtype not in DTYPES:
        raise ArgumentError(
            f"destination has dtype {own.dtype.name}; it must be {', '.join(dtype.name for dtype in DTYPES)}"
        )
    options = {
        "payload": payload,
        "key": _key(key),
        "shared_key": _key(shared_key, "shared_key"),
        "weight": weight,
        "codec": list(codec.native_spec),
    }
    is_variable = isinstance(own, tf.Variable)
    if is_variable and own.dtype == tf.float32 and short_name(own.device).startswith("CPU"):
        ops.pqasgd_decode_add_variable(destination=own.handle, **options)
        return None
    value = own.value() if is_variable else own
    if own.dtype == tf.float32:
        total = ops.pqasgd_decode_add(destination=value, **options)
    elif own.dtype == tf.float64:
        total = value + tf.cast(ops.pqasgd_decode_add(destination=tf.zeros(own.shape), **options), tf.float64)
    else:
        total = tf.cast(ops.pqasgd_decode_add(destination=tf.cast(value, tf.float32), **options), own.dtype)
    if not is_variable:
        return total
    own.assign(total)
    return None


def _key(key: int | tf.Tensor, name: str = "key") -> tf.Tensor:
    return key if tf.is_tensor(key) else tf.constant(check_key(key, name), tf.uint64)


# Horovod moves none of these: the same bits as another type are as good.
_CARRIED_AS = {tf.bfloat16: tf.int16, tf.uint32: tf.int32, tf.uint64: tf.int64}


def broadcast_variables(
    variables: Any, root_rank: int, process_set: Any = horovod.global_process_set, inplace: bool = False
) -> None:
    """Copy variables, of Keras 3 or of TensorFlow, from one rank to all; collective.

    Args:
        variables: a list; the same names, types and shapes on every rank. States of Keras' random generators are left
            alone: ranks are to draw different dropout masks.
        root_rank: the rank whose values everybody gets.
        process_set: the ranks that take part.
        inplace: accepted for Horovod's sake; the result is the same.

    Raises MismatchError on every rank if the lists differ, ArgumentError if no rank of the set is ``root_rank``.

    >>> import tensorflow as tf, pqasgd_horovod.tensorflow as hvd
    >>> hvd.init()
    >>> hvd.broadcast_variables([tf.Variable(1.0)], root_rank=0)
    """
    chosen = [variable for variable in variables if not name_of(variable).endswith("seed_generator_state")]
    carrier = HorovodCarrier(process_set)
    name = "pqasgd.broadcast_variables"
    kinds = [f"{name_of(v)}: {tf.as_dtype(unwrap(v).dtype).name} {list(unwrap(v).shape)}" for v in chosen]
    if carrier.size > 1:
        verify_same(carrier, {"root_rank": root_rank, "variables": kinds}, name)
    if root_rank not in process_set.ranks:
        raise ArgumentError(f"root_rank is {root_rank!r}; it must be one of the ranks {list(process_set.ranks)}")
    if carrier.size == 1 or not chosen:
        return

    def copy() -> None:
        for i, variable in enumerate(map(unwrap, chosen)):
            value = variable.value()
            carrying = _CARRIED_AS.get(value.dtype, value.dtype)
            carried = tf.cast(value, tf.uint8) if value.dtype == tf.bool else tf.bitcast(value, carrying)
            received = mpi_ops.broadcast(
                carried, root_rank, name=f"{name}.{i}", ignore_name_scope=True, process_set=process_set
            )
            bits = tf.cast(received, tf.bool) if value.dtype == tf.bool else tf.bitcast(received, value.dtype)
            variable.assign(bits)

    run_once(copy)


_allreduces: dict[tuple[Any, ...], _Allreduce] = {}
_turns: dict[tuple[Any, ...], Turns] = {}


@as_written
def compressed_allreduce(
    tensor: tf.Tensor,
    compression: Any = None,
    name: str | None = None,
    op: Any = horovod.Average,
    process_set: Any = horovod.global_process_set,
    *,
    second_compression: Any = None,
    exchange: str = "auto",
    seed: int = 0,
    nonfinite: NonFinitePolicy = "raise",
) -> tf.Tensor:
    r"""Return :math:`\frac1n \sum_i Q(x_i)`, or the sum, of a tensor; bit-identical on every rank.

    Works eagerly and in a ``tf.function``. Calls of one name with one configuration share their buffers and draw their
    rounding noise one after the other.

    Args:
        tensor: float16, bfloat16, float32 or float64, any fixed shape; the same type and shape on every rank.
        compression: one of :class:`Compression`; by default 4 bits.
        name: matches the call between ranks. Calls of one name, or of none, take turns, in their order; in a traced
            function those of other names run side by side.
        op: ``Average`` or ``Sum``.
        process_set: the ranks that take part.
        second_compression: see ``DistributedOptimizer``, as for the following.
        exchange: ``"auto"``, ``"allgather"`` or ``"two_phase"``.
        seed: of the rounding noise.
        nonfinite: ``"raise"`` or ``"propagate"``.

    Returns:
        A tensor like ``tensor``.

    Raises ArgumentError for values that are not allowed, MismatchError on every rank if the ranks were given different
    ones, NonFiniteError on every rank if any has NaN or Inf; in a graph these are ``tf.errors.OpError`` with the same
    text.

    >>> import tensorflow as tf, pqasgd_horovod.tensorflow as hvd
    >>> hvd.init()
    >>> hvd.compressed_allreduce(tf.ones((2, 3)), compression=hvd.Compression.eden(bits=2)).shape
    TensorShape([2, 3])
    """
    carrier = HorovodCarrier(process_set)
    label = f"pqasgd.allreduce.{'noname' if name is None else f'named.{name}'}"

    def tell(refusal: Mapping[str, Any]) -> None:
        with outside_of_graphs():
            _meet_with_new(carrier, label)
            verify_same(carrier, refusal, label)

    with refused_together(tell if carrier.size > 1 else None):
        codec = vector_codec_of(Compression.quantize(bits=4) if compression is None else compression)
        second_codec = None if second_compression is None else vector_codec_of(second_compression, "second_compression")
        if codec is None or (second_compression is not None and second_codec is None):
            raise ArgumentError(
                f"compression is {compression!r}; it must be one of pqasgd_horovod.tensorflow.Compression"
            )
        if op not in (horovod.Average, horovod.Sum):
            raise ArgumentError(f"op is {op}; it must be hvd.Average or hvd.Sum")
        tensor = tf.convert_to_tensor(tensor)
        if tensor.dtype not in DTYPES or not tensor.shape.is_fully_defined():
            raise ArgumentError(
                f"tensor has dtype {tensor.dtype.name} and shape {tensor.shape}; it must have a fixed shape and be "
                f"{', '.join(dtype.name for dtype in DTYPES)}"
            )
        config = ExchangeConfig(codec, second_codec, exchange, small_tensor_threshold=0, seed=seed, nonfinite=nonfinite)
    if carrier.size == 1 or tensor.shape.num_elements() == 0:
        return tf.identity(tensor)
    identity = (label, tuple(process_set.ranks), tensor.dtype, tuple(tensor.shape), config, op)
    if identity not in _allreduces:
        with outside_of_graphs():
            _allreduces[identity] = _Allreduce(tensor, carrier, config, op, label)
    allreduce = _allreduces[identity]
    return allreduce.traced(allreduce.run, tensor)


_NEW = -1  # no digest


def _meet_with_new(carrier: HorovodCarrier, name: str) -> MeetingPoint:
    """Say that this rank has a new tensor, where others may be about to exchange one that they know."""
    meeting = MeetingPoint(carrier, f"{name}.meeting", lambda data: _check_calls(name, data))
    meeting.tell([_NEW, 0], HANDSHAKE_TIMEOUT_SECONDS)
    return meeting


def _check_calls(name: str, data: Bytes) -> None:
    records = data.view(np.int64).reshape(-1, 2).tolist()
    if all(record == records[0] for record in records):
        return
    listing = format_by_rank(
        (rank, "a new tensor" if digest == _NEW else f"call {calls} of {digest:016x}")
        for rank, (digest, calls) in enumerate(records)
    )
    raise DesynchronizedError(
        f"{name}: the ranks do not make the same calls of compressed_allreduce: {listing}. Give each call a "
        "name, and make the same ones in the same order on every rank, with the same tensors and settings"
    )


class _Allreduce:
    """All calls of one name with one configuration."""

    def __init__(self, tensor: tf.Tensor, carrier: HorovodCarrier, config: ExchangeConfig, op: Any, name: str) -> None:
        kind = f"{tensor.dtype.name} {tensor.shape.as_list()}"
        shape = tuple(tensor.shape.as_list())
        spec = VariableSpec(name, DTYPES[tensor.dtype], math.prod(shape), shape, kind)
        self.traced = Traced()
        description = {**NO_ERROR, "tensor": kind, "op": str(op), "exchange": config.config()}
        self._turns = _turns.setdefault((name, tuple(carrier.process_set.ranks)), Turns())
        self._meeting = _meet_with_new(carrier, name)
        digest = verify_same(carrier, description, name)
        ((way, specs),) = config.by_way([spec])
        plan = plan_channel(FlatLayout(specs), config, way, name=name, index=0, size=carrier.size)
        self._problems = Problems(name, config.nonfinite)
        self._channel = GraphChannel(plan, carrier, digest, self._problems, None)
        self._calls = counter("calls")
        self._factor = float(carrier.size) if op == horovod.Sum else 1.0
        self._digest = digest & 2**63 - 1

    def run(self, tensor: tf.Tensor) -> tf.Tensor:
        """Exchange one tensor."""
        with after(self._turns.begin()):
            calls = self._calls.value()
        with after(self._meeting.agree(tf.stack([tf.constant(self._digest, tf.int64), calls]))):
            counted = self._calls.assign_add(1)
            flags = self._channel.exchange([tensor], Round(calls, calls))
        with after(self._problems.verdict(flags), counted):
            result = self._channel.means([tensor], self._factor)[0]
        self._turns.end(result)
        return result
