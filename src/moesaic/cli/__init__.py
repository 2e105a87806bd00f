"""The command line: one file a verb. Parses, calls, prints; nothing else."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from .signals import Stopped, stoppable

if TYPE_CHECKING:
    from .verbs import app


def main() -> None:
    """Run the command line; errors become one line and an exit code.

    Nothing of it is imported before signals are ours, so that Ctrl-C is never a traceback.
    """
    with stoppable():
        try:
            from .verbs import run

            code = run()
        except Stopped as stop:
            if sys.stderr is not None:
                print(stop, file=sys.stderr)
            code = stop.code
    sys.exit(code)


def __getattr__(name: str) -> object:
    if name != "app":
        raise AttributeError(f"module 'moesaic.cli' has no attribute '{name}'")
    from .verbs import app

    return app


__all__ = ["app", "main"]
