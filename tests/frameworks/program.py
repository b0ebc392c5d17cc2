"""The same convex problem in PyTorch and in TensorFlow: run by test_frameworks.py on two ranks each."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np

PERIOD, STEPS, DIMENSION = 4, 20, 5000
BITS = 4
RATE = 2.0**-4  # rate times gradient is exact, so that it does not matter who fuses it with the subtraction


def problem(rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Return curvatures and minimum of a rank's quadratic, f(x) = sum a (x - b)^2 / 2."""
    generator = np.random.default_rng(100 + rank)
    curvature = generator.uniform(0.5, 1.5, DIMENSION).astype(np.float32)
    return curvature, generator.standard_normal(DIMENSION).astype(np.float32)


def given_gradient(rank: int, step: int) -> np.ndarray:
    """Return a gradient that does not depend on the parameters."""
    generator = np.random.default_rng([rank, step])
    return generator.standard_normal(DIMENSION).astype(np.float32)


def train_torch(given: bool) -> np.ndarray:
    """Return the parameters after each step, by torch's gradients or by given ones."""
    import torch

    import pqasgd_horovod.torch as hvd

    hvd.init()
    curvature, minimum = map(torch.from_numpy, problem(hvd.rank()))
    parameter = torch.nn.Parameter(torch.zeros(DIMENSION))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([parameter], lr=RATE),
        named_parameters=[("x", parameter)],
        compression=hvd.Compression.quantize(BITS),
        averaging=hvd.PeriodicAveraging(period=PERIOD, buffers="local"),
    )
    trajectory = []
    for step in range(STEPS):
        optimizer.zero_grad()
        if given:
            parameter.grad = torch.from_numpy(given_gradient(hvd.rank(), step))
        else:
            (curvature * (parameter - minimum) ** 2).sum().div(2).backward()
        optimizer.step()
        trajectory.append(parameter.detach().numpy().copy())
    return np.stack(trajectory)


def train_tensorflow(given: bool) -> np.ndarray:
    """Return the same, by TensorFlow's gradients, in a traced loop."""
    import keras
    import tensorflow as tf

    import pqasgd_horovod.tensorflow as hvd

    hvd.init()
    curvature, minimum = map(tf.constant, problem(hvd.rank()))
    parameter = tf.Variable(tf.zeros([DIMENSION]), name="x")
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(RATE),
        compression=hvd.Compression.quantize(BITS),
        averaging=hvd.PeriodicAveraging(period=PERIOD, buffers="local"),
    )

    @tf.function
    def step(gradient):
        if not given:
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(curvature * (parameter - minimum) ** 2) / 2
            gradient = tape.gradient(loss, parameter)
        optimizer.apply_gradients([(gradient, parameter)])

    trajectory = []
    for number in range(STEPS):
        step(tf.constant(given_gradient(hvd.rank(), number)))
        trajectory.append(parameter.numpy().copy())
    return np.stack(trajectory)


def main() -> None:
    """Train in the framework named, and save each rank's trajectories."""
    framework, folder = sys.argv[1:]
    for kind in ("given", "own"):
        trajectory = {"torch": train_torch, "tensorflow": train_tensorflow}[framework](kind == "given")
        rank = importlib.import_module(f"horovod.{framework}").rank()
        np.save(Path(folder) / f"{framework}-{kind}-{rank}.npy", trajectory)


if __name__ == "__main__":
    main()
