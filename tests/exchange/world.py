"""What the exchange tests share: the specification of a mean in NumPy, and carriers that observe or do harm."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from hypothesis import HealthCheck, settings

from pqasgd_horovod import codecs, native
from pqasgd_horovod.codecs import Codec
from pqasgd_horovod.exchange import Exchange, make_exchange
from pqasgd_horovod.exchange.carriers.threads import ThreadCarrier
from pqasgd_horovod.exchange.layout import cut_shards, shard_alignment
from pqasgd_horovod.keys import derive_key, derive_shared_key

METHODS = ("allgather", "two_phase")
SEED = 2**63 + 11
DIGEST = 0xFEEDFACECAFEBEEF

# Every codec, with blocks so small that small vectors have many, and a last short one.
CODECS = {
    "none": codecs.none(),
    "fp16": codecs.fp16(),
    "bf16": codecs.bf16(),
    "maxscale4": codecs.maxscale(bits=4, block_size=128),
    "maxscale8": codecs.maxscale(bits=8, block_size=64),
    "qsgd4": codecs.qsgd(bits=4, block_size=128),
    "terngrad": codecs.terngrad(block_size=128),
    "eden1": codecs.eden(bits=1, block_size=128),
    "eden4": codecs.eden(bits=4, block_size=128),
    "eden3-stochastic": codecs.eden(bits=3, block_size=64, rounding="stochastic"),
    "natural": codecs.natural(),
    "onebit": codecs.onebit(block_size=128),
    "signsgd": codecs.signsgd(block_size=128),
    "signs": codecs.signsgd(block_size=128, scaled=False),
    "votes": codecs.signsgd(block_size=128, majority_vote=True),
    "topk": codecs.topk(density=0.05, block_size=128),
    "topk-eden4": codecs.topk(density=0.25, values=codecs.eden(bits=4, block_size=64), block_size=128),
    "threshold": codecs.threshold(1.0, density=0.2, values=codecs.fp16(), block_size=128),
    "randomk": codecs.randomk(density=0.1, block_size=128),
    "randomk-scaled": codecs.randomk(
        density=0.2, values=codecs.maxscale(bits=4, block_size=64), scaled=True, block_size=128
    ),
}
# Carriers do not look into payloads: under mpirun a few codecs stand for all.
MPI_CODECS = {name: CODECS[name] for name in ("none", "maxscale4", "eden4")}


def make_values(size: int, buckets: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    """Return the flat float32 vector of each rank."""
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(sum(buckets)).astype(np.float32) for _ in range(size)]


def reference_mean(
    method: str,
    codec: Codec,
    second_codec: Codec | None,
    buckets: Sequence[int],
    values: Sequence[np.ndarray],
    step: int,
    seed: int = SEED,
) -> list[np.ndarray]:
    """Return the mean of each bucket by the codecs' NumPy specifications, one rank and one shard after the other."""
    size = len(values)
    weight = np.float32(1.0 / size)
    second = second_codec or codec.for_means
    means = []
    start = 0
    for bucket, num_elements in enumerate(buckets):
        parts = [vector[start : start + num_elements] for vector in values]
        start += num_elements
        mean = np.zeros(num_elements, np.float32)
        if method == "allgather":
            for rank, part in enumerate(parts):
                key, shared = derive_key(seed, rank, step, bucket, 0), derive_shared_key(seed, step, bucket)
                payload = codec.reference_encode(part, key, shared_key=shared)
                codec.reference_decode_add(payload, mean, key, weight, shared_key=shared)
        else:
            weight = weight if second.keeps_scale else np.float32(1)
            for owner, shard in enumerate(cut_shards(num_elements, size, shard_alignment(codec, second))):
                tensor = bucket * size + owner
                shared = derive_shared_key(seed, step, tensor)
                total = np.zeros(shard.num_elements, np.float32)
                for rank, part in enumerate(parts):
                    piece = part[shard.start : shard.stop]
                    key = derive_key(seed, rank, step, tensor, 0)
                    if rank == owner:
                        total += codec.own_part(piece, shared) * weight
                    else:
                        payload = codec.reference_encode(piece, key, shared_key=shared)
                        codec.reference_decode_add(payload, total, key, weight, shared_key=shared)
                key = derive_key(seed, owner, step, tensor, 1)
                payload = second.reference_encode(total, key, shared_key=shared)
                second.reference_decode_add(payload, mean[shard.start : shard.stop], key, shared_key=shared)
        means.append(mean)
    return means


def run_round(
    exchange: Exchange,
    values: np.ndarray,
    *,
    step: int = 0,
    round: int = 0,
    timeout: float | None = 20.0,
    order: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """Average ``values``, one flat vector of all buckets, and return the mean of each bucket."""
    source = native.Source.from_arrays([values])
    starts = np.concatenate([[0], np.cumsum(exchange.buckets)]).tolist()
    for bucket in order if order is not None else range(len(exchange.buckets)):
        exchange.begin(bucket, source, starts[bucket], step=step, round=round)
    means = [np.empty(num_elements, np.float32) for num_elements in exchange.buckets]
    exchange.finish(means, timeout)
    return means


def build(carrier: ThreadCarrier, codec: Codec, buckets: Sequence[int], **options: object) -> Exchange:
    """Make an exchange with the seed and the digest that the specification here uses."""
    settings = {"name": "test", "seed": SEED, "digest": DIGEST, **options}
    return make_exchange(codec, carrier, buckets, **settings)


def outcome(function: Callable[[], object]) -> tuple[str, str]:
    """Return the type and the text of the error that ``function`` raises, ("", "") if none."""
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def same_everywhere(means_of_ranks: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Assert that all ranks have bit-identical means, and return them."""
    first = means_of_ranks[0]
    for rank, means in enumerate(means_of_ranks):
        for bucket, (mean, expected) in enumerate(zip(means, first, strict=True)):
            assert mean.tobytes() == expected.tobytes(), f"rank {rank} differs from rank 0 in bucket {bucket}"
    return list(first)


# For Hypothesis on a busy machine: what is slow there is no fault.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


class _WrappedHandle:
    def __init__(self, carrier: WrappedCarrier, name: str, handle) -> None:
        self._carrier, self._name, self._handle = carrier, name, handle

    def done(self) -> bool:
        return self._carrier.may_arrive(self._name) and self._handle.done()

    def wait(self, timeout: float | None = None) -> np.ndarray:
        return self._carrier.on_receive(self._name, self._handle.wait(timeout))


class WrappedCarrier:
    """A carrier whose traffic a test can watch, hold up or change."""

    def __init__(self, inner: ThreadCarrier) -> None:
        self.inner = inner
        self.rank, self.size = inner.rank, inner.size
        self.log: list[tuple[str, str, int, tuple[int, ...], int]] = []
        self.gated = False
        self.released: set[str] = set()
        self.change_sent: Callable[[str, np.ndarray], np.ndarray] | None = None
        self.change_received: Callable[[str, np.ndarray], np.ndarray] | None = None

    def may_arrive(self, name: str) -> bool:
        return not self.gated or name in self.released

    def on_receive(self, name: str, received: np.ndarray) -> np.ndarray:
        return self.change_received(name, received) if self.change_received else received

    def allgather(self, name: str, payload: np.ndarray) -> _WrappedHandle:
        self.log.append(("allgather", name, payload.size, (), payload.ctypes.data))
        payload = self.change_sent(name, payload) if self.change_sent else payload
        return _WrappedHandle(self, name, self.inner.allgather(name, payload))

    def alltoall(self, name: str, payload: np.ndarray, splits: Sequence[int]) -> _WrappedHandle:
        self.log.append(("alltoall", name, payload.size, tuple(splits), payload.ctypes.data))
        payload = self.change_sent(name, payload) if self.change_sent else payload
        return _WrappedHandle(self, name, self.inner.alltoall(name, payload, splits))
