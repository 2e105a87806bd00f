"""Pages that hold everything themselves: they open from a disk, without a network and without other files.

Written by hand rather than by a chart library: a page is 15 to 50 kB instead of 5 MB, and needs nothing installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

HERE = Path(__file__).parent


def page(title: str, body: Iterable[str]) -> str:
    """Write a whole HTML page with the style and the script in it."""
    css, js = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return "\n".join([
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>",
        *body,
        f'<div id="tip"></div>\n<script>\n{js}</script>\n</body>\n</html>\n',
    ])  # fmt: skip


def table(head: Sequence[str], rows: Iterable[Sequence[str]], prose: bool = False) -> str:
    """Write a table of cells that are HTML already; a row of one cell is a heading over the rows below it.

    Args:
        head: names of the columns.
        rows: their cells.
        prose: whether the last column holds sentences.
    """
    says = ' class="says"' if prose else ""
    *first, end = head
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in first) + f"<th{says}>{end}</th></tr>"]
    for row in rows:
        if len(row) == 1:
            lines.append(f'<tr class="group"><th colspan="{len(head)}">{row[0]}</th></tr>')
        else:
            *first, end = row
            lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in first) + f"<td{says}>{end}</td></tr>")
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"
