"""What of an averager is saved, and when a saved state is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ArgumentError
from .config import ExchangeConfig
from .strategy import PeriodicAveraging

STATE_VERSION = 1
_FIELDS = ("version", "steps", "rounds", "config", "anchor", "momentum", "pace")
ARRAYS = ("anchor", "momentum")
"""What of a state is arrays, by parameter name."""


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
