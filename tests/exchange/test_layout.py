"""Cutting vectors into buckets and shards."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pqasgd_horovod import codecs
from pqasgd_horovod.errors import ArgumentError
from pqasgd_horovod.exchange.layout import cut_buckets, cut_shards, shard_alignment

from .world import PATIENT

BLOCKS = st.sampled_from([64, 128, 512, 1024])


@PATIENT
@given(num_elements=st.integers(0, 100_000), block_size=BLOCKS, cap=st.integers(1, 300_000))
def test_buckets_cover_the_vector_in_whole_blocks_of_even_size(num_elements, block_size, cap):
    buckets = cut_buckets(num_elements, block_size, cap)
    assert sum(buckets) == num_elements
    assert all(size > 0 for size in buckets)
    assert all(size % block_size == 0 for size in buckets[:-1])
    assert all(4 * size <= max(cap, 4 * block_size) for size in buckets)
    blocks = [-(-size // block_size) for size in buckets]
    assert max(blocks, default=0) - min(blocks, default=0) <= 1
    capacity = max(1, cap // (4 * block_size))
    assert len(buckets) == -(-sum(blocks) // capacity)


@PATIENT
@given(num_elements=st.integers(0, 100_000), size=st.integers(1, 20), block_size=BLOCKS)
def test_shards_cover_the_bucket_in_whole_blocks_of_even_size(num_elements, size, block_size):
    shards = cut_shards(num_elements, size, block_size)
    assert len(shards) == size
    assert shards[0].start == 0
    assert all(left.stop == right.start for left, right in itertools.pairwise(shards))
    assert shards[-1].stop == num_elements
    assert all(shard.start % block_size == 0 for shard in shards if shard.num_elements)
    blocks = [-(-shard.num_elements // block_size) for shard in shards]
    assert blocks == sorted(blocks, reverse=True)
    assert max(blocks) - min(blocks) <= 1


@pytest.mark.parametrize(
    ("first", "second", "expected"), [(64, 1024, 1024), (1024, 64, 1024), (192, 256, 192), (512, 512, 512)]
)
def test_shard_alignment(first, second, expected):
    assert shard_alignment(codecs.maxscale(block_size=first), codecs.maxscale(block_size=second)) == expected


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((-1, 64, 100), "num_elements has to be at least 0, got -1"),
        ((1, 0, 100), "block_size has to be at least 1, got 0"),
        ((1, 64, 0), "bucket_cap_bytes has to be at least 1, got 0"),
    ],
)
def test_arguments(arguments, text):
    with pytest.raises(ArgumentError, match=text):
        cut_buckets(*arguments)
    with pytest.raises(ArgumentError, match="size has to be at least 1, got 0"):
        cut_shards(10, 0, 64)
