"""Where things are: a flat vector is cut into buckets, a bucket into one shard per rank.

Cuts fall on multiples of the codec's block, so that cutting adds no short blocks; blocks are dealt out evenly. Pure
arithmetic: every rank computes the same layout from the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..codecs.base import Codec
from ..errors import ArgumentError

DEFAULT_BUCKET_CAP_BYTES = 8 * 2**20


class Span(NamedTuple):
    """``num_elements`` consecutive elements from ``start``."""

    start: int
    num_elements: int

    @property
    def stop(self) -> int:
        """The element after the last one."""
        return self.start + self.num_elements


def deal(num_elements: int, parts: int, block_size: int) -> list[Span]:
    """Cut a vector into ``parts`` spans of whole blocks, equal up to one block, the larger ones first."""
    num_blocks = -(-num_elements // block_size)
    spans = []
    start = 0
    for part in range(parts):
        blocks = num_blocks // parts + (part < num_blocks % parts)
        stop = min(num_elements, start + blocks * block_size)
        spans.append(Span(start, stop - start))
        start = stop
    return spans


def cut_buckets(num_elements: int, block_size: int, bucket_cap_bytes: int = DEFAULT_BUCKET_CAP_BYTES) -> list[int]:
    """Return the sizes, in elements, of as few buckets as hold at most ``bucket_cap_bytes`` of float32 each.

    They are of the same size up to one block. A bucket is at least one block. Fewer, larger buckets cost fewer
    messages; more, smaller ones overlap coding with sending.

    >>> cut_buckets(10_000, block_size=1024, bucket_cap_bytes=4 * 4096)
    [4096, 3072, 2832]
    """
    if num_elements < 0:
        raise ArgumentError(f"num_elements has to be at least 0, got {num_elements}")
    if block_size < 1:
        raise ArgumentError(f"block_size has to be at least 1, got {block_size}")
    if bucket_cap_bytes < 1:
        raise ArgumentError(f"bucket_cap_bytes has to be at least 1, got {bucket_cap_bytes}")
    blocks_per_bucket = max(1, bucket_cap_bytes // (4 * block_size))
    num_blocks = -(-num_elements // block_size)
    return [span.num_elements for span in deal(num_elements, -(-num_blocks // blocks_per_bucket), block_size)]


def join_tensors(sizes: Sequence[int], bucket_cap_bytes: int = DEFAULT_BUCKET_CAP_BYTES) -> list[int]:
    """Return the sizes, in elements, of buckets of whole tensors, neighbours of at most ``bucket_cap_bytes`` together.

    A tensor that is larger has a bucket of its own.

    >>> join_tensors([100, 200, 5000, 300], bucket_cap_bytes=4 * 1024)
    [300, 5000, 300]
    """
    buckets: list[int] = []
    for size in sizes:
        if buckets and 4 * (buckets[-1] + size) <= bucket_cap_bytes:
            buckets[-1] += size
        else:
            buckets.append(size)
    return buckets


def shard_alignment(codec: Codec, second_codec: Codec) -> int:
    """Return the block on whose multiples shards are cut.

    It suits both codecs if one's block divides the other's, else the first codec: then each shard costs phase two a
    short block.
    """
    larger, smaller = max(codec.block_size, second_codec.block_size), min(codec.block_size, second_codec.block_size)
    return larger if larger % smaller == 0 else codec.block_size


def cut_shards(num_elements: int, size: int, block_size: int) -> list[Span]:
    """Return the shard of each of ``size`` ranks; the last ones are empty where there are fewer blocks than ranks.

    >>> cut_shards(5000, size=3, block_size=1024)
    [Span(start=0, num_elements=2048), Span(start=2048, num_elements=2048), Span(start=4096, num_elements=904)]
    >>> [shard.num_elements for shard in cut_shards(1, size=3, block_size=1024)]
    [1, 0, 0]
    """
    if size < 1:
        raise ArgumentError(f"size has to be at least 1, got {size}")
    return deal(num_elements, size, block_size)


def shard_limits(shards: Sequence[Span]) -> list[int]:
    """Return where each shard begins, and where the last one ends.

    >>> shard_limits(cut_shards(5000, size=3, block_size=1024))
    [0, 2048, 4096, 5000]
    """
    return [0, *(shard.stop for shard in shards)]
