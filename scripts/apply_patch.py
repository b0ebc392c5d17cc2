#!/usr/bin/env python3
"""Apply a unified diff to a source tree, exactly or not at all. Needs no ``patch`` program.

python3 scripts/apply_patch.py scripts/horovod-0.28.1.patch path/to/horovod-0.28.1
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

HUNK_HEADER = re.compile(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@")


class PatchError(Exception):
    """The patch is malformed, or the tree is not the one it was made for."""


def apply_hunk(lines: list[str], start: int, hunk: list[str], where: str) -> None:
    """Replace in ``lines``, at index ``start``, the old side of ``hunk`` by its new side."""
    old = [line[1:] for line in hunk if line[0] in " -"]
    new = [line[1:] for line in hunk if line[0] in " +"]
    found = lines[start : start + len(old)]
    for offset, expected in enumerate(old):
        actual = found[offset] if offset < len(found) else None
        if actual != expected:
            raise PatchError(
                f"{where}, line {start + offset + 1}: expected {expected!r}, found {actual!r}; "
                "the tree is another version, or the patch was applied before"
            )
    lines[start : start + len(old)] = new


def patched_files(patch: str, root: Path) -> dict[Path, str]:
    r"""Return the new text of every file that ``patch`` changes below ``root``; nothing is written.

    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> _ = (root / "f.txt").write_text("one\ntwo\n")
    >>> patched_files("--- a/f.txt\n+++ b/f.txt\n@@ -1,2 +1,2 @@\n one\n-two\n+2\n", root)[root / "f.txt"]
    'one\n2\n'
    """
    result: dict[Path, list[str]] = {}
    lines = iter(patch.splitlines())
    path: Path | None = None
    shift = 0
    for line in lines:
        if line.startswith("+++ b/"):
            path, shift = root / line[len("+++ b/") :], 0
            if not path.is_file():
                raise PatchError(f"{path} does not exist; is {root} the root of the source tree?")
            result[path] = path.read_text(encoding="utf-8").split("\n")
        elif header := HUNK_HEADER.match(line):
            if path is None:
                raise PatchError(f"hunk {line!r} comes before any '+++ b/' line")
            first, old_count, new_count = int(header[1]), int(header[2] or 1), int(header[3] or 1)
            hunk: list[str] = []
            while sum(h[0] in " -" for h in hunk) < old_count or sum(h[0] in " +" for h in hunk) < new_count:
                text = next(lines, None)
                if text is None or text[:1] not in ("", " ", "-", "+"):
                    raise PatchError(f"{path}: hunk {line!r} ends early")
                hunk.append(text or " ")  # some editors strip the blank of an empty context line
            apply_hunk(result[path], first - 1 + shift, hunk, str(path))
            shift += new_count - old_count
    if not result:
        raise PatchError("the patch changes no file")
    return {path: "\n".join(text) for path, text in result.items()}


def apply_patch(patch: Path, root: Path) -> list[Path]:
    """Apply the diff in file ``patch`` to the tree ``root`` and return the changed files.

    Raises `PatchError` before anything is written if a single line differs from what the diff expects.
    """
    changed = patched_files(patch.read_text(encoding="utf-8"), root)
    for path, text in changed.items():
        path.write_text(text, encoding="utf-8")
    return list(changed)


def main() -> int:
    """Command line: the patch, then the tree."""
    parser = argparse.ArgumentParser(description="Apply a unified diff to a source tree, exactly or not at all.")
    parser.add_argument("patch", type=Path)
    parser.add_argument("tree", type=Path)
    arguments = parser.parse_args()
    try:
        for path in apply_patch(arguments.patch, arguments.tree):
            print(f"patched {path}")
    except (PatchError, OSError) as error:
        print(f"apply_patch: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
