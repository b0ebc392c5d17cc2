"""What every front end says of where tensors are."""

from __future__ import annotations

from ..errors import ArgumentError

ANCHOR_DEVICES = (None, "cpu")


def check_anchor_device(anchor_device: str | None) -> None:
    """Raise ArgumentError unless ``anchor_device`` is one of :data:`ANCHOR_DEVICES`."""
    if anchor_device not in ANCHOR_DEVICES:
        raise ArgumentError(
            f"anchor_device is {anchor_device!r}; it must be None, beside the parameters, or 'cpu', in host memory"
        )


def check_one_device(places: dict[str, str], what: str) -> None:
    """Raise ArgumentError unless all tensors, by name, are in one place; ``what`` they are is a plural."""
    found = {place: name for name, place in reversed(places.items())}
    if len(found) > 1:
        described = ", ".join(f"{name} is on {place}" for place, name in sorted(found.items()))
        raise ArgumentError(f"{described}; all {what} must be on one device: move the model as a whole")
