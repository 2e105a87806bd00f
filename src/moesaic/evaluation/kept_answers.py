"""The file of what a model wrote, for people to read: `evaluate --answers`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from ..files import write_whole
from ..given import file_to_write

BEGINS = '{"set": '
"""How each line begins."""


def check_answers(file: Path) -> Path:
    """Check that nothing of a user's is where answers go: earlier answers are replaced, other files never.

    Returns:
        Where a link leads, or the file.

    Raises:
        InputError: something is.
    """
    place = file_to_write("--answers", file)
    if not place.exists():
        return place
    with place.open(encoding="utf-8", errors="replace") as lines:
        first = lines.readline()
    if first and not first.startswith(BEGINS):
        raise InputError(f"--answers {file} exists, and holds no answers that were kept before; choose another name")
    return place


def write_answers(file: Path, rows: Sequence[dict[str, object]]) -> None:
    """Write a row for each exercise, `set` first in each."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_whole(check_answers(file), lambda made: made.write_text(lines, encoding="utf-8"))
