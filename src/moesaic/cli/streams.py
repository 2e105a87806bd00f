"""Standard output and error in every state that a shell leaves them in: closed, a broken pipe, another encoding."""

from __future__ import annotations

import os
import sys


def prepare() -> None:
    """Open closed streams on nothing, so that no file gets their number; write what an encoding lacks as an escape."""
    for number in (1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_WRONLY)  # takes the lowest free number
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure:
        reconfigure(errors="backslashreplace")


def flush() -> None:
    """Write what standard output still holds, now that its errors can be told.

    Raises:
        OSError: it cannot be written.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())  # or Python would try again at its end, and complain
        raise
