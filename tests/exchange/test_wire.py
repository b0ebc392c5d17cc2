"""Headers and messages."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pqasgd_horovod.errors import DesynchronizedError, WireFormatError
from pqasgd_horovod.exchange import wire

from .world import PATIENT

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
HEADERS = st.builds(
    wire.Header,
    flags=st.integers(0, 15),
    digest=U64,
    round=U64,
    step=U64,
    bucket=U32,
    rank=U32,
    payload_nbytes=U64,
    num_elements=U64,
    phase=U32,
)
EXAMPLE = wire.Header(
    flags=1, digest=0x1122334455667788, round=3, step=24, bucket=2, rank=1, payload_nbytes=5, num_elements=10, phase=0
)


def message(header: wire.Header) -> np.ndarray:
    buffer = np.zeros(wire.HEADER_NBYTES + header.payload_nbytes, np.uint8)
    wire.pack_into(buffer, header)
    return buffer


def test_layout_is_as_documented():
    assert message(EXAMPLE).tobytes().hex() == (
        "50514131"  # PQA1
        "0100"  # flags
        "0100"  # version
        "8877665544332211"  # digest
        "0300000000000000"  # round
        "1800000000000000"  # step
        "02000000"  # bucket
        "01000000"  # rank
        "0500000000000000"  # payload_nbytes
        "0a00000000000000"  # num_elements
        "00000000"  # phase
        "54769a79"  # CRC-32
        "0000000000"  # payload
    )


@PATIENT
@given(HEADERS)
def test_round_trip(header):
    buffer = np.zeros(wire.HEADER_NBYTES, np.uint8)
    wire.pack_into(buffer, header)
    assert wire.unpack(buffer) == header


@pytest.mark.parametrize("bit", range(8 * wire.HEADER_NBYTES))
def test_every_flipped_bit_is_found(bit):
    buffer = message(EXAMPLE)
    buffer[bit // 8] ^= 1 << bit % 8
    with pytest.raises(WireFormatError):
        wire.unpack(buffer)


@PATIENT
@given(st.binary(max_size=200))
def test_random_bytes_are_no_messages(data):
    with pytest.raises(WireFormatError):
        wire.split_messages(np.frombuffer(data, np.uint8), [0])


def test_unknown_flags_are_refused():
    with pytest.raises(WireFormatError, match="unknown flags 0x0010"):
        wire.unpack(message(EXAMPLE._replace(flags=16)))


def test_split():
    messages = [
        message(EXAMPLE._replace(rank=rank, payload_nbytes=nbytes)) for rank, nbytes in [(0, 3), (2, 0), (3, 7)]
    ]
    for number, data in enumerate(messages):
        data[wire.HEADER_NBYTES :] = number
    opened = wire.split_messages(np.concatenate(messages), [0, 2, 3])
    assert [(m.header.rank, m.payload.tolist()) for m in opened] == [(0, [0] * 3), (2, []), (3, [2] * 7)]


@pytest.mark.parametrize(
    ("change", "senders", "text"),
    [
        (lambda data: data, [1, 2], "message of rank 2: a message has a header of 64 bytes, only 0 bytes are left"),
        (lambda data: data, [0], "message of rank 0: its header says that it is of rank 1"),
        (
            lambda data: data[:-1],
            [1],
            "message of rank 1: its header announces 5 bytes of payload, only 4 bytes are left",
        ),
        (lambda data: np.append(data, data[:2]), [1], "2 bytes follow the last message"),
    ],
)
def test_split_refuses(change, senders, text):
    with pytest.raises(WireFormatError, match=text):
        wire.split_messages(change(message(EXAMPLE)), senders)


@pytest.mark.parametrize("field", ["digest", "round", "step", "bucket", "num_elements", "phase"])
def test_check_names_the_field_and_both_values_on_either_side(field):
    headers = [EXAMPLE._replace(rank=0), EXAMPLE._replace(rank=1, **{field: 77})]
    texts = set()
    for own in headers:
        with pytest.raises(DesynchronizedError) as caught:
            wire.check(headers, own)
        texts.add(str(caught.value))
    (text,) = texts
    assert f"{field} is " in text
    assert ("77" in text) or (field == "digest" and "0x000000000000004d" in text)
    assert "on rank 0; " in text
    assert "on rank 1; " in text


def test_check_looks_at_nothing_else():
    other = EXAMPLE._replace(rank=7, flags=0, payload_nbytes=99)
    wire.check([EXAMPLE, other], EXAMPLE)
