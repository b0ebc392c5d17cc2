"""Stock Horovod and ours in TensorFlow, each as one traced function, as in training."""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as horovod
import numpy as np
import tensorflow as tf

import pqasgd_horovod.tensorflow as hvd
from exchange_candidates import BITS, Candidate, bytes_per_round, nothing, ring_bytes, scaled_shapes
from pqasgd_horovod import codecs
from pqasgd_horovod.averaging import ExchangeConfig, PeriodicAveraging
from pqasgd_horovod.tensorflow.periodic import PeriodicAverager


def candidates(scale: float) -> list[Candidate]:
    """Make everything that is compared, on tensors of ResNet-50's shapes; ``scale`` < 1 shortens them."""
    # One thread that computes, as in PyTorch; the other one of two waits for Horovod.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(2)
    horovod.init()
    generator = np.random.default_rng(0)  # the same model on every rank
    arrays = [generator.standard_normal(shape).astype(np.float32) for shape in scaled_shapes(scale)]
    total = sum(array.size for array in arrays)
    size = horovod.size()

    def stock(name: str, compression: Any, itemsize: int) -> Candidate:
        gradients = [tf.constant(array) for array in arrays]
        label = name.replace(" ", ".")

        @tf.function(autograph=False)
        def average(gradients: list[tf.Tensor]) -> list[tf.Tensor]:
            return [
                horovod.allreduce(gradient, compression=compression, name=f"{label}.{index}", ignore_name_scope=True)
                for index, gradient in enumerate(gradients)
            ]

        return Candidate(
            f"tensorflow stock {name}", lambda: average(gradients), nothing, lambda: ring_bytes(total, itemsize, size)
        )

    def ours(bits: int) -> Candidate:
        # Every second step averages; the local update is left out, so that step is the average alone.
        averager = PeriodicAverager(
            hvd.HorovodCarrier(), PeriodicAveraging(period=2), ExchangeConfig(codecs.quantize(bits)), name=f"bits{bits}"
        )
        variables = [tf.Variable(array, name=f"v{index}") for index, array in enumerate(arrays)]
        averager.build(variables)

        @tf.function(autograph=False)
        def step() -> None:
            averager.before_step()
            averager.count_step()

        @tf.function(autograph=False)
        def differ() -> None:  # as if the ranks had made different local steps
            for variable in variables:
                variable.assign(variable * (1.01 + 0.01 * horovod.rank()))

        def prepare() -> None:
            step()
            differ()

        return Candidate(
            f"tensorflow ours {bits} bits", step, prepare, lambda: bytes_per_round(averager.communication_stats())
        )

    return [
        stock("fp32", horovod.Compression.none, 4),
        stock("fp16", horovod.Compression.fp16, 2),
        *(ours(bits) for bits in BITS),
    ]
