"""``encode`` and ``decode_add`` as ops: the bytes and the numbers of the NumPy specification."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import torch

import pqasgd_horovod.tensorflow as hvd
from pqasgd_horovod import codecs, native
from pqasgd_horovod.errors import ArgumentError
from pqasgd_horovod.keys import Keys
from tests.codecs.cases import ALL_CODECS, name

KEY = 2**63 + 12345  # as large as keys are
every_codec = pytest.mark.parametrize("codec", ALL_CODECS, ids=name)


def sizes_of(codec):
    return (0, 1, 63, 64, 65, codec.block_size, codec.block_size + 1, 2 * codec.block_size + 130)


def numbers(size, dtype=tf.float32):
    """Values of a type, and the same values as the specification takes them: bfloat16 is exact in float32."""
    values = tf.cast(np.random.default_rng(size).standard_normal(size), dtype)
    return values, (tf.cast(values, tf.float32) if dtype == tf.bfloat16 else values).numpy()


@every_codec
@pytest.mark.parametrize("dtype", [tf.float32, tf.float64, tf.float16, tf.bfloat16], ids=lambda dtype: dtype.name)
def test_payloads_are_those_of_the_specification(codec, dtype):
    for size in sizes_of(codec):
        values, array = numbers(size, dtype)
        payload = hvd.encode(values, codec, KEY)
        assert payload.numpy().tobytes() == codec.reference_encode(array, KEY).tobytes(), size


@every_codec
def test_decoded_numbers_are_those_of_the_specification(codec):
    for size in sizes_of(codec):
        payload = codec.reference_encode(numbers(size)[1], KEY)
        start = np.random.default_rng(1).standard_normal(size).astype(np.float32)
        expected = start.copy()
        codec.reference_decode_add(payload, expected, KEY, 0.3)
        variable, tensor = tf.Variable(start), tf.constant(start)
        total = hvd.decode_add(tf.constant(payload), tensor, codec, KEY, 0.3)
        assert total.numpy().tobytes() == expected.tobytes()
        assert hvd.decode_add(tf.constant(payload), variable, codec, KEY, 0.3) is None
        assert variable.numpy().tobytes() == expected.tobytes()
        assert tensor.numpy().tobytes() == start.tobytes()


@every_codec
def test_torch_numpy_and_tensorflow_agree(codec):
    """One array and key, three frameworks: the same payload."""
    for dtype in (torch.float32, torch.float64, torch.float16):
        tensor = torch.randn(codec.block_size + 70, generator=torch.Generator().manual_seed(1), dtype=dtype)
        payload = codec.encode(tensor.numpy(), KEY)
        assert hvd.encode(tf.constant(tensor.numpy()), codec, KEY).numpy().tobytes() == payload.tobytes()
    narrow = tensor.to(torch.bfloat16)
    payload = np.empty(codec.payload_nbytes(narrow.numel()), np.uint8)
    source = native.Source([(narrow.data_ptr(), native.DTYPE_BF16, narrow.numel())], owner=narrow)
    assert native.encode(codec.native_spec, source, 0, narrow.numel(), Keys(KEY), payload)
    same = tf.bitcast(tf.constant(narrow.view(torch.int16).numpy()), tf.bfloat16)
    assert hvd.encode(same, codec, KEY).numpy().tobytes() == payload.tobytes()


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_the_shared_key_draws_what_the_specification_draws(traced):
    codec = codecs.randomk(density=0.1, values=codecs.eden(bits=4), block_size=64)
    values, array = numbers(700)

    def round_trip(key, shared_key):
        payload = hvd.encode(values, codec, key, shared_key=shared_key)
        return payload, hvd.decode_add(payload, tf.zeros(700), codec, key, 0.5, shared_key=shared_key)

    function = tf.function(round_trip) if traced else round_trip
    payloads = set()
    for shared_key in (0, 1, 2**64 - 1):
        payload, decoded = function(tf.constant(KEY, tf.uint64), tf.constant(shared_key, tf.uint64))
        assert payload.numpy().tobytes() == codec.reference_encode(array, KEY, shared_key=shared_key).tobytes()
        expected = np.zeros(700, np.float32)
        codec.reference_decode_add(payload.numpy(), expected, KEY, 0.5, shared_key=shared_key)
        assert decoded.numpy().tobytes() == expected.tobytes()
        payloads.add(payload.numpy().tobytes())
    assert len(payloads) == 3
    with pytest.raises(ArgumentError, match="shared_key is -1"):
        hvd.encode(values, codec, KEY, shared_key=-1)


@pytest.mark.parametrize("codec", [codecs.eden(bits=3), codecs.maxscale(bits=4), codecs.bf16()], ids=name)
def test_in_a_function_with_static_shapes_and_a_key_that_is_a_tensor(codec):
    shapes = []

    @tf.function(input_signature=[tf.TensorSpec([30, 50]), tf.TensorSpec([], tf.uint64), tf.TensorSpec([])])
    def round_trip(values, key, weight):
        payload = hvd.encode(values, codec, key)
        total = hvd.decode_add(payload, tf.ones_like(values), codec, key, weight)
        shapes.extend([payload.shape.as_list(), total.shape.as_list()])
        return payload, total

    values = np.random.default_rng(0).standard_normal((30, 50)).astype(np.float32)
    for key in (0, 7, 2**64 - 1):
        payload, total = round_trip(tf.constant(values), tf.constant(key, tf.uint64), 0.25)
        assert payload.numpy().tobytes() == codec.reference_encode(values.ravel(), key).tobytes()
        expected = np.ones(1500, np.float32)
        codec.reference_decode_add(payload.numpy(), expected, key, 0.25)
        assert total.numpy().tobytes() == expected.tobytes()
    assert shapes == [[codec.payload_nbytes(1500)], [30, 50]]


def test_shapes_that_are_not_known_stay_unknown():
    @tf.function(input_signature=[tf.TensorSpec([None, 4])])
    def encoded(values):
        payload = hvd.encode(values, codecs.none())
        assert payload.shape.as_list() == [None]
        return payload

    assert encoded(tf.ones([3, 4])).shape == [48]


def test_in_a_function_a_variable_changes_in_place_and_in_order():
    codec = codecs.none()
    variable = tf.Variable([1.0, 2.0])

    @tf.function
    def add_twice():
        before = variable.read_value()
        hvd.decode_add(hvd.encode(tf.constant([1.0, 1.0]), codec), variable, codec)
        between = variable.read_value()
        hvd.decode_add(hvd.encode(between, codec), variable, codec)
        return before, between

    before, between = add_twice()
    assert [value.numpy().tolist() for value in (before, between, variable)] == [[1, 2], [2, 3], [4, 6]]


def test_who_has_read_a_variable_keeps_what_was_read():
    """A tensor that was read shares the variable's memory until somebody writes."""
    codec = codecs.none()
    variable = tf.Variable(tf.range(1000.0))
    read, copy = variable.value(), tf.identity(variable)
    hvd.decode_add(hvd.encode(tf.ones(1000), codec), variable, codec)
    np.testing.assert_array_equal(read.numpy(), np.arange(1000.0))
    np.testing.assert_array_equal(copy.numpy(), np.arange(1000.0))
    np.testing.assert_array_equal(variable.numpy(), np.arange(1000.0) + 1)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_truncated_and_corrupted_payloads(traced):
    decode_add = tf.function(hvd.decode_add, autograph=False) if traced else hvd.decode_add
    codec = codecs.maxscale(bits=4)
    payload = codec.reference_encode(numbers(700)[1], KEY)
    variable = tf.Variable(tf.zeros(700))

    def decode(wrong, destination):
        return decode_add(tf.constant(wrong), destination, codec, tf.constant(KEY, tf.uint64))

    for destination in (variable, tf.zeros(700)):
        for wrong in (payload[:-1], payload[:0], np.append(payload, np.uint8(0))):
            with pytest.raises(tf.errors.DataLossError, match="not the size that this codec gives"):
                decode(wrong, destination)
        scale, code = payload.copy(), payload.copy()
        scale[:4].view("<f4")[0] = -1.0
        with pytest.raises(tf.errors.DataLossError, match="a scale that is negative, NaN or Inf"):
            decode(scale, destination)
        code[-1] = 0xFF
        with pytest.raises(tf.errors.DataLossError, match="a code that no encoder writes"):
            decode(code, destination)


def test_positions_that_no_encoder_writes():
    codec = codecs.topk(density=0.1)
    payload = codec.reference_encode(numbers(700)[1], KEY)
    payload[-1] ^= 0xFF
    for destination in (tf.Variable(tf.zeros(700)), tf.zeros(700)):
        with pytest.raises(tf.errors.DataLossError, match="a code that no encoder writes"):
            hvd.decode_add(tf.constant(payload), destination, codec, KEY)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite(wrong):
    for codec in (codecs.none(), codecs.eden(bits=2), codecs.fp16()):
        with pytest.raises(tf.errors.InvalidArgumentError, match="NaN, Inf or a number beyond the codec's range"):
            hvd.encode(tf.constant([1.0, wrong]), codec)
    with pytest.raises(tf.errors.InvalidArgumentError, match="beyond the codec's range"):
        hvd.encode(tf.constant([70000.0]), codecs.fp16())


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_keys_and_weights_that_are_no_scalars(traced):
    def call(function):
        return (tf.function(function) if traced else function)()

    payload = hvd.encode(tf.ones(3), codecs.none())
    for key in (tf.zeros([0], tf.uint64), tf.zeros([2], tf.uint64)):
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"key has \d elements; it must be a scalar"):
            call(lambda key=key: hvd.encode(tf.ones(3), codecs.none(), key))
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"key has \d elements; it must be a scalar"):
            call(lambda key=key: hvd.decode_add(payload, tf.ones(3), codecs.none(), key))
    for destination in (tf.ones(3), tf.Variable(tf.ones(3))):
        with pytest.raises(tf.errors.InvalidArgumentError, match="weight has 0 elements; it must be a scalar"):
            call(lambda destination=destination: hvd.decode_add(payload, destination, codecs.none(), 0, tf.zeros([0])))
    with pytest.raises(ValueError, match="key"):
        hvd.encode(tf.ones(3), codecs.none(), -1)


def test_types_that_are_not_taken():
    with pytest.raises((tf.errors.InvalidArgumentError, TypeError)):
        hvd.encode(tf.ones(3, tf.int32), codecs.none())
    payload = hvd.encode(tf.ones(3), codecs.none())
    with pytest.raises(ArgumentError, match="destination has dtype int32; it must be float32, float64"):
        hvd.decode_add(payload, tf.ones(3, tf.int32), codecs.none())


@pytest.mark.parametrize("dtype", [tf.float64, tf.float16, tf.bfloat16], ids=lambda dtype: dtype.name)
def test_what_is_decoded_is_added_to_any_float_type(dtype):
    codec, values = codecs.maxscale(bits=4), np.random.default_rng(3).standard_normal(1000).astype(np.float32)
    start = tf.cast(tf.constant(np.random.default_rng(4).standard_normal(1000)), dtype)
    payload = hvd.encode(tf.constant(values), codec, key=5)
    if dtype == tf.float64:
        decoded = np.zeros(1000, np.float32)
        codec.reference_decode_add(payload.numpy(), decoded, 5, weight=0.5)
        wanted = tf.constant(start.numpy() + decoded)
    else:  # in float32, and rounded once
        total = tf.cast(start, tf.float32).numpy()
        codec.reference_decode_add(payload.numpy(), total, 5, weight=0.5)
        wanted = tf.cast(total, dtype)
    added = hvd.decode_add(payload, start, codec, key=5, weight=0.5)
    assert added.dtype == dtype
    assert added.numpy().tobytes() == wanted.numpy().tobytes()
    variable = tf.Variable(start)
    assert hvd.decode_add(payload, variable, codec, key=5, weight=0.5) is None
    assert variable.numpy().tobytes() == wanted.numpy().tobytes()
