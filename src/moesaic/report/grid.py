"""The table that all verbs print, and lines of text beside it."""

from __future__ import annotations

from rich.console import Console, RenderableType
from rich.style import StyleType
from rich.table import Table
from rich.text import Text


class Grid(Table):
    """A table whose cells are printed as they are, whatever the console makes of brackets."""

    def add_row(
        self, *renderables: RenderableType | None, style: StyleType | None = None, end_section: bool = False
    ) -> None:
        cells = [Text(cell) if isinstance(cell, str) else cell for cell in renderables]
        super().add_row(*cells, style=style, end_section=end_section)


def grid(title: str, *columns: str, wrapped: int = 0) -> Table:
    """Make a table; where it is too wide only the column of number `wrapped` gets narrower."""
    made = Grid(title=Text(title, style="bold") if title else None, title_justify="left", header_style="bold")
    for number, column in enumerate(columns):
        made.add_column(
            column, justify="right" if number else "left", no_wrap=number != wrapped, overflow="fold"
        )  # fmt: skip
    return made


def say(console: Console, text: str, style: str = "") -> None:
    """Print a line as it is, whatever the console makes of brackets."""
    console.print(Text(text), style=style)
