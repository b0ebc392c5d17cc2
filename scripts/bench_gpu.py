"""What the codecs cost on a GPU: encode and decode-and-add as multiples of a device-to-device copy of their input.

All are timed with CUDA events on one stream, one after the other; medians are reported. ``make gpu-check`` runs it.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_tools import OUTPUT, describe_machine, format_table, write_json

from pqasgd_horovod import codecs, native
from pqasgd_horovod.keys import Keys
from pqasgd_horovod.native import cuda

CODECS = {
    "fp16": codecs.fp16(),
    "maxscale(4)": codecs.maxscale(bits=4),
    "maxscale(8)": codecs.maxscale(bits=8),
    "qsgd(4)": codecs.qsgd(bits=4),
    "terngrad": codecs.terngrad(),
    "natural": codecs.natural(),
    "signsgd": codecs.signsgd(),
    "onebit": codecs.onebit(),
    "eden(1)": codecs.eden(bits=1),
    "eden(2)": codecs.eden(bits=2),
    "eden(4)": codecs.eden(bits=4),
    "topk(0.01)": codecs.topk(density=0.01),
    "randomk(0.01)": codecs.randomk(density=0.01),
    "threshold(2)": codecs.threshold(2.0),
}
TARGETS = {"maxscale": 1.5, "qsgd": 1.5, "terngrad": 1.5, "eden": 2.0}
"""What we want to reach, both ways, by the codec's id."""


class Subject:
    """A codec, and memory that it shares with the others."""

    def __init__(self, codec: codecs.Codec, values: torch.Tensor, total: torch.Tensor) -> None:
        self._library, self._spec, self._count = cuda.load(), codec.native_spec, values.numel()
        segments = [(values.data_ptr(), native.DTYPE_F32, self._count)]
        self._table = torch.from_numpy(cuda.DeviceSource.table(segments)).cuda()
        self._source = cuda.DeviceSource(segments, self._table.data_ptr())
        self._total = total
        self._payload = torch.empty(codec.payload_nbytes(self._count), dtype=torch.uint8, device="cuda")
        workspace = self._library.workspace_nbytes(self._spec, self._count)
        self._workspace = torch.empty(max(workspace, 8), dtype=torch.uint8, device="cuda")
        self._status = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.seconds: dict[str, list[float]] = {"copy": [], "encode": [], "decode": []}

    def _memory(self) -> tuple[int, int, int]:
        return self._workspace.data_ptr(), self._status.data_ptr(), torch.cuda.current_stream().cuda_stream

    def encode(self, key: int) -> None:
        """Put an encode on the stream."""
        payload = self._payload.data_ptr(), self._payload.numel()
        self._library.encode(self._spec, self._source, 0, self._count, Keys(key), *payload, *self._memory())

    def decode(self, key: int) -> None:
        """Put a decode-and-add on the stream."""
        payload = self._payload.data_ptr(), self._payload.numel()
        total = self._total.data_ptr()
        self._library.decode_add(self._spec, *payload, self._count, Keys(key), 0.5, total, *self._memory())

    def check(self) -> None:
        """Raise an error if the kernels found any."""
        assert self._library.check_found(int(self._status), "benchmark")

    def ratio(self, what: str) -> float:
        """Return the median time as a multiple of that of the copy."""
        return statistics.median(self.seconds[what]) / statistics.median(self.seconds["copy"])


def timed(function: Callable[[], Any]) -> float:
    """Return how many seconds a function's work takes on the current stream."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure(elements: int, repetitions: int) -> dict[str, Any]:
    """Time every codec; return what is reported."""
    values = torch.randn(elements, device="cuda")
    copy, total = torch.empty_like(values), torch.zeros_like(values)
    found = {}
    for name, codec in CODECS.items():  # one after the other, so that only one payload takes memory
        subject = Subject(codec, values, total)
        for key in range(-2, repetitions):  # the first two warm up
            seconds = {
                "copy": timed(lambda: copy.copy_(values)),
                "encode": timed(functools.partial(subject.encode, key % 2**64)),
                "decode": timed(functools.partial(subject.decode, key % 2**64)),
            }
            if key >= 0:
                for what, duration in seconds.items():
                    subject.seconds[what].append(duration)
        subject.check()
        found[name] = {
            "encode_in_copies": subject.ratio("encode"),
            "decode_add_in_copies": subject.ratio("decode"),
            "copy_seconds": statistics.median(subject.seconds["copy"]),
            "target": TARGETS.get(codec.id),
        }
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--elements", type=int, default=1 << 28, help="float32 numbers of a vector (default: 2^28)")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--output", type=Path, default=OUTPUT / "gpu.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU was found: torch.cuda.is_available() is False")
    device = torch.cuda.get_device_name()
    print(f"{arguments.elements:,} numbers on {device}; times as multiples of a device-to-device copy")
    found = measure(arguments.elements, arguments.repetitions)
    rows = [
        [name, f"{row['encode_in_copies']:.2f}", f"{row['decode_add_in_copies']:.2f}", str(row["target"] or "")]
        for name, row in found.items()
    ]
    print(format_table(["codec", "encode", "decode-add", "target"], rows))
    machine = {**describe_machine(), "device": device, "torch": torch.__version__, "cuda": torch.version.cuda}
    write_json(arguments.output, {"machine": machine, "elements": arguments.elements, "codecs": found})


if __name__ == "__main__":
    main()
