"""Which exchange: the one that sends fewer bytes, unless the user has decided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..codecs.base import Codec
from ..codecs.cast import NoCompression
from ..errors import ArgumentError
from .allgather import AllgatherExchange
from .base import Exchange, NonFinitePolicy
from .carriers import Carrier
from .carriers.nodes import NodesCarrier
from .layout import cut_shards, shard_alignment
from .local import LocalExchange
from .node import NodeExchange
from .two_phase import TwoPhaseExchange
from .wire import HEADER_NBYTES

if TYPE_CHECKING:
    from ..native.cuda import Device

METHODS = ("auto", "allgather", "two_phase")


def bytes_of_rank(
    method: str, codec: Codec, second_codec: Codec | None, buckets: Sequence[int], size: int, rank: int
) -> tuple[int, int]:
    """Return the bytes that one of ``size`` ranks sends and receives in one round, headers included.

    With payloads P and P2 of the two codecs, and shards s_0 .. s_{n-1} of a bucket of d elements: ``(n-1) (64 +
    P(d))`` for ``"allgather"``, ``sum_{o != r} (64 + P(s_o)) + (n-1) (64 + P2(s_r))`` sent by rank r of
    ``"two_phase"``.

    >>> from pqasgd_horovod import codecs
    >>> bytes_of_rank("allgather", codecs.none(), None, [1000], size=3, rank=0)
    (8128, 8128)
    """
    return _bytes_of_ranks(method, codec, second_codec, buckets, size)[rank]


def bytes_per_round(method: str, codec: Codec, second_codec: Codec | None, buckets: Sequence[int], size: int) -> int:
    """Return the bytes that the busiest of ``size`` ranks sends in one round, headers included."""
    return max(sent for sent, _ in _bytes_of_ranks(method, codec, second_codec, buckets, size))


def _bytes_of_ranks(
    method: str, codec: Codec, second_codec: Codec | None, buckets: Sequence[int], size: int
) -> list[tuple[int, int]]:
    if method == "allgather" or size == 1:
        sent = (size - 1) * sum(HEADER_NBYTES + codec.payload_nbytes(num_elements) for num_elements in buckets)
        return [(sent, sent)] * size
    second = second_codec or codec.for_means
    totals = [(0, 0)] * size
    for num_elements in buckets:
        shards = [shard.num_elements for shard in cut_shards(num_elements, size, shard_alignment(codec, second))]
        # There are thousands of ranks, and few sizes of shards.
        nbytes = {
            shard: (HEADER_NBYTES + codec.payload_nbytes(shard), HEADER_NBYTES + second.payload_nbytes(shard))
            for shard in set(shards)
        }
        all_values, all_means = (sum(nbytes[shard][phase] for shard in shards) for phase in (0, 1))
        for rank, (sent, received) in enumerate(totals):
            values, means = nbytes[shards[rank]]
            totals[rank] = (
                sent + all_values - values + (size - 1) * means,
                received + (size - 1) * values + all_means - means,
            )
    return totals


def bytes_inside_node(bucket: int, num_elements: int, size: int, rank: int) -> int:
    """Return the bytes that one of the ``size`` ranks of a node sends, and receives, inside it for a bucket.

    The bucket is the work of rank ``bucket mod size``: each other one sends it its numbers as they are, and gets the
    mean; headers of messages that are empty are counted too.

    >>> [bytes_inside_node(0, 1000, size=3, rank=rank) for rank in range(3)]
    [8256, 4256, 4256]
    """
    others = size - 1
    copies = others if bucket % size == rank else min(1, others)
    return 2 * others * HEADER_NBYTES + copies * NoCompression().payload_nbytes(num_elements)


def check_method(
    method: str,
    codec: Codec,
    second_codec: Codec | None,
    names: tuple[str, str, str] = ("method", "codec", "second_codec"),
) -> None:
    """Raise ArgumentError unless the codecs are fit for the exchange, and for each other; ``names`` are the arguments'.

    >>> from pqasgd_horovod import codecs
    >>> check_method("two_phase", codecs.signsgd(scaled=False), codecs.fp16())
    >>> check_method("allgather", codecs.signsgd(majority_vote=True), None)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    pqasgd_horovod.errors.ArgumentError: method is 'allgather' with codec=SignSgd(...), which is for 'two_phase': ...
    """
    if method not in METHODS:
        raise ArgumentError(f"{names[0]} is {method!r}; it must be one of {', '.join(map(repr, METHODS))}")
    if second_codec is not None and codec.shared_selection is not None and second_codec.shared_selection is not None:
        same = second_codec.shared_selection == codec.shared_selection
        if not same or second_codec != second_codec.for_means:
            raise ArgumentError(
                f"{names[2]} is {second_codec} with {names[1]}={codec}; a mean has only the numbers of phase one, "
                f"which phase two must send as they are: leave {names[2]} out, take the same density and "
                "block_size without scaled=True, or a codec that sends all numbers"
            )
    needed = codec.exchange_method
    if second_codec is None or second_codec == codec:
        if needed is not None and method not in ("auto", needed):
            raise ArgumentError(
                f"{names[0]} is {method!r} with {names[1]}={codec}, which is for {needed!r}: {codec.exchange_reason}"
            )
    elif needed == "two_phase" or second_codec.exchange_method is not None:
        odd = codec if needed == "two_phase" else second_codec
        raise ArgumentError(
            f"{names[2]} is {second_codec} with {names[1]}={codec}; of these {odd} is not fit to be one of two codecs, "
            f"as {odd.exchange_reason}: leave {names[2]} out, or take another codec"
        )


def choose_exchange(codec: Codec, second_codec: Codec | None, num_elements: int | Sequence[int], size: int) -> str:
    """Return ``"allgather"`` or ``"two_phase"``: what the codec needs, or whichever sends less.

    If equal it is allgather, as it is less noisy.

    ``num_elements`` is that of a bucket, or a sequence with that of each. ``second_codec`` None stands for ``codec``.

    >>> from pqasgd_horovod import codecs
    >>> [choose_exchange(codecs.eden(bits=4), None, 2**20, size) for size in (2, 3, 8)]
    ['allgather', 'two_phase', 'two_phase']
    >>> choose_exchange(codecs.eden(bits=2), codecs.eden(bits=8), 2**20, 3)
    'allgather'
    """
    if codec.exchange_method is not None and second_codec in (None, codec):
        return codec.exchange_method
    buckets = [num_elements] if isinstance(num_elements, int) else num_elements
    allgather, two_phase = (
        bytes_per_round(method, codec, second_codec, buckets, size) for method in ("allgather", "two_phase")
    )
    return "two_phase" if two_phase < allgather else "allgather"


def num_parts(carrier: Carrier) -> int:
    """Return of how many equal parts a mean is made among the ranks of ``carrier``: ranks, or nodes if it has them."""
    return carrier.across.size if isinstance(carrier, NodesCarrier) else carrier.size


def make_exchange(
    codec: Codec,
    carrier: Carrier,
    buckets: Sequence[int],
    *,
    name: str,
    seed: int,
    digest: int,
    method: str = "auto",
    second_codec: Codec | None = None,
    nonfinite: NonFinitePolicy = "raise",
    feedback: bool = False,
    device: Device | None = None,
    device_messages: bool = False,
) -> Exchange:
    """Return the exchange of ``buckets`` (numbers of elements) among the ranks of ``carrier``.

    ``name`` begins the names of all its collectives; every exchange of a program has its own. ``seed`` keys the
    rounding noise. ``digest`` comes from :func:`~pqasgd_horovod.exchange.verify_same`; the arguments that have to
    agree are in :func:`describe_exchange`. ``method`` is ``"allgather"``, ``"two_phase"`` or ``"auto"`` (fewer
    bytes). ``second_codec`` codes phase two of ``"two_phase"``; more bits there mean less noise (:mod:`.two_phase`).
    ``nonfinite`` says what NaN and Inf do: ``"raise"`` on every rank, or ``"propagate"``: that bucket's mean is NaN
    on every rank. With ``feedback`` the owner of a shard keeps what the second coding loses, if there is one; what the
    first loses is the business of the source. With a ``device`` numbers are in memory that it reaches, and with
    ``device_messages``, which :func:`~.placement.verify_and_place` decides, messages are in its own. With a
    :class:`~.carriers.nodes.NodesCarrier` all this is between nodes.

    >>> import numpy as np
    >>> from pqasgd_horovod import codecs, native
    >>> from pqasgd_horovod.exchange.carriers.threads import run_ranks
    >>> def program(carrier):
    ...     exchange = make_exchange(codecs.none(), carrier, [2], name="example", seed=0, digest=0)
    ...     values = np.array([carrier.rank, 10], np.float32)
    ...     exchange.begin(0, native.Source.from_arrays([values]), 0, step=0, round=0)
    ...     mean = np.empty(2, np.float32)
    ...     exchange.finish([mean])
    ...     return mean.tolist()
    >>> run_ranks(2, program)
    [[0.5, 10.0], [0.5, 10.0]]
    """
    check_method(method, codec, second_codec)
    common: dict[str, Any] = {
        "name": name,
        "seed": seed,
        "digest": digest,
        "nonfinite": nonfinite,
        "device": device,
        "device_messages": device_messages,
    }
    if isinstance(carrier, NodesCarrier) and carrier.size > 1:
        local, across = carrier.local, carrier.across
        between = None
        if across.size > 1:
            between = make_exchange(
                codec, across, buckets[local.rank :: local.size], digest=digest, nonfinite=nonfinite,
                # Their buckets begin at 0 on every rank of a node: another seed keeps the rounding noise apart.
                name=f"{name}.across", seed=(seed + (local.rank << 32)) % 2**64,
                method=method if method != "auto" else choose_exchange(codec, second_codec, buckets, across.size),
                second_codec=second_codec, feedback=feedback, device=device, device_messages=device_messages,
            )  # fmt: skip
        return NodeExchange(carrier, buckets, between, **{**common, "name": f"{name}.node"})
    if carrier.size == 1:
        return LocalExchange(codec, carrier, buckets, **common)
    if method == "auto":
        method = choose_exchange(codec, second_codec, buckets, carrier.size)
    if method == "allgather":
        return AllgatherExchange(codec, carrier, buckets, **common)
    return TwoPhaseExchange(codec, carrier, buckets, second_codec=second_codec, feedback=feedback, **common)


def describe_exchange(
    codec: Codec,
    buckets: Sequence[int],
    *,
    seed: int,
    method: str = "auto",
    second_codec: Codec | None = None,
    nonfinite: NonFinitePolicy = "raise",
) -> dict[str, Any]:
    """Return what of an exchange has to be the same on every rank, for the handshake to compare.

    >>> from pqasgd_horovod import codecs
    >>> describe_exchange(codecs.terngrad(), [5], seed=1)["codec"]
    {'id': 'terngrad', 'block_size': 512}
    """
    return {
        "codec": codec.config(),
        "second_codec": None if second_codec is None else second_codec.config(),
        "method": method,
        "nonfinite": nonfinite,
        "seed": seed,
        "buckets": list(buckets),
    }
