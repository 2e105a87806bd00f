"""The frontier as a table in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..results import FrontierResult, FrontierSibling, FrontierSummary
from .frontier import LIMIT, LINE, decode, over_line
from .grid import grid as _grid
from .grid import say as _say


def show_frontier(console: Console, f: FrontierResult, folder: str) -> None:
    """Print a row for each method under its budget, best first; what was not measured has no column."""
    setting, dense, rows = f.setting, f.dense, f.summary
    assert dense is not None
    measured = f"{dense.perplexity:.2f} ({dense.protocol}, {dense.tokens:,} tokens of {dense.text})"
    console.print(Text.assemble((str(setting["model"]), "bold"), f": perplexity over dense, {measured}"))
    if mean := dense.tasks.get("mean"):
        _say(console, f"zero-shot accuracy of dense: {_spread(mean.acc or 0, mean.stderr)} ({mean.n:,} items)")
    columns: dict[str, Callable[[FrontierSummary], str]] = {
        "plan": lambda r: r.plan or "-",
        "memory": lambda r: f"{r.memory or 1:.2g} x",
        "ratio": lambda r: _spread(r.perplexity_ratio, r.perplexity_ratio_deviation if r.seeds > 1 else None),
    }
    if any(r.speedup for r in [*rows, *f.siblings]):
        columns["decode"] = lambda r: f"{decode(r)}x" if r.speedup else "-"
    if any(r.tasks_mean is not None for r in rows):
        columns["zero-shot"] = lambda r: _spread(r.tasks_mean, r.tasks_stderr) if r.tasks_mean is not None else "-"
    if any(r.over_line for r in rows):
        columns["ours/line"] = over_line
        if "zero-shot" in columns:
            del columns["memory"]  # eighty columns hold no more
    grid = _grid("", "method", *columns)
    for active in sorted({r.active for r in rows}):
        grid.add_section()
        grid.add_row(f"{active:.0%} active", style="bold")
        for r in sorted((r for r in rows if r.active == active), key=lambda r: r.perplexity_ratio):
            grid.add_row(r.method, *(cell(r) for cell in columns.values()))
    add_siblings(grid, f.siblings, list(columns))
    console.print(grid)
    if any(r.speed_is == "limit" for r in rows):
        _say(console, LIMIT, "dim")
    for sentence in [*[LINE] * ("ours/line" in columns), *f.verdict]:
        _say(console, sentence, "dim" if sentence == LINE else "bold")
    for name, reason in f.unfit.items():
        _say(console, f"left out: {name}: {reason}", "yellow")
    _say(console, f"The rows (frontier.json) and their chart are in {folder}/", "bold")


def add_siblings(grid: Table, siblings: Sequence[FrontierSibling], columns: Sequence[str]) -> None:
    """Add smaller dense models to the table of a frontier."""
    if siblings:
        grid.add_section()
        grid.add_row("smaller dense siblings", style="bold")
    for s in siblings:
        known = {
            "ratio": f"{s.perplexity_ratio:.3f}", "decode": f"{s.speedup:.2f}x" if s.speedup else "-",
            "zero-shot": "-" if s.tasks_mean is None else _spread(s.tasks_mean, s.tasks_stderr),
        }  # fmt: skip
        grid.add_row(s.label, *(known.get(name, "-") for name in columns))


def _spread(value: float, deviation: float | None) -> str:
    """`1.234 ±.056`, or the value alone."""
    return f"{value:.3f}" + ("" if deviation is None else f" ±{deviation:.3f}".replace("±0", "±"))
