"""A model per dataset, of more than a million parameters, nearly all in weight matrices; and a smaller one."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import nn

from training.data import Task


def make_model(task: Task, dataset: str) -> nn.Module:
    """Return the model that learns a dataset."""
    if dataset == "cifar10":
        return CifarNet()
    if dataset == "text":
        return CharacterTransformer(task.num_classes, context=task.train.inputs.shape[1])
    return DigitsNet()


@torch.no_grad()
def average_buffers(hvd: Any, model: torch.nn.Module) -> None:
    """Replace BatchNorm's statistics, which each rank gathers on its own data, by their mean over the ranks."""
    saved = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in saved and buffer.is_floating_point():
            buffer.copy_(hvd.allreduce(buffer, name=f"buffer.{name}"))


class DigitsNet(nn.Sequential):
    """A perceptron with two hidden layers for 8x8 images: (N, 64) -> (N, 10)."""

    def __init__(self, width: int = 1024) -> None:
        super().__init__(
            nn.Linear(64, width), nn.ReLU(),
            nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, 10),
        )  # fmt: skip


class CifarNet(nn.Sequential):
    """Four convolutions with batch normalization and two linear layers for colour images: (N, 3, 32, 32) -> (N, 10)."""

    def __init__(self, width: int = 32) -> None:
        channels = [3, width, 2 * width, 4 * width, 8 * width]
        layers: list[nn.Module] = []
        for before, after in pairwise(channels):
            layers += [
                nn.Conv2d(before, after, kernel_size=3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        features, hidden = 4 * channels[-1], 20 * width  # four poolings leave 2 x 2 pixels
        super().__init__(
            *layers,
            nn.Flatten(),
            nn.Linear(features, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, 10),
        )


class SmallCifarNet(nn.Sequential):
    """Four convolutions with batch normalization, 0.28 million parameters, made to be quick on one core.

    (N, 3, 32, 32) -> (N, 10). Two strides at the beginning leave 8 x 8 pixels to the layers that have the weights.
    """

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for (before, after), stride in zip(pairwise([3, 40, 64, 128, 160]), [2, 2, 1, 1], strict=True):
            layers += [
                nn.Conv2d(before, after, kernel_size=3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
            ]
        layers.insert(9, nn.MaxPool2d(2))
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(160, 10))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it


class CharacterTransformer(nn.Module):
    """A causal transformer that predicts the next character: (N, T) int64 -> (N, vocabulary_size, T)."""

    def __init__(
        self, vocabulary_size: int, context: int, width: int = 160, depth: int = 4, heads: int = 5, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary_size, width)
        self.positions = nn.Parameter(torch.zeros(context, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=dropout, activation="gelu", batch_first=True, norm_first=True
        )
        # The layers are copies of one: without nested tensors, which do nothing for a causal mask.
        self.layers = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        for parameter in self.layers.parameters():
            if parameter.dim() > 1:  # otherwise every layer would start with the very same weights
                nn.init.xavier_uniform_(parameter)
        self.head = nn.Linear(width, vocabulary_size)
        self.mask: torch.Tensor
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context), persistent=False)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        """Return the scores of each next character; classes come second, as cross_entropy wants them."""
        length = characters.shape[1]
        hidden = self.characters(characters) + self.positions[:length]
        hidden = self.layers(hidden, mask=self.mask[:length, :length], is_causal=True)
        scores: torch.Tensor = self.head(hidden)
        return scores.transpose(1, 2)
