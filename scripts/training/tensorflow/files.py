"""Checkpoints as NumPy writes them: arrays, and one of them the JSON text of everything else, with their numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from training.checkpoint import Content

_PLACE = "array"


def write(content: Content, path: Path) -> None:
    """Write dicts and lists of arrays and of plain values."""
    arrays: dict[str, Any] = {}

    def place(value: Any) -> dict[str, int]:
        number = len(arrays)
        arrays[f"{_PLACE}_{number}"] = np.asarray(value)
        return {_PLACE: number}

    text = json.dumps(content, default=place)
    with path.open("wb") as file:
        np.savez(file, content=text, **arrays)


def load(path: Path) -> Content:
    """Read it back: arrays and plain values, nothing that could run code; raise ValueError if that is not in it."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:

            def fill(value: dict[str, Any]) -> Any:
                return file[f"{_PLACE}_{value[_PLACE]}"] if set(value) == {_PLACE} else value

            content: Content = json.loads(str(file["content"]), object_hook=fill)
    except BadZipFile as error:
        raise ValueError(str(error)) from error
    return content
