"""How long work tells whoever asked for it how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with (finished parts, all parts, what is being done)."""


def unheard(done: int, count: int, note: str = "") -> None:
    """Tell nobody."""
