"""What can be set, for people."""

from __future__ import annotations

from rich.console import Console

from ..results import Description
from .grid import grid, say


def show_description(console: Console, found: Description) -> None:
    """Print a row for each method, or for each setting with its default."""
    valued = any(entry.default is not None for entry in found.entries)
    say(console, found.summary)
    if not found.entries:
        say(console, "It has no options.")
        return
    rows = grid(found.what, "name", *(["default"] if valued else []), "meaning", wrapped=1 + valued)
    for column in rows.columns[1:]:
        column.justify, column.overflow = "left", "fold"
    for entry in found.entries:
        words = f" One of: {', '.join(entry.choices)}." if entry.choices else ""
        rows.add_row(entry.name, *([entry.default] if valued else []), entry.meaning + words)
    console.print(rows)
