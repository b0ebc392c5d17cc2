"""The run's log: one JSON object a line, written by rank 0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class JsonLog:
    """Events of a run, in order: `start`, then `step` and `eval`, and `end`.

    A run that is resumed goes on in the same file; what an interrupted run wrote after its checkpoint is dropped.
    """

    def __init__(self, path: Path | None, resume_at: int | None = None) -> None:
        self._file = None
        if path is None:
            return
        kept: list[str] = []
        if resume_at is not None and path.exists():
            with path.open(encoding="utf-8") as file:
                kept = [line for line in file if _belongs(line, resume_at)]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        self._file.writelines(kept)

    def write(self, event: str, **fields: Any) -> None:
        """Add a line; lines reach the disk with the next `eval` or `end`."""
        if self._file is not None:
            self._file.write(json.dumps({"event": event, **fields}) + "\n")
            if event != "step":
                self._file.flush()

    def close(self) -> None:
        """Write what is left."""
        if self._file is not None:
            self._file.close()


def _belongs(line: str, resume_at: int) -> bool:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:  # the last line of a run that was killed
        return False
    return bool(record["event"] != "end" and record["step"] <= resume_at)
