"""One file for the whole job: what the ranks have in common, and what each has for itself.

Rank 0 writes it and every rank reads it: on several machines it belongs in a folder that they share. How the file holds
it is the frameworks' business.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

Content = dict[str, Any]
"""`common`, a dict with the run's `settings`, and `ranks`, a list of what each of them has."""


class CheckpointError(Exception):
    """The checkpoint is not there, is damaged, or is of another run."""


def save(
    hvd: Any, path: Path, common: dict[str, Any], own: dict[str, Any], write: Callable[[Content, Path], None]
) -> None:
    """Write `common` of rank 0 and `own` of every rank; collective.

    Between averages the ranks take steps of their own, so momentum and random numbers differ between them, and all are
    saved. The file is replaced at once: a job that is killed here leaves the previous one.
    """
    parts = hvd.allgather_object(own, name="train.checkpoint")
    if hvd.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".part")
        write({"common": common, "ranks": parts}, unfinished)
        os.replace(unfinished, path)


def read(path: Path, settings: dict[str, Any], load: Callable[[Path], Content]) -> Content:
    """Return the checkpoint as it was saved; raise CheckpointError if it was made with other `settings`."""
    if not path.is_file():
        raise CheckpointError(f"--resume: {path} is no file; leave out --resume to start from the beginning")
    try:
        checkpoint = load(path)
        saved = checkpoint["common"]["settings"]
    except (OSError, EOFError, RuntimeError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"--resume: {path} is no checkpoint of this program: {error}") from error
    different = [
        f"{key} was {saved.get(key)!r} and is {value!r}" for key, value in settings.items() if saved.get(key) != value
    ]
    if different:
        raise CheckpointError(
            f"--resume: {path} is of another run: {'; '.join(different)}; resume it with the settings it had"
        )
    return checkpoint
