"""Messages in the memory of GPUs: the same bytes, bits and errors as in host memory, out of the host's reach."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pqasgd_horovod import native
from pqasgd_horovod.exchange import placement, verify_and_place, wire
from pqasgd_horovod.exchange.carriers.threads import run_ranks
from pqasgd_horovod.native.cuda import DeviceBytes

from ..native.cuda_on_cpu import DeviceCarrier, load, make_device, upload
from .world import CODECS, METHODS, WrappedCarrier, build, make_values, outcome

RANKS = 3
BUCKETS = (1, 200, 2500)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """Compiled once, and not by each rank."""
    return load()


def average(carrier, method, place, *, codec="eden4", late=False, poison=False, damage=None, **options):
    """Three rounds, of which the second is the one that goes wrong: means and errors, and what travelled."""
    device = None if place is None else make_device(index=carrier.rank)
    wrapped = WrappedCarrier(carrier)
    carrier = DeviceCarrier(wrapped)
    exchange = build(
        carrier, CODECS[codec], BUCKETS, method=method, device=device, device_messages=place == "device", **options
    )
    arrays = [native.zeros(size, device=device) for size in (sum(BUCKETS), *BUCKETS)]
    values, means = arrays[0], arrays[1:]
    values[:] = make_values(RANKS, BUCKETS)[carrier.rank]
    source = native.Source([(values.ctypes.data, native.DTYPE_F32, values.size)], owner=values, device=device)
    found = []
    for round in range(3):
        wrong = round == 1 and carrier.rank == 1
        if wrong and poison:
            values[700] = np.nan
        wrapped.change_received = damage if wrong else None
        starts = np.cumsum([0, *BUCKETS]).tolist()

        def run(round=round, wrong=wrong, starts=starts):
            for bucket in range(len(BUCKETS)):
                exchange.begin(bucket, source, starts[bucket], step=round + (wrong and late), round=round)
                exchange.advance()
            exchange.finish(means, 20.0)

        found.append(outcome(run) if round == 1 else run())
        found.append([mean.tobytes() for mean in means] if found[-1] in (None, ("", "")) else [])
        values[700] = 1
    return found, exchange.bytes_sent, exchange.bytes_received, carrier.names


def everywhere(method, **options):
    """Return what comes of it with CPUs, after comparing that with GPUs whose messages are here and there."""
    expected = run_ranks(RANKS, lambda carrier: average(carrier, method, None, **options))
    for place in ("host", "device"):
        got = run_ranks(RANKS, lambda carrier, place=place: average(carrier, method, place, **options))
        assert [rank[:3] for rank in got] == [rank[:3] for rank in expected], place
        phases = 3 * len(BUCKETS) * (1 if method == "allgather" else 2)
        assert [len(rank[3]) for rank in got] == [phases if place == "device" else 0] * RANKS
    return [rank[0] for rank in expected]


@pytest.mark.parametrize("codec", ["eden4", "randomk", "none"])
@pytest.mark.parametrize("method", METHODS)
def test_means_have_the_bits_of_messages_in_host_memory(method, codec):
    for found in everywhere(method, codec=codec):
        assert found[2] == ("", "")


def test_what_owners_do_not_send_has_them_too():
    everywhere("two_phase", feedback=True, second_codec=CODECS["maxscale4"])


@pytest.mark.parametrize("method", METHODS)
def test_another_step_or_codec_is_the_same_error(method):
    for found in everywhere(method, late=True):
        assert found[2][0] == "DesynchronizedError"
        assert (
            "step is 1 on ranks 0, 2; 2 on rank 1" in found[2][1] or "received a message of another step" in found[2][1]
        )


@pytest.mark.parametrize("method", METHODS)
def test_nan_is_the_same_error(method):
    for found in everywhere(method, poison=True):
        assert found[2][0] == "NonFiniteError"
        assert "rank 1 had NaN" in found[2][1]


def flip(received):
    received[5] ^= 0x5A
    return received


def cut(received):
    return received[:-3]


def longer(received):
    """The first message announces more than it has; its checksum is right."""
    header = wire.unpack(received)
    wire.pack_into(received, header._replace(payload_nbytes=header.payload_nbytes + 8))
    return received


@pytest.mark.parametrize("damage", [flip, cut, longer], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_damage_is_the_same_error(method, damage):
    """Of the largest bucket, on one rank."""

    def of_one(name, received):
        return damage(received.copy()) if ".b2." in name else received

    for found in everywhere(method, damage=of_one):
        assert method == "allgather" or found[2][0] == "WireFormatError"


def test_headers_that_are_elsewhere_are_found():
    """The first message is of another size: the next one is not where it is looked for first."""
    codec, device = CODECS["maxscale4"], make_device()
    right = codec.payload_nbytes(500)
    header = wire.Header(
        flags=0, digest=1, round=0, step=0, bucket=0, rank=0, payload_nbytes=0, num_elements=500, phase=0
    )
    messages = []
    for rank, nbytes in enumerate((right + 40, right)):
        message = np.zeros(wire.HEADER_NBYTES + nbytes, np.uint8)
        wire.pack_into(message, header._replace(rank=rank, payload_nbytes=nbytes, digest=2 - rank))
        messages.append(message)
    received = np.concatenate(messages)
    for place in (None, device):
        bucket = native.Bucket(
            codec.native_spec, codec.native_spec, bucket=0, num_elements=500, rank=0, size=2, digest=1, seed=0,
            device=place,
        )  # fmt: skip
        what = received if place is None else upload(place, received)
        assert bucket.land(what, 0, 0, None, native.zeros(500, device=place)) == wire.FLAG_DESYNCHRONIZED


def places_of(devices):
    def program(carrier):
        return verify_and_place(carrier, {"seed": 1}, devices[carrier.rank], "test")[1]

    return run_ranks(len(devices), program, timeout=20)


def test_messages_are_on_devices_only_if_all_are(caplog):
    placement._say.cache_clear()
    caplog.set_level(logging.INFO, "pqasgd_horovod")
    gpus = [make_device(index=index) for index in range(3)]
    assert places_of(gpus) == places_of(gpus) == [True] * 3
    assert len(caplog.records) == 3
    assert places_of([*gpus[:2], None]) == [False] * 3
    assert places_of([gpus[0], gpus[1], gpus[1]]) == [False] * 3
    assert places_of([gpus[0], make_device(index=1, host_messages="there is no NCCL")]) == [False] * 2
    assert places_of(gpus[:1]) == [False]
    through_host = "travel through pinned host memory"
    assert {record.getMessage() for record in caplog.records} == {
        *(f"messages of cuda:{index} travel from its memory" for index in range(3)),
        *(f"messages of cuda:{index} {through_host}: those of rank 2 have to" for index in range(2)),
        *(f"messages of cuda:{index} {through_host}: ranks 1, 2 have the same GPU" for index in range(2)),
        f"messages of cuda:0 {through_host}: those of rank 1 have to",
        f"messages of cuda:1 {through_host}: there is no NCCL",
    }


def test_other_libraries_know_them_by_their_interface():
    """NumPy's, which describes memory of the host, has the same fields."""
    expected = np.arange(7, dtype=np.uint8)

    class OnHost:
        __array_interface__ = DeviceBytes(expected.ctypes.data, 7, make_device()).__cuda_array_interface__

    found = np.asarray(OnHost())
    assert found.tobytes() == expected.tobytes()
    assert np.shares_memory(found, expected)


def test_the_host_does_not_reach_them():
    """Or else the tests above would prove nothing."""
    program = (
        "import ctypes, pathlib, sys; from pqasgd_horovod.native.cuda import Device, Library; "
        "memory = Device(0, library=Library(pathlib.Path(sys.argv[1]))).device_messages_memory(8); "
        "assert memory.to_host().tolist() == [0] * 8; print('alive', flush=True); ctypes.string_at(memory.pointer, 1)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, load()._library._name], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (run.stdout, run.returncode) == ("alive\n", -signal.SIGSEGV), run.stderr
