"""Quantisation beside conversion, for people: a table, and one chart of tokens a second against perplexity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console

from ..results import QuantisedResult, QuantisedRow
from .grid import grid, say
from .plots import INK, check_matplotlib, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^vP*X"
BLUES, GREYS = ("#0b4f8a", "#2f80c4", "#6aa9e0"), ("#8a6d3b", "#b39a6b")
SHORT = 22


class Line(NamedTuple):
    """One model in all types."""

    label: str
    color: str
    rows: list[QuantisedRow]


def label_of(row: QuantisedRow) -> str:
    """Name a row's model: ours by its plan and share."""
    if row.kind == "converted":
        return f"{row.plan}, {row.ffn_active:.0%}"
    return f"{Path(row.model).name[:SHORT]} ({row.kind})"


def threads_of(result: QuantisedResult) -> str:
    """Say with how many threads it was measured."""
    said = f"{result.threads} thread{'s' * (result.threads > 1)}"
    return f"{said}, by CPU time" if result.clock == "cpu" else said


def show_quantised(console: Console, result: QuantisedResult) -> None:
    """Print a row for each model and type, the best at their speed marked."""
    rows = grid(
        f"llama.cpp, {threads_of(result)}, {result.machine}", "model", "type", "MB", "perplexity", "tok/s",
        "over dense", "best", wrapped=0,
    )  # fmt: skip
    for row in result.rows:
        rows.add_row(
            label_of(row), row.outtype, f"{row.bytes / 1e6:,.0f}", f"{row.perplexity:.2f}",
            f"{row.decode.tokens_per_s:.1f}", f"{row.decode.speedup:.2f}x", "*" if row.on_front else "",
        )  # fmt: skip
    console.print(rows)
    say(console, "best: nothing here is as fast and as good. over dense: decoding, in the same type, a round's turns.")
    say(
        console,
        f"perplexity: of the file read back, {result.protocol}, {result.tokens:,} tokens, window {result.window}, "
        f"{result.text}, sha256 {result.data_sha256[:12]}",
    )


def lines_of(rows: Sequence[QuantisedRow]) -> list[Line]:
    """Gather the rows of each model, ours in blue, siblings in brown, dense in black."""
    models: dict[tuple[str, str], list[QuantisedRow]] = {}
    for row in rows:
        models.setdefault((row.kind, row.model), []).append(row)
    kinds = {"dense": (INK,), "sibling": GREYS, "converted": BLUES}
    seen = dict.fromkeys(kinds, 0)
    found = []
    for (kind, _), mine in models.items():
        found.append(Line(label_of(mine[0]), kinds[kind][seen[kind] % len(kinds[kind])], mine))
        seen[kind] += 1
    return found


def write_quantised(result: QuantisedResult, path: Path) -> None:
    """Draw tokens a second against perplexity: a line for each model, a marker for each type.

    Raises:
        InputError: matplotlib is missing.
    """
    check_matplotlib()
    figure = new_figure(7.6, 4.8)
    axes = figure.subplots()
    markers = dict(zip(dict.fromkeys(row.outtype for row in result.rows), MARKERS, strict=False))
    for line in lines_of(result.rows):
        _draw(axes, line, markers)
    for outtype, marker in markers.items():
        axes.plot([], [], marker, color=INK, label=outtype, linestyle="")
    axes.set(
        yscale="log", xlabel=f"tokens a second, decoding in llama.cpp, {threads_of(result)}",
        ylabel="perplexity (lower is better)", title="Fewer bits, fewer neurons, or a smaller model",
    )  # fmt: skip
    low, high = (f(row.perplexity for row in result.rows) for f in (min, max))
    axes.set_ylim(0.93 * low, 1.12 * high)
    axes.margins(x=0.12)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend(frameon=False, loc="upper left", ncols=len(markers))
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def _draw(axes: Axes, line: Line, markers: Mapping[str, str]) -> None:
    rows = sorted(line.rows, key=lambda row: row.decode.tokens_per_s)
    x, y = [row.decode.tokens_per_s for row in rows], [row.perplexity for row in rows]
    axes.plot(x, y, color=line.color, linewidth=1.2, alpha=0.6)
    for row, at_x, at_y in zip(rows, x, y, strict=True):
        axes.plot(at_x, at_y, markers[row.outtype], color=line.color, markersize=8 if row.on_front else 5)
    axes.annotate(
        line.label, (x[-1], y[-1]), (7, 0), textcoords="offset points", color=line.color, fontsize=8, va="center"
    )
