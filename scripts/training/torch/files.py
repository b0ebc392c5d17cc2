"""Checkpoints as PyTorch writes them."""

from __future__ import annotations

from pathlib import Path

import torch

from training.checkpoint import Content


def write(content: Content, path: Path) -> None:
    """Write a checkpoint's content."""
    torch.save(content, path)


def load(path: Path) -> Content:
    """Read it back: tensors and plain values, nothing that could run code."""
    content: Content = torch.load(path, weights_only=True)
    return content
