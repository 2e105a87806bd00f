"""Signals as people expect them: Ctrl-C and SIGTERM end the work with one line, a second of them at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
RESUMABLE = ("adapt", "convert", "export", "finetune", "frontier", "prune")
"""Verbs that keep what is finished."""
SHOW_CURSOR = b"\x1b[?25h"
AGAIN_SECONDS = 0.1


class Stopped(BaseException):
    """A signal asks to stop; no `KeyboardInterrupt`, which typer keeps to itself."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def code(self) -> int:
        """The exit code that shells know it by."""
        return 128 + self.number

    def __str__(self) -> str:
        """Say what happened, and for a verb that keeps what is finished how it goes on."""
        word, given = WORDS[signal.Signals(self.number)], sys.argv[1:]
        to_gguf = "export" in given and any("gguf" in argument for argument in given)
        if not set(RESUMABLE) & set(given) or to_gguf or "--dry-run" in given:
            return word
        where = " without --no-resume" if "--no-resume" in given else ""
        return f"{word}; the same command{where} goes on where it stopped"


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` at the first signal of `WORDS`, also where a callback has swallowed it; end at the second.

    A signal that is ignored, as in a shell's background, stays so.
    """
    came: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if came:
            if sys.stderr is not None and sys.stderr.isatty():
                os.write(2, SHOW_CURSOR + b"\n")
            os._exit(128 + number)
        came.append(number)
        raise Stopped(number)

    def swallowed(unraisable: sys.UnraisableHookArgs) -> None:
        if not isinstance(unraisable.exc_value, Stopped):
            return hook(unraisable)
        number = came.pop()
        timer = threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()

    hook = sys.unraisablehook
    before = {number: signal.getsignal(number) for number in WORDS}
    changed = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    sys.unraisablehook = swallowed
    for number in changed:
        signal.signal(number, stop)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number in changed:
            signal.signal(number, before[number])
