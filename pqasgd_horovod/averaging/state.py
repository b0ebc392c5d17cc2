"""What of an averager is saved, and when a saved state is refused."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import ArgumentError
from ..exchange.carriers import Carrier
from .config import ExchangeConfig
from .strategy import PeriodicAveraging

logger = logging.getLogger("pqasgd_horovod")

STATE_VERSION = 3
ARRAYS = ("anchor", "momentum", "residual", "mean_residual", "velocity", "factor")
"""What of a state is arrays, by parameter name."""
RESIDUALS = ("residual", "mean_residual", "velocity")
"""Which of them are each rank's own."""
_FIELDS = ("version", "steps", "rounds", "config", *ARRAYS, "pace", "owner")

Arrays = dict[str, dict[str, Any]]
"""Of each kind in :data:`ARRAYS` the arrays by parameter name."""


def no_arrays() -> Arrays:
    """Return none of any kind."""
    return {kind: {} for kind in ARRAYS}


def saved_config(averaging: PeriodicAveraging, exchange: ExchangeConfig) -> dict[str, Any]:
    """Return what has to be the same when a saved state is loaded; how buckets are cut need not be."""
    config = exchange.config()
    del config["bucket_cap_mb"], config["nonfinite"]
    return {"averaging": averaging.config(), "exchange": config}


def check_state(state: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raise ArgumentError unless ``state`` is of this version and was made with ``config``."""
    missing = [key for key in _FIELDS if key not in state]
    if missing:
        raise ArgumentError(f"the saved averaging state lacks {missing}: it is damaged, or no state of this package")
    if state["version"] != STATE_VERSION:
        raise ArgumentError(
            f"the saved averaging state has version {state['version']}; this release reads version {STATE_VERSION}"
        )
    differences = [
        f"{part}.{key} was {saved!r} and is {present!r}"
        for part in config
        for key in {**config[part], **state["config"].get(part, {})}
        if (saved := state["config"].get(part, {}).get(key)) != (present := config[part].get(key))
    ]
    if differences:
        raise ArgumentError(
            f"the saved averaging state was made with another configuration: {'; '.join(differences)}. Build the "
            "optimizer as it was, or go on with the new settings from a plain checkpoint: remove the key 'pqasgd' from "
            "the state dict before loading it"
        )


def copied(arrays: Arrays) -> Arrays:
    """Return copies, which no later round changes."""
    return {kind: {name: values.copy() for name, values in named.items()} for kind, named in arrays.items()}


def owner_of(carrier: Carrier | None) -> list[int]:
    """Return rank and number of ranks, for a state whose residuals are this rank's own."""
    return [0, 1] if carrier is None else [carrier.rank, carrier.size]


def taken_over(state: Mapping[str, Any], carrier: Carrier | None, present: Arrays | None = None) -> Arrays:
    """Return the arrays of ``state`` that this rank takes over: another rank's residuals are not for it.

    It then keeps those in ``present``, or begins without any, and says so.
    """
    arrays: Arrays = {kind: dict(state[kind]) for kind in ARRAYS}
    if present is not None:
        arrays.update({kind: present[kind] for kind in RESIDUALS})
    elif any(arrays[kind] for kind in RESIDUALS) and state["owner"] not in (None, owner_of(carrier)):
        logger.warning(
            "the residual in the saved state is that of rank %d of %d; rank %d of %d begins without one. Save on every "
            "rank, and load each rank's own state, or all of them through hvd.combine_states",
            *state["owner"],
            *owner_of(carrier),
        )
        arrays.update({kind: {} for kind in RESIDUALS})
    return arrays


def combine_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    r"""Return one state, for a world of any size, of the states of all ranks of a world.

    What all ranks have alike is that of the first. What was not sent yet would have moved the mean by
    :math:`\frac1n \sum_i r_i + \sum_i R_i`, with the residuals r of the ranks' own numbers and R of the means that they
    made: that is the residual which every rank of the new world takes over, so that in a mean over any number of ranks
    it is still there. It is added up in float64, and rounded to float32, as is the mean of the velocities.

    Raises ArgumentError unless there is one state of each rank, of the same step, without hierarchy.
    """
    if not states:
        raise ArgumentError("states is empty; it must hold the state of every rank")
    owners = [None if state["owner"] is None else tuple(state["owner"]) for state in states]
    if sorted(owner or (-1, -1) for owner in owners) != [(rank, len(states)) for rank in range(len(states))]:
        raise ArgumentError(
            f"states are those of (rank, world size) {owners}; there must be one of each rank of one world"
        )
    if len({(state["steps"], state["rounds"]) for state in states}) > 1:
        raise ArgumentError(f"states are of steps {[state['steps'] for state in states]}; they must be of the same one")
    if states[0]["config"]["exchange"].get("hierarchy") is not None:
        raise ArgumentError(
            "states are of hierarchy='node', where a residual is a node's: they are for a world of the same nodes"
        )
    combined = {**states[0], "mean_residual": {}, "owner": None}
    combined["residual"] = {}
    for name, first in states[0]["residual"].items():
        pending = np.zeros(first.shape)
        for state in states:
            pending += np.asarray(state["residual"][name], np.float64) / len(states)
            pending += state["mean_residual"].get(name, 0.0)
        combined["residual"][name] = pending.astype(np.float32)
    combined["velocity"] = {
        name: np.mean([np.asarray(state["velocity"][name], np.float64) for state in states], axis=0).astype(np.float32)
        for name in states[0]["velocity"]
    }
    return combined
