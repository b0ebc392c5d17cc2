"""TensorFlow's ops on a real GPU: the bytes and the numbers of its CPU. Where there is no such TensorFlow: nothing."""

from __future__ import annotations

import os

import numpy as np
import pytest

from ..codecs.cases import ALL_CODECS, name

pytestmark = pytest.mark.gpu

os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # PyTorch's tests have the same GPU


@pytest.fixture(scope="module")
def gpu():
    """TensorFlow's name of a GPU."""
    tensorflow = pytest.importorskip("tensorflow", exc_type=ModuleNotFoundError)
    pytest.importorskip("horovod.tensorflow", exc_type=ImportError, reason="Horovod was built without TensorFlow")
    if not tensorflow.config.list_physical_devices("GPU"):
        pytest.skip("this TensorFlow has no GPU")
    return "GPU:0"


def average(codec, device):
    """One average of a rank by itself: the message, its flags, the residual, and variables and anchor after it."""
    import tensorflow as tf

    from pqasgd_horovod.tensorflow.library import ops
    from pqasgd_horovod.tensorflow.places import choose_place
    from pqasgd_horovod.tensorflow.traced import after, run_once

    generator = np.random.default_rng(5)
    first = [generator.standard_normal(size) for size in (3000, 70, 1100)]
    size = sum(map(len, first))
    with tf.device(device):
        variables = [
            tf.Variable(tf.cast(v, t)) for v, t in zip(first, (tf.float32, tf.float16, tf.bfloat16), strict=True)
        ]
        anchor, arriving, kept, following = (tf.Variable(tf.zeros([size])) for _ in range(4))
    anchor.assign(generator.standard_normal(size).astype(np.float32))
    kept.assign(generator.standard_normal(size).astype(np.float32))
    place = choose_place({"v": variables[0].device}, None)
    common = {
        "step": tf.constant(3, tf.int64), "round": tf.constant(1, tf.int64), "codec": list(codec.native_spec),
        "second_codec": list(codec.native_spec), "bucket": 0, "num_elements": size, "rank": 0, "size": 1, "digest": 7,
        "seed": 9, "shards": [],
    }  # fmt: skip

    def run():
        with place.here():
            message, flags = ops.pqasgd_pack(
                known=[], tensors=[v.value() for v in variables], anchors=[anchor.value()], start=0, anchor_offset=0,
                residuals=[kept.handle, following.handle], **common,
            )  # fmt: skip
            landed = ops.pqasgd_land(
                received=message, scale=1.0, bases=[anchor.value()], arriving=arriving.handle, offset=0, explainer=0,
                **common,
            )  # fmt: skip
            with after(landed):
                ops.pqasgd_keep(kept=kept.handle, next=following.handle, flags=[landed], limits=[0, size])
                ops.pqasgd_commit(
                    arriving=arriving.handle, anchors=[anchor.handle], variables=[v.handle for v in variables],
                    tensors=[], add=False, spans=[],
                )  # fmt: skip
        return message, flags

    results = [*run_once(run), kept, anchor, *variables]
    return [np.asarray(result) for result in results]


@pytest.mark.parametrize("codec", ALL_CODECS, ids=name)
def test_an_average_has_the_bits_of_a_cpu(codec, gpu):
    for found, expected in zip(average(codec, gpu), average(codec, "CPU:0"), strict=True):
        assert found.tobytes() == expected.tobytes()
