"""Nodes: exact means inside, coded ones between; the same mean, or the same error, on every rank."""

from __future__ import annotations

import numpy as np
import pytest

from pqasgd_horovod import codecs, native
from pqasgd_horovod.errors import ArgumentError, DesynchronizedError, NonFiniteError
from pqasgd_horovod.exchange.carriers.nodes import find_nodes
from pqasgd_horovod.exchange.carriers.threads import run_ranks

from .world import (
    CODECS,
    METHODS,
    SEED,
    build,
    make_values,
    outcome,
    reference_mean,
    run_round,
    same_everywhere,
)

BUCKETS = [1000, 300, 1, 513]
CASES = [
    (name, method) for name, codec in CODECS.items() for method in METHODS if codec.exchange_method in (None, method)
]


def nodes_of(carrier, per_node):
    """Ranks on nodes of ``per_node``, dealt out like cards, so that no number of a rank is that of its node."""
    num_nodes = carrier.size // per_node

    def make_carrier(ranks):
        return carrier.among(ranks) if carrier.rank in ranks else None

    return find_nodes(carrier, carrier.rank % num_nodes, carrier.rank // num_nodes, "nodes", make_carrier)


def node_means(values, num_nodes):
    """What the nodes of :func:`nodes_of` bring to the exchange between them."""
    weight = np.float32(num_nodes / len(values))
    means = []
    for node in range(num_nodes):
        total = np.zeros_like(values[0])
        for vector in values[node::num_nodes]:
            total += vector * weight
        means.append(total)
    return means


@pytest.mark.parametrize(("name", "method"), CASES)
def test_it_is_the_exchange_of_the_nodes_means(name, method):
    codec = CODECS[name]
    values = make_values(6, BUCKETS)

    def program(carrier):
        return run_round(build(nodes_of(carrier, 2), codec, BUCKETS, method=method), values[carrier.rank], step=3)

    means = same_everywhere(run_ranks(6, program))
    of_nodes = node_means(values, 3)
    starts = np.cumsum([0, *BUCKETS])
    for bucket, mean in enumerate(means):
        # Bucket b is the work of rank b mod 2 of each node, which numbers its own buckets and has noise of its own.
        rank, number = bucket % 2, bucket // 2
        own = [np.concatenate([v[starts[b] : starts[b + 1]] for b in range(rank, 4, 2)]) for v in of_nodes]
        seed = (SEED + (rank << 32)) % 2**64
        expected = reference_mean(method, codec, None, BUCKETS[rank::2], own, 3, seed=seed)
        np.testing.assert_array_equal(mean, expected[number])


@pytest.mark.parametrize(("size", "per_node"), [(2, 2), (4, 4), (4, 2), (8, 4)])
def test_uncoded_it_is_the_mean_of_all(size, per_node):
    values = make_values(size, BUCKETS)

    def program(carrier):
        return run_round(build(nodes_of(carrier, per_node), codecs.none(), BUCKETS), values[carrier.rank])

    mean = np.concatenate(same_everywhere(run_ranks(size, program)))
    np.testing.assert_allclose(mean, np.mean(values, axis=0), atol=1e-6)


def test_bytes_between_nodes_do_not_grow_with_their_ranks():
    def program(carrier, per_node):
        carrier = nodes_of(carrier, per_node) if per_node > 1 else carrier
        exchange = build(carrier, codecs.maxscale(bits=4), [4096, 4096, 4096, 4096])
        run_round(exchange, make_values(carrier.size, exchange.buckets)[carrier.rank])
        return *exchange.network_bytes, *exchange.node_bytes

    alone = run_ranks(2, lambda carrier: program(carrier, 1))
    shared = run_ranks(4, lambda carrier: program(carrier, 2))
    assert [counts[0] for counts in shared] == [alone[0][0] // 2] * 4
    assert all(counts[0] == counts[1] for counts in shared)
    # 4 bytes for each number that the other rank of the node owns, and for each of the answers; and headers.
    assert [counts[2] for counts in shared] == [4 * 4 * 4096 + 8 * 64] * 4


def test_the_owner_of_a_bucket_keeps_what_its_node_did_not_send():
    codec = codecs.topk(density=0.1, block_size=128)
    values = make_values(4, [512, 512])

    def program(carrier):
        exchange = build(nodes_of(carrier, 2), codec, [512, 512], feedback=True, method="allgather")
        kept, after = (np.zeros(1024, np.float32) for _ in range(2))
        total = np.zeros(1024, np.float32)
        means = [np.empty(512, np.float32) for _ in range(2)]
        for step in range(3):
            source = native.Source.from_arrays([values[carrier.rank]], residual=(kept, after))
            for bucket in range(2):
                exchange.begin(bucket, source, 512 * bucket, step=step, round=step)
            exchange.finish(means)
            total += np.concatenate(means)
            kept, after = after, kept
        return total, kept

    outcomes = run_ranks(4, program)
    # Everything that was ever given has arrived, or is some rank's residual, of which a mean takes half: two nodes.
    missing = sum(residual for _, residual in outcomes) / 2
    np.testing.assert_allclose(outcomes[0][0] + missing, 3 * np.mean(values, axis=0), atol=1e-5)
    for rank, (_, residual) in enumerate(outcomes):
        owned = slice(0, 512) if rank // 2 == 0 else slice(512, 1024)
        assert np.any(residual[owned])
        assert not np.any(np.delete(residual, np.r_[owned]))


@pytest.mark.parametrize("bad", [0, 3])
@pytest.mark.parametrize("bucket", [0, 1])
@pytest.mark.parametrize("per_node", [2, 4])
def test_nan_is_one_error_on_every_rank(bad, bucket, per_node):
    values = make_values(4, BUCKETS)
    values[bad][np.cumsum([0, *BUCKETS])[bucket]] = np.nan

    def program(carrier):
        exchange = build(nodes_of(carrier, per_node), codecs.eden(bits=2, block_size=128), BUCKETS)
        error = outcome(lambda: run_round(exchange, values[carrier.rank]))
        run_round(exchange, np.zeros(sum(BUCKETS), np.float32), round=1)  # nothing is in flight
        return error

    errors = run_ranks(4, program)
    assert len(set(errors)) == 1, errors
    assert errors[0][0] == NonFiniteError.__name__
    assert f"bucket {bucket}" in errors[0][1]


def test_nan_can_be_handed_on():
    values = make_values(4, BUCKETS)
    values[2][0] = np.inf

    def program(carrier):
        return run_round(
            build(nodes_of(carrier, 2), codecs.terngrad(), BUCKETS, nonfinite="propagate"), values[carrier.rank]
        )

    means = same_everywhere(run_ranks(4, program))
    assert [bool(np.isnan(mean).all()) for mean in means] == [True, False, False, False]


@pytest.mark.parametrize("late", [0, 1, 2, 3])
@pytest.mark.parametrize("per_node", [2, 4])
def test_a_rank_that_is_out_of_step_is_one_error_on_every_rank(late, per_node):
    values = make_values(4, BUCKETS)

    def program(carrier):
        exchange = build(nodes_of(carrier, per_node), codecs.eden(bits=2, block_size=128), BUCKETS)
        error = outcome(lambda: run_round(exchange, values[carrier.rank], step=7 - (carrier.rank == late)))
        run_round(exchange, values[carrier.rank], step=8, round=1)
        return error

    errors = run_ranks(4, program)
    assert len(set(errors)) == 1, errors
    assert errors[0][0] == DesynchronizedError.__name__


def test_nodes_of_different_size_are_refused_on_every_rank():
    def program(carrier):
        return find_nodes(carrier, int(carrier.rank > 0), carrier.rank, "nodes", lambda ranks: None)

    errors = run_ranks(3, program, return_exceptions=True)
    assert [type(error) for error in errors] == [ArgumentError] * 3
    assert len({str(error) for error in errors}) == 1
    assert "1 on the node of rank 0, 2 on the node of rank 1" in str(errors[0])
