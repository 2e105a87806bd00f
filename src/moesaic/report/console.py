"""Where people read: standard error, on which names are printed as they are; and commands that can be pasted."""

from __future__ import annotations

import shlex

from rich.console import Console
from rich.text import Text

BRACKETS = str.maketrans("[]", "__")


def plain_console() -> Console:
    """Make a console on standard error that takes no `[brackets]` for styles and no `:colons:` for pictures.

    Names of models, folders and files may have both. Styles are given as `style=`, or in a `Text`.
    """
    return Console(stderr=True, markup=False, emoji=False)


def command(*words: object) -> str:
    """Write a command as it can be pasted into a shell, e.g. `moesaic generate 'my models/out [v2]' Hello`."""
    return " ".join(quoted(str(word)) for word in words)


def quoted(word: str) -> str:
    """Quote a word for a shell, if it needs it: brackets alone mean themselves."""
    return word if shlex.quote(word.translate(BRACKETS)) == word.translate(BRACKETS) else shlex.quote(word)


def offer(console: Console, words: str, indent: str, width: int | None = None) -> None:
    """Print a command; where it is too wide it goes on in the next line as a shell has it, so that it can be pasted."""
    width = width or console.width
    lines = [indent]
    for word in shlex.split(words):
        if lines[-1].strip() and len(f"{lines[-1]} {quoted(word)} \\") > width:
            lines[-1] += " \\"
            lines.append(f"{indent}  ")
        lines[-1] += f"{' ' * bool(lines[-1].strip())}{quoted(word)}"
    console.print(Text("\n".join(lines)), soft_wrap=True)


def share(neurons: float) -> str:
    """Write a share of an FFN's neurons: `50%`, and `2.0 x` where copies run."""
    return f"{neurons:.1f} x" if neurons > 1 else f"{neurons:.0%}"


def here(name: str) -> str:
    """Write a path so that no command takes it for an option or for a home folder."""
    return f"./{name}" if name.startswith(("-", "~")) else name
