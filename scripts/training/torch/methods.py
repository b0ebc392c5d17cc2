"""The methods of docs/methods.md, and a training on handwritten digits with any of them, on the ranks of a launcher."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

TABLE = Path(__file__).resolve().parents[3] / "docs" / "methods.md"
ROW = re.compile(r"^\| (.+?) \| `(.+?)`(.*) \|$", re.MULTILINE)
NUM_STEPS = 300
BATCH_SIZE = 32


class Method(NamedTuple):
    """A row of the table."""

    name: str
    call: str
    remark: str

    def options(self, hvd: Any) -> dict[str, Any]:
        """Return the arguments of `DistributedOptimizer`."""
        options: dict[str, Any] = eval(f"dict({self.call})", {"hvd": hvd, "torch": torch})
        return options

    def inner_optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer that the remark asks for."""
        if "for signs" in self.remark:
            return torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
        if "AdamW" in self.remark:
            return torch.optim.AdamW(model.parameters(), lr=0.003)
        if "no momentum inside" in self.remark:
            return torch.optim.SGD(model.parameters(), lr=0.1 if "twice the learning rate" in self.remark else 0.05)
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


class Trained(NamedTuple):
    """What came of a training."""

    model: torch.nn.Module
    loss: float  # on held-out images, as is the accuracy
    accuracy: float
    stats: dict[str, Any]


def read_methods() -> list[Method]:
    """Return the rows of the table."""
    rows = (Method(*groups) for groups in ROW.findall(TABLE.read_text(encoding="utf-8")))
    return [row for row in rows if not row.call.startswith("hvd.")]  # which is the header


def train(hvd: Any, method: Method, width: int, seed: int = 0, num_steps: int = NUM_STEPS) -> Trained:
    """Train a perceptron with a hidden layer on two thirds of scikit-learn's digits, in equal parts for all ranks."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, 10))
    optimizer = hvd.DistributedOptimizer(
        method.inner_optimizer(model),
        model.named_parameters(),
        small_tensor_threshold=0,
        seed=seed,
        **method.options(hvd),
    )
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    held_out = torch.arange(len(labels)) % 3 == 0
    own = torch.nonzero(~held_out)[:, 0][hvd.rank() :: hvd.size()]
    generator = torch.Generator().manual_seed(seed * hvd.size() + hvd.rank())
    for _ in range(num_steps):
        chosen = own[torch.randint(0, len(own), (BATCH_SIZE,), generator=generator)]
        optimizer.zero_grad()
        cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    optimizer.flush()
    with torch.no_grad():
        outputs, targets = model(images[held_out]), labels[held_out]
    return Trained(
        model,
        cross_entropy(outputs, targets).item(),
        (outputs.argmax(dim=1) == targets).double().mean().item(),
        optimizer.communication_stats(),
    )
