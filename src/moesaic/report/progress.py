"""One progress bar at a time: ours, while the libraries' own are silent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol
from unittest.mock import patch

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from tqdm import tqdm

QUIET_SECONDS = 30
"""Between two lines where standard error is no terminal."""


class Ticker(Protocol):
    """Moves a bar on."""

    def __call__(self, done: int, count: int, note: str = "") -> None: ...

    def phase(self, title: str, unit: str, plural: str = "s") -> Ticker:
        """Give what moves the same bar on in another part of the work, of another name and unit."""
        ...


@contextmanager
def progress(console: Console, title: str, unit: str, plural: str = "s") -> Iterator[Ticker]:
    """Show a bar with the time left, and hide those of other libraries; yields `tick(done, count, note)`.

    The bar appears with the first tick, so that bad input gets its one line alone; a download before that shows its
    own. Where the console is no terminal, a line every half minute says the same.
    """
    rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # what does not fit is cut there, never the time left
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=14), MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}", markup=False), TimeRemainingColumn(), TextColumn("left"),
        TextColumn("{task.fields[note]}", markup=False, table_column=rest),
    )  # fmt: skip
    bar = Progress(*columns, console=console, speed_estimate_period=120, expand=True)
    task, spoken = bar.add_task(title, total=None, note="", unit=unit + plural), -float("inf")

    class Tick:
        def __init__(self, title: str, unit: str) -> None:
            self.title, self.unit, self.shown = title, unit, False

        def phase(self, title: str, unit: str, plural: str = "s") -> Tick:
            return Tick(title, unit + plural)

        def __call__(self, done: int, count: int, note: str = "") -> None:
            nonlocal spoken
            if not console.is_terminal:
                if time.monotonic() - spoken >= QUIET_SECONDS:
                    spoken = time.monotonic()
                    line = f"{self.title}: {done} of {count} {self.unit}, {note}".rstrip(", ")
                    console.print(line, highlight=False, markup=False)
                return
            if not self.shown:
                bar.reset(task, description=self.title, unit=self.unit, note="")
                self.shown = True
            bar.update(task, completed=done, total=count, note=note)
            bar.start()

    with silent_bars(lambda: bar.live.is_started):
        try:
            yield Tick(title, unit + plural)
        finally:
            if bar.live.is_started:  # or it would print an empty line
                bar.stop()


@contextmanager
def silent_bars(busy: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Disable every bar of tqdm, which all libraries use; downloads from the hub show theirs until we are `busy`."""
    make: Callable[..., None] = tqdm.__init__

    def silent(self: object, *args: object, **options: object) -> None:
        if busy() or not type(self).__module__.startswith("huggingface_hub"):
            options["disable"] = True
        make(self, *args, **options)

    with patch.object(tqdm, "__init__", silent):
        yield
