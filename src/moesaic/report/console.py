"""Where people read: standard error, on which names are printed as they are; and commands that can be pasted."""

from __future__ import annotations

import shlex

from rich.console import Console


def plain_console() -> Console:
    """Make a console on standard error that takes no `[brackets]` for styles and no `:colons:` for pictures.

    Names of models, folders and files may have both. Styles are given as `style=`, or in a `Text`.
    """
    return Console(stderr=True, markup=False, emoji=False)


def command(*words: object) -> str:
    """Write a command as it can be pasted into a shell, e.g. `moesaic generate 'my models/out [v2]' Hello`."""
    return shlex.join(map(str, words))


def here(name: str) -> str:
    """Write a path so that no command takes it for an option or for a home folder."""
    return f"./{name}" if name.startswith(("-", "~")) else name
