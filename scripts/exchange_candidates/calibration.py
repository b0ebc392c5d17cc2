"""What the cost model is fitted to: averages of a model of equal tensors, by stock Horovod and by ours."""

from __future__ import annotations

from typing import Any

import horovod.torch as horovod
import torch
from simulation.model import MEASURED

from exchange_candidates import Candidate
from exchange_candidates.pytorch import ours, stock
from pqasgd_horovod.torch import CodecCompressor

NUM_TENSORS = 16
_STOCK: dict[int, Any] = {4: horovod.Compression.none, 2: horovod.Compression.fp16}


def candidates(num_elements: int) -> list[Candidate]:
    """Make everything that is measured, for a model of ``num_elements`` numbers, a multiple of 16."""
    generator = torch.Generator().manual_seed(0)  # the same model on every rank
    tensors = [torch.randn(num_elements // NUM_TENSORS, generator=generator) for _ in range(NUM_TENSORS)]
    found = []
    for way in MEASURED:
        if way.config is None:
            found.append(stock(f"{way.name}.{num_elements}", tensors, _STOCK[way.itemsize], way.itemsize))
        else:
            compression = CodecCompressor(way.config.codec)
            name = f"{way.name}.{num_elements}"
            found.append(ours(name, tensors, compression=compression, exchange=way.config.method))
    return [each._replace(name=way.name) for each, way in zip(found, MEASURED, strict=True)]
