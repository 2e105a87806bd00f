"""The file of what a model wrote, for people to read: `evaluate --answers`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from ..files import write_whole

BEGINS = '{"set": '
"""How each line begins."""


def check_answers(file: Path) -> None:
    """Check that nothing of a user's is where answers go: earlier answers are replaced, other files never.

    Raises:
        InputError: something is.
    """
    if not file.absolute().parent.is_dir():
        raise InputError(f"--answers {file} is in no folder that exists; make it first")
    if file.is_dir():
        raise InputError(f"--answers {file} is a folder; name a file, such as answers.jsonl")
    if not file.exists():
        return
    with file.open(encoding="utf-8", errors="replace") as lines:
        first = lines.readline()
    if first and not first.startswith(BEGINS):
        raise InputError(f"--answers {file} exists, and holds no answers that were kept before; choose another name")


def write_answers(file: Path, rows: Sequence[dict[str, object]]) -> None:
    """Write a row for each exercise, `set` first in each."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_whole(file, lambda made: made.write_text(lines, encoding="utf-8"))
