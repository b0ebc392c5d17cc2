"""Functions beside the optimizer: an averaged tensor, and optimizer state for everybody."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import horovod.torch as horovod
import numpy as np
import torch

from .. import native
from ..averaging import ExchangeConfig, state
from ..averaging.together import NO_ERROR, refused_together, succeed_together
from ..errors import ArgumentError
from ..exchange import cut_buckets, describe_exchange, make_exchange, verify_and_place
from ..exchange.base import NonFinitePolicy
from ..exchange.layout import shard_alignment
from . import devices
from .carrier import HorovodCarrier
from .compression import Compression, vector_codec_of
from .tensors import DEVICE_TYPES, DTYPES, describe
from .wrapping import STATE_KEY, export_state, to_arrays

_calls: collections.Counter[tuple[tuple[int, ...], str]] = collections.Counter()


def compressed_allreduce(
    tensor: torch.Tensor,
    compression: Any = None,
    name: str | None = None,
    op: Any = horovod.Average,
    process_set: Any = horovod.global_process_set,
    *,
    second_compression: Any = None,
    exchange: str = "auto",
    seed: int = 0,
    nonfinite: NonFinitePolicy = "raise",
) -> torch.Tensor:
    r"""Return :math:`\frac1n \sum_i Q(x_i)`, or the sum, of a tensor; bit-identical on every rank.

    Args:
        tensor: float16, bfloat16, float32 or float64, any shape, on the CPU or a GPU of CUDA's; the same
            type and shape on every rank. It is not changed.
        compression: one of :class:`Compression`; by default 4 bits.
        name: matches the call between ranks; by default the calls without a name are counted.
        op: ``Average`` or ``Sum``.
        process_set: the ranks that take part.
        second_compression: see :func:`DistributedOptimizer`, as for the following.
        exchange: ``"auto"``, ``"allgather"`` or ``"two_phase"``.
        seed: of the rounding noise.
        nonfinite: ``"raise"`` or ``"propagate"``.

    Returns:
        A new tensor like ``tensor``.

    Raises ArgumentError for values that are not allowed, MismatchError on every rank if the ranks were given different
    ones (they are compared in each call), NonFiniteError on every rank if any has NaN or Inf.

    >>> import torch, pqasgd_horovod.torch as hvd
    >>> hvd.init()
    >>> hvd.compressed_allreduce(torch.ones(2, 3), compression=hvd.Compression.eden(bits=2)).shape
    torch.Size([2, 3])
    """
    carrier = HorovodCarrier(process_set)
    name = f"pqasgd.allreduce.{'noname' if name is None else f'named.{name}'}"
    # Only the ranks of a process set count its calls.
    counter = (tuple(process_set.ranks), name)
    call = _calls[counter]
    _calls[counter] += 1

    def tell(refusal: Mapping[str, Any]) -> None:
        verify_and_place(carrier, refusal, None, name)

    with refused_together(tell if carrier.size > 1 else None):
        codec = vector_codec_of(Compression.quantize(bits=4) if compression is None else compression)
        second_codec = None if second_compression is None else vector_codec_of(second_compression, "second_compression")
        if codec is None or (second_compression is not None and second_codec is None):
            raise ArgumentError(f"compression is {compression!r}; it must be one of pqasgd_horovod.torch.Compression")
        if op not in (horovod.Average, horovod.Sum):
            raise ArgumentError(f"op is {op}; it must be hvd.Average or hvd.Sum")
        if not isinstance(tensor, torch.Tensor):
            raise ArgumentError(f"tensor is a {type(tensor).__name__}; it must be a torch.Tensor")
        if tensor.device.type not in DEVICE_TYPES or tensor.layout != torch.strided or tensor.dtype not in DTYPES:
            raise ArgumentError(
                f"tensor is {tensor.layout} {tensor.dtype} on {tensor.device}; it must be a dense tensor, on the CPU "
                f"or on a GPU of CUDA's, of {', '.join(map(str, DTYPES))}"
            )
        config = ExchangeConfig(codec, second_codec, exchange, seed=seed, nonfinite=nonfinite)
        result = tensor.detach().clone(memory_format=torch.contiguous_format)
        if carrier.size == 1:
            return result
        alignment = shard_alignment(codec, second_codec or codec.for_means)
        sizes = cut_buckets(result.numel(), alignment, config.bucket_cap_bytes)
        device = devices.device_of(result)
        means = [native.zeros(size, device=device) for size in sizes]
    options: dict[str, Any] = {"seed": seed, "method": exchange, "second_codec": second_codec, "nonfinite": nonfinite}
    description = {
        **NO_ERROR,
        "tensor": describe(result),
        "op": str(op),
        "call": call,
        **describe_exchange(codec, sizes, **options),
    }
    digest, device_messages = verify_and_place(carrier, description, device, name)
    with succeed_together(carrier, f"{name}.memory"):
        averaging = make_exchange(
            codec,
            carrier,
            sizes,
            name=name,
            digest=digest,
            device=device,
            device_messages=device_messages,
            **options,
        )
    segments = [(result.data_ptr(), DTYPES[result.dtype], result.numel())]
    memory = native.Source(segments, owner=result, device=device)
    starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    for bucket, start in enumerate(starts[:-1]):
        averaging.begin(bucket, memory, start, step=call, round=call)
        averaging.advance()
    averaging.finish(means)
    for mean, start in zip(means, starts[:-1], strict=True):
        if op == horovod.Sum:
            np.multiply(mean, np.float32(carrier.size), out=mean)
        native.apply(mean, start, memory)
    return result


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer, root_rank: int, model: torch.nn.Module | None = None
) -> None:
    """Copy the state of an optimizer from one rank to all; collective.

    Horovod's function of this name, and for an optimizer of this package also its counters and anchor, so that a
    checkpoint may be loaded on ``root_rank`` only.

    >>> import torch, pqasgd_horovod.torch as hvd
    >>> hvd.init()
    >>> optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1, momentum=0.9)
    >>> hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    """
    horovod.broadcast_optimizer_state(optimizer, root_rank, model)
    averager = getattr(optimizer, "_averager", None)
    if averager is not None:
        of_root = horovod.broadcast_object(averager.state_dict(), root_rank, name="pqasgd.broadcast_optimizer_state")
        averager.load_state_dict(of_root, keep_residuals=True)


def combine_states(state_dicts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one optimizer state, for a world of any size, of the ``state_dict()`` of every rank of a world.

    The residuals of error feedback are added up, so that what was not sent yet is still in the mean; see
    :func:`pqasgd_horovod.averaging.state.combine_states`. The rest, momentum too, is that of the first.

    Raises ArgumentError unless there is one state of each rank, of the same step.

    >>> import torch, pqasgd_horovod.torch as hvd
    >>> hvd.init()
    >>> model = torch.nn.Linear(100, 20)
    >>> optimizer = hvd.DistributedOptimizer(
    ...     torch.optim.SGD(model.parameters(), lr=0.1),
    ...     compression=hvd.Compression.quantize(bits=2),
    ...     period=8,
    ...     feedback=hvd.Feedback(),
    ... )
    >>> optimizer.load_state_dict(hvd.combine_states([optimizer.state_dict()]))
    """
    lacking = [i for i, saved in enumerate(state_dicts) if STATE_KEY not in saved]
    if lacking:
        raise ArgumentError(f"state_dicts{lacking} have no {STATE_KEY!r}: they are not of optimizers of this package")
    combined = state.combine_states([to_arrays(saved[STATE_KEY]) for saved in state_dicts])
    return {**state_dicts[0], STATE_KEY: export_state(combined)}
