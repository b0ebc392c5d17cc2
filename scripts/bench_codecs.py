"""What a codec costs and what it loses: time as a multiple of a memcpy, bits for each element, and the error q.

Encode reads a flat float32 vector and writes the payload; decode-and-add reads the payload and adds the decoded numbers
into a float32 vector. Both run on one thread and are divided by the time of a memcpy of the same vector, measured right
before them; repetitions of all codecs are interleaved, and medians are reported. For powersgd the vector is matrices
of 1024 x 1024; encode makes both factors of them, decode their product, what is left, and the next start.
q = |Q(v) - v|^2 / |v|^2 is measured on Gaussian and Laplace numbers and on what a few steps of SGD did to a network.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bench_tools import OUTPUT, describe_machine, format_table, warn_if_busy, write_json
from numpy.typing import NDArray

from pqasgd_horovod import codecs, native
from pqasgd_horovod.errors import ArgumentError

Float32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]
LARGEST_SIDE = 1024  # of the matrices that are made of a vector

# Codecs with more than a width to choose, or with an argument that has no default: names of rows, and arguments.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "eden": {"eden": {}, "eden-stochastic": {"rounding": "stochastic"}},
    "signsgd": {"signsgd": {}, "signsgd-unscaled": {"scaled": False}},
    "topk": {"topk": {}, "topk-eden": {"values": codecs.eden(bits=4)}, "topk-dense": {"density": 0.1}},
    "randomk": {"randomk": {}, "randomk-scaled": {"scaled": True}},
    "threshold": {"threshold": {"value": 2.0}},
}

# What we want to reach on an AVX-512 core.
ENCODE_DECODE_TARGETS = {
    ("maxscale", 4): (1.3, 0.8),
    ("eden", 2): (2.0, 2.0),
    ("eden", 4): (2.5, 2.0),
    ("fp16", 16): (1.0, 1.0),
    ("topk", 32): (6.0, 1.0),
}
Q_TARGETS = {("eden", 1): 0.58, ("eden", 2): 0.136, ("eden", 3): 0.037, ("eden", 4): 0.0100}


@dataclasses.dataclass
class Subject:
    """What has a row: what is timed, and times in seconds."""

    name: str
    bits: int
    encode: Callable[[int], object]
    decode: Callable[[int], object]
    bits_per_element: float
    error: Callable[[Float32], float | None]
    memcpy_seconds: list[float] = dataclasses.field(default_factory=list)
    encode_seconds: list[float] = dataclasses.field(default_factory=list)
    decode_seconds: list[float] = dataclasses.field(default_factory=list)


def subject_of(name: str, codec: codecs.Codec, values: Float32, total: Float32, payloads: Bytes) -> Subject:
    """Return a codec that codes ``values`` into ``payloads``, and adds what it decodes to ``total``."""
    payload = payloads[: codec.payload_nbytes(values.size)]
    return Subject(
        name,
        codec.bits,
        lambda key: codec.encode(values, key=key, out=payload),
        lambda key: codec.decode_add(payload, total, key=key, weight=0.5),
        codec.payload_bits_per_element(values.size),
        lambda sample: relative_error(codec, sample),
    )


def subject_of_powersgd(values: Float32, total: Float32, approximation_rank: int = 2) -> Subject:
    """Return PowerSGD of ``values`` as square matrices."""
    factors = LowRankFactors(values, approximation_rank)
    mean = total[: factors.num_elements]
    return Subject(
        "powersgd",
        32,
        lambda _: factors.make(),
        lambda _: factors.multiply(mean),
        32 * factors.num_factor_elements / factors.num_elements,
        lambda sample: LowRankFactors(sample, approximation_rank).relative_error(),
    )


class LowRankFactors:
    """What one rank alone computes in a step of PowerSGD, of as many numbers as make whole matrices."""

    def __init__(self, values: Float32, approximation_rank: int) -> None:
        side = min(LARGEST_SIDE, math.isqrt(values.size))
        shapes = [(side, side)] * (values.size // side**2)
        self._matrices = native.Matrices(shapes, approximation_rank)
        self.num_elements = self._matrices.numel
        self.num_factor_elements = self._matrices.left_numel + self._matrices.right_numel
        self._values = values[: self.num_elements]
        residual = np.zeros_like(self._values), np.zeros_like(self._values)
        self._source = native.Source.from_arrays([self._values], residual=residual)
        self._left, self._right, self._start = (np.zeros(self._matrices.left_numel, np.float32) for _ in range(3))
        self._matrices.redraw(1, 0, 0, self._start)

    def make(self) -> None:
        """Make both factors."""
        self._matrices.project(self._source, 0, self._start, self._left)
        self._matrices.orthogonalize("left", self._left)
        self._matrices.backproject(self._source, 0, self._left, self._right)

    def multiply(self, mean: Float32) -> None:
        """Make their product, what is left, and where the next step starts."""
        self._matrices.reconstruct(self._source, 0, self._left, self._right, self._right, None, mean)
        following = self._right.copy()
        self._matrices.orthogonalize("right", following)
        self._matrices.redraw(1, 1, 0, following)

    def relative_error(self) -> float:
        """Return q of the first step."""
        product = np.empty_like(self._values)
        self.make()
        self.multiply(product)
        lost = (product - self._values).astype(np.float64)
        return float(lost @ lost / (self._values.astype(np.float64) @ self._values))


def all_codecs() -> list[tuple[str, codecs.Codec]]:
    """Every registered codec at every width, and the variants of :data:`VARIANTS`."""
    found: list[tuple[str, codecs.Codec]] = []
    for codec_id, make in codecs.registry.items():
        fields = {field.name for field in dataclasses.fields(make)}
        for name, arguments in VARIANTS.get(codec_id, {codec_id: {}}).items():
            for bits in range(1, 9) if "bits" in fields else (None,):
                try:
                    found.append((name, make(**arguments, **({} if bits is None else {"bits": bits}))))
                except ArgumentError:
                    continue  # this codec does not come in that width
    return found


def model_delta(seed: int = 0, warm_up: int = 100, steps: int = 8) -> Float32:
    """What ``steps`` steps of SGD with momentum change in a network with 1.1 million parameters that reads digits."""
    import torch
    from sklearn.datasets import load_digits

    torch.manual_seed(seed)
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    layers = [
        torch.nn.Linear(64, 1024),
        torch.nn.ReLU(),
        torch.nn.Linear(1024, 1024),
        torch.nn.ReLU(),
        torch.nn.Linear(1024, 10),
    ]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    anchor = torch.empty(0)
    for step in range(warm_up + steps):
        if step == warm_up:
            anchor = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        batch = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    delta: Float32 = (torch.nn.utils.parameters_to_vector(model.parameters()).detach() - anchor).numpy()
    return delta


def relative_error(codec: codecs.Codec, values: Float32) -> float | None:
    """Return q of one draw, |Q(v) - v|^2 / |v|^2; None for a codec that does not keep the size of v."""
    if not codec.keeps_scale:
        return None
    decoded = codec.decode(codec.encode(values, key=1), values.size, key=1)
    error = (decoded - values).astype(np.float64)
    return float(error @ error / (values.astype(np.float64) @ values))


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def measure_times(subjects: list[Subject], values: Float32, repetitions: int) -> None:
    """Fill in the times: one warm-up, then ``repetitions`` rounds over all codecs."""
    copy = np.zeros_like(values)

    def memcpy() -> None:
        ctypes.memmove(copy.ctypes.data, values.ctypes.data, values.nbytes)

    for repetition in range(1 + repetitions):
        for subject in subjects:
            before_encode = _seconds(memcpy)
            encode = _seconds(lambda: subject.encode(repetition))  # noqa: B023
            before_decode = _seconds(memcpy)
            decode = _seconds(lambda: subject.decode(repetition))  # noqa: B023
            if repetition > 0:
                subject.memcpy_seconds.extend((before_encode, before_decode))
                subject.encode_seconds.append(encode)
                subject.decode_seconds.append(decode)


def row_of(subject: Subject, samples: dict[str, Float32]) -> dict[str, Any]:
    """Return the row of one codec."""
    memcpy = statistics.median(subject.memcpy_seconds)
    return {
        "codec": subject.name,
        "bits": subject.bits,
        "encode_over_memcpy": round(statistics.median(subject.encode_seconds) / memcpy, 3),
        "decode_over_memcpy": round(statistics.median(subject.decode_seconds) / memcpy, 3),
        "payload_bits_per_element": subject.bits_per_element,
        **{f"q_{name}": subject.error(values) for name, values in samples.items()},
    }


def _show(row: dict[str, Any]) -> list[str]:
    key = (row["codec"], row["bits"])
    times = ENCODE_DECODE_TARGETS.get(key)
    texts = [row["codec"], str(row["bits"])]
    texts += [
        f"{row['encode_over_memcpy']:.2f}",
        f"{row['decode_over_memcpy']:.2f}",
        "" if times is None else f"{times[0]} / {times[1]}",
    ]
    texts += [
        f"{row['payload_bits_per_element']:.3f}",
        _show_q(row["q_gaussian"]),
        f"<= {Q_TARGETS[key]}" if key in Q_TARGETS else "",
    ]
    return [*texts, _show_q(row["q_laplace"]), _show_q(row["q_delta"])]


def _show_q(q: float | None) -> str:
    return "-" if q is None else f"{q:.3g}"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--elements", type=int, default=2**24, help="length of the vector that is timed (default: %(default)s)"
    )
    parser.add_argument(
        "--q-elements",
        type=int,
        default=2**21,
        help="length of the vectors that q is measured on (default: %(default)s)",
    )
    parser.add_argument(
        "--repetitions", type=int, default=9, help="timed repetitions of everything (default: %(default)s)"
    )
    parser.add_argument("--isa", choices=native.available_isas(), help="use this instruction set and not the best one")
    parser.add_argument(
        "--output", type=Path, default=OUTPUT / "codecs.json", help="where the JSON goes (default: %(default)s)"
    )
    options = parser.parse_args()

    native.set_num_threads(1)
    native.force_isa(options.isa)
    machine = describe_machine()
    warn_if_busy(machine)
    generator = np.random.default_rng(0)
    samples: dict[str, Float32] = {
        "gaussian": generator.standard_normal(options.q_elements, np.float32),
        "laplace": generator.laplace(size=options.q_elements).astype(np.float32),
        "delta": model_delta(),
    }
    values = generator.standard_normal(options.elements, np.float32)
    found, total = all_codecs(), np.zeros_like(values)
    payloads = np.zeros(max(codec.payload_nbytes(values.size) for _, codec in found), np.uint8)
    subjects = [subject_of(name, codec, values, total, payloads) for name, codec in found]
    subjects.append(subject_of_powersgd(values, total))
    measure_times(subjects, values, options.repetitions)
    rows = [row_of(subject, samples) for subject in subjects]

    memcpy = statistics.median(seconds for subject in subjects for seconds in subject.memcpy_seconds)
    print(
        f"{machine['processor']}, {machine['isa']}, one thread; memcpy of {values.nbytes / 2**20:.0f} MiB: "
        f"{memcpy * 1e3:.2f} ms ({values.nbytes / memcpy / 1e9:.1f} GB/s); times are multiples of it"
    )
    header = [
        "codec",
        "bits",
        "encode",
        "decode+add",
        "to reach",
        "bits/element",
        "q Gaussian",
        "to reach",
        "q Laplace",
        "q delta",
    ]
    print(format_table(header, [_show(row) for row in rows]))
    settings = {
        "elements": options.elements,
        "repetitions": options.repetitions,
        "threads": 1,
        "delta_elements": samples["delta"].size,
    }
    write_json(options.output, {"rows": rows, "machine": machine, "memcpy_seconds": memcpy, "settings": settings})


if __name__ == "__main__":
    main()
