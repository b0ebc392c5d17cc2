"""One model per dataset, each of more than a million parameters, nearly all of them in weight matrices."""

from __future__ import annotations

import keras
from keras import layers

DATASETS = ("digits", "cifar10")
"""Those there is a model for."""


def make_model(dataset: str) -> keras.Model:
    """Return the model that learns a dataset."""
    return make_cifar_net() if dataset == "cifar10" else make_digits_net()


def make_digits_net(width: int = 1024) -> keras.Model:
    """A perceptron with two hidden layers for 8x8 images: (N, 64) -> (N, 10)."""
    return keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(width, activation="relu"),
            layers.Dense(width, activation="relu"),
            layers.Dense(10),
        ]
    )


def make_cifar_net(width: int = 32) -> keras.Model:
    """Four convolutions with batch normalization and two linear layers for colour images: (N, 3, 32, 32) -> (N, 10)."""
    channels = [width, 2 * width, 4 * width, 8 * width]
    stack = [keras.Input((3, 32, 32)), layers.Permute((2, 3, 1))]  # TensorFlow wants colours last
    for filters in channels:
        stack += [
            layers.Conv2D(filters, kernel_size=3, padding="same", use_bias=False),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
            layers.MaxPooling2D(2),
        ]
    stack += [
        layers.Flatten(),
        layers.Dense(20 * width, use_bias=False),
        layers.BatchNormalization(momentum=0.9),
        layers.ReLU(),
        layers.Dense(10),
    ]
    return keras.Sequential(stack)
