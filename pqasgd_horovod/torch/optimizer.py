"""``DistributedOptimizer``: which optimizer is built for which arguments."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, TypeVar

import horovod.torch as horovod
import torch
from horovod.torch.optimizer import _DistributedOptimizer

from ..averaging import ExchangeConfig, PeriodicAveraging
from ..averaging.config import DEFAULT_SMALL_TENSOR_THRESHOLD
from ..averaging.construction import Membership, check_timeout, construct_together
from ..averaging.devices import check_anchor_device
from ..averaging.feedback import Feedback, check_no_momentum, check_not_stock
from ..averaging.policy import make_policy
from ..averaging.schedule import Schedule
from ..averaging.strategy import resolve_averaging
from ..codecs.base import Scheme, check_flag, check_integer
from ..errors import ArgumentError
from ..exchange import DEFAULT_BUCKET_CAP_BYTES
from ..exchange.base import NonFinitePolicy
from .carrier import HorovodCarrier
from .compression import CodecCompressor, Compression, codec_of, vector_codec_of
from .devices import check_common_device
from .moments import check_has_moments
from .outer import describe_outer
from .periodic import PeriodicMethods
from .quantized import GradientMethods
from .stock import build_stock
from .tensors import find_model
from .wrapping import CommonMethods, Settings, build, describe_parameters, momenta_of, parameters_of

logger = logging.getLogger("pqasgd_horovod")

Found = TypeVar("Found", bound=Scheme)


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Any = None,
    compression: Any = Compression.none,
    backward_passes_per_step: int = 1,
    op: Any = horovod.Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | Sequence[Sequence[torch.Tensor]] | None = None,
    sparse_as_dense: bool = False,
    process_set: Any = horovod.global_process_set,
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
    anchor_device: str | None = None,
    model: torch.nn.Module | None = None,
    check_consistency: bool = False,
    flush_timeout: float | None = 60.0,
) -> Any:
    r"""Wrap an optimizer so that it trains on all ranks, and sends little.

    With ``period=1`` gradients are averaged before each step: by Horovod itself if the codec commutes with a sum
    (``none``, ``fp16``), else :math:`g \leftarrow \frac1n \sum_i Q(g_i)`, exchanged while backward runs. With
    ``period=p`` each step is local, and every ``p`` of them :math:`a \leftarrow a + \frac1n \sum_i Q(x_i - a)`,
    :math:`x_i \leftarrow a`, where the anchor :math:`a` is the last common model.

    Args:
        optimizer: any torch optimizer, not wrapped yet. Parameters in float16, bfloat16, float32 or float64, all on the
            CPU or all on one GPU of CUDA's; they may move until the first step. Hyper-parameters and state are taken
            over. As in Horovod hooks are not, nor are attributes that a class of your own sets: register and set them
            afterwards. Such a class has to be one that can be made of parameter groups alone.
        named_parameters: ``model.named_parameters()``. If it is that very generator the model's buffers are found
            through it.
        compression: what bytes stand for the numbers: one of :class:`Compression`.
        backward_passes_per_step: backward passes that accumulate before one ``step()``, as in Horovod; with
            ``period>1`` any number may.
        op: ``Average`` or ``Sum`` of gradients. ``Sum`` needs ``period=1``; ``Adasum`` needs stock compression too,
            since it combines gradients pairwise and not by a mean.
        gradient_predivide_factor: as in Horovod where Horovod averages. Elsewhere numbers are averaged in float32 after
            decoding, and dividing before and multiplying after would cancel.
        num_groups: as ``groups``.
        groups: as in Horovod where Horovod averages. Elsewhere gradients are fused in buckets of
            ``bucket_cap_mb`` anyway.
        sparse_as_dense: send sparse gradients as dense, coded ones. Otherwise the rows that a rank has used are coded,
            and sent to every other rank with their numbers. Dense ones are fewer bytes where each of n ranks uses more
            than about 2/n of the rows in a step. (With ``period>1`` gradients are not sent at all.)
        process_set: the ranks that train together.
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
        nonfinite: ``"raise"``: NaN or Inf in what any rank sends raises NonFiniteError on every rank, before anything
            changes. ``"propagate"``: the mean becomes NaN on every rank; with ``period=1`` GradScaler needs this, and
            then skips the step on all ranks alike.
        feedback: None, or :class:`Feedback`: what a contraction such as ``topk`` did not send is added to what is sent
            next. Or :class:`MomentumCorrection`, for gradients and an optimizer without momentum: DGC.
        policy: which compression for which parameters: a list of pairs of a pattern and one of :class:`Compression`, of
            which the first that matches decides. A pattern is a glob on the parameter's name (``"*.bias"``),
            ``larger_than(n)`` or ``smaller_than(n)`` elements, a function of name and shape that returns True or
            False, or ``...`` for all others. ``small_tensor_threshold`` and then ``compression`` are for what no
            pattern matches. Buffers travel uncompressed whatever it says.
        hierarchy: None, or ``"node"``: the ranks of a node first make their mean, uncompressed, and only that is coded
            and exchanged with other nodes, once for each node. Needs ``hvd.init(process_sets="dynamic")`` and as many
            ranks on each node. Bytes are then counted between nodes.
        anchor_device: where anchors, residuals and means of parameters on a GPU are kept with ``period>1``: None,
            beside them; ``"cpu"``: in host memory, for models that fill the GPU.
        model: where to find buffers if ``named_parameters`` does not tell.
        check_consistency: after each average compare the bits of all replicas (slow; for debugging).
        flush_timeout: seconds that ``state_dict()`` in the middle of a period waits for the other ranks; None: without
            end.

    Returns:
        An instance of a subclass of the optimizer's class, with ``synchronize()`` and ``skip_synchronize()`` as in
        Horovod, and ``flush()`` and ``communication_stats()``. ``state_dict()`` also holds counters and anchor; save it
        on every rank if inner state (momentum) is to resume bit-exactly, since that is local.

    Raises ArgumentError for values that are not allowed, and MismatchError on every rank if the ranks were given
    different ones.

    Source: P. Jiang and G. Agrawal, "A Linear Speedup Analysis of Distributed Deep Learning with Sparse and Quantized
    Communication", NeurIPS 2018.

    >>> import torch, pqasgd_horovod.torch as hvd
    >>> hvd.init()
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = hvd.DistributedOptimizer(
    ...     torch.optim.SGD(model.parameters(), lr=0.1),
    ...     named_parameters=model.named_parameters(),
    ...     compression=hvd.Compression.quantize(bits=4),
    ...     period=8,
    ... )
    >>> model(torch.ones(1, 4)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.communication_stats()["steps"]
    1
    """
    membership = Membership(horovod, process_set, HorovodCarrier)
    with construct_together(membership):
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ArgumentError(f"optimizer is a {type(optimizer).__name__}; it must be a torch.optim.Optimizer")
        if type(optimizer).__module__ == _DistributedOptimizer.__module__:
            raise ArgumentError("optimizer is a DistributedOptimizer already; pass the plain optimizer")
        check_integer("backward_passes_per_step", backward_passes_per_step, 1, 2**31)
        averaging = describe_outer(resolve_averaging(period, averaging))
        check_has_moments(optimizer, averaging.moments)
        check_anchor_device(anchor_device)
        _check_kinds(model, check_consistency)
        flush_timeout = check_timeout("flush_timeout", flush_timeout)
        check_common_device({f"parameter {i}": p for i, p in enumerate(parameters_of(optimizer))})
        codec = codec_of(compression)
        rules = make_policy(policy, codec_of)
        second_codec = None
        if second_compression is not None:
            second_codec = _require(
                vector_codec_of(second_compression, "second_compression"),
                second_compression,
                "second_compression",
                averaging,
            )
        if num_groups and groups is None:
            groups = num_groups
        if gradient_predivide_factor != 1.0 and op != horovod.Average:
            raise ArgumentError(
                f"gradient_predivide_factor is {gradient_predivide_factor} with op={op}; it needs op=hvd.Average"
            )
        stock = averaging.exchanges_gradients and not rules and (codec is None or codec.commutes_with_sum)
        if not stock:
            codec = _require(codec, compression, "compression", averaging)
            _check_op(op, averaging, optimizer)
        config = ExchangeConfig(
            codec=codec or Compression.none.codec,
            second_codec=second_codec,
            method=exchange,
            small_tensor_threshold=small_tensor_threshold,
            bucket_cap_mb=bucket_cap_mb,
            seed=seed,
            nonfinite=nonfinite,
            feedback=feedback,
            policy=rules,
            hierarchy=hierarchy,
        )
        for group in optimizer.param_groups:
            check_no_momentum(feedback, momenta_of(group))
        if stock:
            check_not_stock(feedback, compression, hierarchy)
        elif hierarchy is not None:
            membership.find_nodes()
        model = model if model is not None else find_model(named_parameters)
        settings = Settings(
            averaging, config, model, check_consistency, flush_timeout, op, process_set, membership, anchor_device
        )
        if not averaging.exchanges_gradients and averaging.buffers != "local" and model is None and horovod.rank() == 0:
            logger.warning(
                "named_parameters is not the generator model.named_parameters(), so the model's buffers are not known "
                "and BatchNorm statistics are not averaged: pass model=model, or "
                "averaging=PeriodicAveraging(period=%s, buffers='local') if that is meant",
                averaging.period,
            )
        arguments = (
            named_parameters,
            CodecCompressor(codec) if codec is not None else compression,
            backward_passes_per_step,
            op,
            gradient_predivide_factor,
            groups,
            sparse_as_dense,
            process_set,
        )
        if stock:
            itemsize = 2 if codec is not None and codec.id == "fp16" else None
            wrapped = build_stock(optimizer, itemsize, op, arguments, settings)
        else:
            methods = GradientMethods if averaging.exchanges_gradients else PeriodicMethods
            wrapped = build(
                optimizer, _DistributedOptimizer, CommonMethods, methods, arguments=arguments, settings=settings
            )
        membership.describe(
            type(optimizer).__name__,
            averaging,
            config,
            op=op,
            check_consistency=check_consistency,
            **describe_parameters(wrapped),
        )
    return wrapped


def _check_kinds(model: Any, check_consistency: Any) -> None:
    """What else would be noticed hours later, where it is used."""
    if model is not None and not isinstance(model, torch.nn.Module):
        raise ArgumentError(f"model is {model!r}; it must be None or a torch.nn.Module")
    check_flag("check_consistency", check_consistency)


def _require(codec: Found | None, compression: Any, argument: str, averaging: PeriodicAveraging) -> Found:
    if codec is None:
        raise ArgumentError(
            f"{argument} is {compression!r} with period={averaging.period}; a compressor of your own works with "
            "period=1 and no policy only, where Horovod averages: use one of pqasgd_horovod.torch.Compression"
        )
    return codec


def _check_op(op: Any, averaging: PeriodicAveraging, optimizer: torch.optim.Optimizer) -> None:
    if op == horovod.Average:
        if averaging.exchanges_gradients and isinstance(optimizer, torch.optim.LBFGS):
            raise ArgumentError(
                "optimizer is LBFGS with period=1; it decides by the local loss how often to compute gradients, which "
                "would differ between ranks: use period>1"
            )
        return
    if op == horovod.Adasum:
        raise ArgumentError(
            "op is Adasum; it combines gradients pairwise by their angles, which coded means cannot do: use "
            "op=hvd.Average"
        )
    if not averaging.exchanges_gradients:
        raise ArgumentError(
            f"op is {op} with period={averaging.period}; replicas can only be averaged: use op=hvd.Average"
        )
    if op != horovod.Sum:
        raise ArgumentError(f"op is {op}; it must be hvd.Average or hvd.Sum")
