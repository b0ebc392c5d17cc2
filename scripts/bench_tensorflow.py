"""What TensorFlow adds to a codec: time of an op over the time of the same call of the core.

A bucket of 32 MB float32 is encoded, and added decoded to a variable in place, on one thread. One traced function runs
an op several times, so that a call from Python, which training makes once a step, counts as little as there. Op and
call take turns, and medians are reported.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf
from bench_tools import OUTPUT, describe_machine, format_table, warn_if_busy, write_json

import pqasgd_horovod.tensorflow as hvd
from pqasgd_horovod import codecs

CODECS = (codecs.maxscale(bits=4), codecs.maxscale(bits=8), codecs.eden(bits=2), codecs.eden(bits=4), codecs.fp16())
OPS_PER_CALL = 8
TARGET = 1.05


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def measure(codec: codecs.Codec, values: np.ndarray, repetitions: int) -> tuple[float, float]:
    """Return the ratios of encoding and of decoding."""
    tensor, total = tf.constant(values), tf.Variable(tf.zeros([values.size]))
    own_total = np.zeros(values.size, np.float32)
    own_payload = np.empty(codec.payload_nbytes(values.size), np.uint8)
    payload = hvd.encode(tensor, codec)
    own_received = payload.numpy()

    @tf.function(autograph=False)
    def encode() -> list[tf.Tensor]:
        return [hvd.encode(tensor, codec, key)[:1] for key in range(OPS_PER_CALL)]

    @tf.function(autograph=False)
    def decode() -> None:
        for _ in range(OPS_PER_CALL):
            hvd.decode_add(payload, total, codec)

    def own_encode() -> None:
        for key in range(OPS_PER_CALL):
            codec.encode(values, key, out=own_payload)

    def own_decode() -> None:
        for _ in range(OPS_PER_CALL):
            codec.decode_add(own_received, own_total)

    times: list[list[float]] = [[], [], [], []]
    for repetition in range(2 + repetitions):
        for taken, work in zip(times, (own_encode, encode, own_decode, decode), strict=True):
            seconds = _seconds(work)
            if repetition >= 2:
                taken.append(seconds)
    medians = [statistics.median(taken) for taken in times]
    return medians[1] / medians[0], medians[3] / medians[2]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=2**23, help="size of the bucket (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=15, help="timed repetitions (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=OUTPUT / "tensorflow.json", help="where the JSON goes (default: %(default)s)"
    )
    options = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    machine = describe_machine()
    warn_if_busy(machine)
    values = np.random.default_rng(0).standard_normal(options.elements).astype(np.float32)
    rows = []
    for codec in CODECS:
        encode, decode = measure(codec, values, options.repetitions)
        rows.append(
            {
                "codec": codec.id,
                "bits": codec.bits,
                "encode_over_native": round(encode, 3),
                "decode_over_native": round(decode, 3),
            }
        )
    print(f"ops of TensorFlow {tf.__version__} on {values.nbytes / 2**20:.0f} MiB, over the core's own calls")
    header = ["codec", "bits", "encode", "decode+add", "to reach"]
    shown = [
        [
            str(row["codec"]),
            str(row["bits"]),
            *(f"{row[key]:.3f}" for key in ("encode_over_native", "decode_over_native")),
        ]
        for row in rows
    ]
    print(format_table(header, [[*line, f"<= {TARGET}"] for line in shown]))
    write_json(options.output, {"rows": rows, "machine": machine, "elements": options.elements})


if __name__ == "__main__":
    main()
