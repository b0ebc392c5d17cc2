"""What a rank has saved, for a world of another size: :mod:`pqasgd_horovod.averaging.state` on what Keras saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from ..averaging import state
from ..errors import ArgumentError

PREFIX = "pqasgd."
"""Begins the names of what is ours in a model file."""
_OWNER = "residual_owner"
_KINDS = {
    "residual": ("residual.", "residual_table."),
    "mean_residual": ("mean_residual.",),
    "velocity": ("residual_velocity.",),
}
_NOT_ZERO = ("outer.", "residual_start.", "pending", "snapshot")
_OF_SEVERAL = ("anchor.", "momentum.", *_NOT_ZERO, *_KINDS["residual"], *_KINDS["velocity"])
"""What a rank that trains alone may not have; whether there are residuals of means depends on the exchange, too."""


def combine_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one optimizer state, for a world of any size, of the states of every rank of a world.

    Args:
        states: of each rank what ``optimizer.save_own_variables(state)`` has put into a dict.

    Returns:
        A dict of NumPy arrays that ``optimizer.load_own_variables`` of a built optimizer takes, on every rank.

    The residuals of error feedback are added up, so that what was not sent yet is still in the mean; see
    :func:`pqasgd_horovod.averaging.state.combine_states`. The rest, momentum too, is that of the first.

    Raises ArgumentError unless there is one state of each rank, of the same step, saved after ``flush()`` and between
    steps.

    >>> import keras, tensorflow as tf
    >>> import pqasgd_horovod.tensorflow as hvd
    >>> hvd.init()
    >>> optimizer = hvd.DistributedOptimizer(
    ...     keras.optimizers.SGD(0.5), compression=hvd.Compression.eden(2), period=2, feedback=hvd.Feedback()
    ... )
    >>> optimizer.build([tf.Variable(tf.zeros([30, 50]))])
    >>> optimizer.flush()
    >>> state = {}
    >>> optimizer.save_own_variables(state)
    >>> optimizer.load_own_variables(hvd.combine_states(hvd.allgather_object(state)))
    """
    ours = [named(saved) for saved in states]
    lacking = [i for i, saved in enumerate(ours) if "steps" not in saved]
    if lacking:
        raise ArgumentError(f"states{lacking} have no '{PREFIX}steps': they are not of optimizers of this package")
    for i, saved in enumerate(ours):
        since = int(saved.get("steps_since_average", 0))
        if since:
            raise ArgumentError(
                f"states[{i}] was saved {since} steps after an average, and what its rank alone has learned since "
                "would be lost: call optimizer.flush() on every rank before saving"
            )
        if any(np.any(value) for name, value in saved.items() if name.startswith("sum.")):
            raise ArgumentError(
                f"states[{i}] was saved while gradients were accumulated, which are its rank's own: save after a call "
                "of apply() that has taken a step"
            )
    if len({tuple(sorted(name for name in saved if name.startswith("residual"))) for saved in ours}) > 1:
        raise ArgumentError("states have different residuals: they were saved with different settings, or models")
    combined = state.combine_states([_as_core(saved, i, len(ours)) for i, saved in enumerate(ours)])
    result = {name: value for name, value in ours[0].items() if not name.startswith("mean_residual.")}
    result.update({**combined["residual"], **combined["velocity"], _OWNER: np.array([-1, -1], np.int64)})
    keras_own = {key: np.array(value) for key, value in states[0].items() if not key.startswith(PREFIX)}
    return {**keras_own, **{PREFIX + name: value for name, value in result.items()}}


def named(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is ours in what Keras has saved, by its names."""
    # A part of a model file has keys, but does not iterate.
    return {key.removeprefix(PREFIX): np.array(saved[key]) for key in saved.keys() if key.startswith(PREFIX)}  # noqa: SIM118


def _as_core(saved: Mapping[str, Any], index: int, size: int) -> dict[str, Any]:
    """Return what the core's function looks at; without residuals nothing says whose a state is."""
    arrays = {
        kind: {name.removeprefix("mean_"): value for name, value in saved.items() if name.startswith(prefixes)}
        for kind, prefixes in _KINDS.items()
    }
    owner = saved[_OWNER].tolist() if _OWNER in saved else [index, size]
    return {
        "owner": owner[:2],
        "steps": int(saved["steps"]),
        "rounds": int(saved.get("rounds", 0)),
        "config": {"exchange": {"hierarchy": "node" if len(owner) > 2 else None}},
        **arrays,
    }


def fitted(saved: Mapping[str, Any], expected: Mapping[str, tf.Variable], alone: bool) -> dict[str, Any]:
    """Return what a rank takes over of ``saved``: of a combined state what there is a place for, of others all.

    ``alone``: whether this rank trains alone.
    """
    result = dict(saved)
    if _OWNER not in saved or saved[_OWNER][0] >= 0:
        return result
    was_alone = not any(name.startswith(("anchor.", "residual")) for name in saved if name != _OWNER)
    prefixes = (_OWNER, "mean_residual.", *(_OF_SEVERAL if alone or was_alone else ()))
    result = {name: value for name, value in saved.items() if name in expected or not name.startswith(prefixes)}
    for name, variable in expected.items():
        if name not in saved and name.startswith(prefixes):
            result[name] = variable.numpy() if name.startswith(_NOT_ZERO) else np.zeros(variable.shape, np.float32)
    if was_alone and "anchored" in expected:
        result["anchored"] = np.int64(0)  # training goes on from what the parameters are
    if _OWNER in expected:
        result[_OWNER] = expected[_OWNER].numpy()  # this rank, where it has made steps
    return result
