"""One progress bar at a time: ours, while the libraries' own are silent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from tqdm import tqdm

QUIET_SECONDS = 30
"""Between two lines where standard error is no terminal."""


@contextmanager
def progress(console: Console, title: str, unit: str, plural: str = "s") -> Iterator[Callable[..., None]]:
    """Show a bar with the time left, and hide those of other libraries; yields `tick(done, count, note)`.

    The bar appears with the first tick, so that bad input gets its one line alone; a download before that shows its
    own. Where the console is no terminal, a line every half minute says the same.
    """
    rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # what does not fit is cut there, never the time left
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=14), MofNCompleteColumn(),
        TextColumn(unit + plural, markup=False), TimeRemainingColumn(), TextColumn("left"),
        TextColumn("{task.fields[note]}", markup=False, table_column=rest),
    )  # fmt: skip
    bar = Progress(*columns, console=console, speed_estimate_period=120, expand=True)
    task = bar.add_task(title, total=None, note="")
    spoken = -float("inf")

    def tick(done: int, count: int, note: str = "") -> None:
        nonlocal spoken
        if not console.is_terminal:
            if time.monotonic() - spoken >= QUIET_SECONDS:
                spoken = time.monotonic()
                console.print(
                    f"{title}: {done} of {count} {unit}{plural}, {note}".rstrip(", "), highlight=False, markup=False
                )
            return
        bar.update(task, completed=done, total=count, note=note)
        bar.start()

    with silent_bars(lambda: bar.live.is_started):
        try:
            yield tick
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
