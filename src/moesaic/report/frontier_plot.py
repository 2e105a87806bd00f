"""The frontier's printed chart, by matplotlib: six lines at most, named where they end, read in ten seconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..results import FrontierSummary
from .frontier import Line, chosen_lines, lines_of, spread
from .plots import INK, new_figure, optional

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Style(NamedTuple):
    """How a line is drawn."""

    color: str
    dashes: str
    marker: str


BLUES = ("#0b4f8a", "#2f80c4", "#6aa9e0")
"""Ours on the frontier's chart."""
GREYS = (
    Style("#4a4a4a", "--", "s"), Style("#7d7d7d", "-.", "^"), Style("#a3a3a3", ":", "D"), Style("#a3a3a3", "--", "v")
)  # fmt: skip
"""Other methods."""
TOP = 25
"""Perplexity over dense at which the frontier's chart ends: a model beyond is of no use."""
TICKS = (1, 1.2, 1.5, 2, 3, 5, 10, 20)
LABEL = 8.5


@optional
def write_frontier(rows: Iterable[FrontierSummary], model: str, folder: Path) -> None:
    """Draw at most six lines of the frontier, as `chosen_lines` picks them, into `frontier.png` and `frontier.svg`.

    Args:
        rows: the summary of `frontier.json`.
        model: what was converted, for the title.
        folder: where to put the files.
    """
    import matplotlib

    figure = draw_frontier(rows, model)
    with matplotlib.rc_context({"svg.hashsalt": "moesaic"}):  # the same rows give the same files
        figure.savefig(folder / "frontier.png", dpi=150)
        figure.savefig(folder / "frontier.svg", metadata={"Date": None})


def draw_frontier(rows: Iterable[FrontierSummary], model: str) -> Figure:
    """Draw the frontier's chart: perplexity over the share of each FFN that runs, and over decode speed if measured."""
    lines = chosen_lines(lines_of(rows))
    with_speed = any(point.speedup for line in lines for point in line.points)
    figure = new_figure(9.6, 4.8)
    grid = figure.add_gridspec(
        1, 2 if with_speed else 1, left=0.055, right=0.985 if with_speed else 0.66, bottom=0.115, top=0.82,
        wspace=1.02, width_ratios=[1.1, 1] if with_speed else None,
    )  # fmt: skip
    panels = grid.subplots(squeeze=False, sharey=True)[0]
    highest = max((point.perplexity_ratio for line in lines for point in line.points), default=2)
    styles = _styles(lines)
    for panel, speed in zip(panels, (False, True), strict=False):
        for line in lines:
            _draw_line(panel, line, styles[line], speed)
        _dress(panel, speed, min(TOP, 1.15 * highest))
    figure.text(0.015, 0.945, f"{model} as a Mixture-of-Experts: what is lost", fontsize=13, weight="bold", color=INK)
    figure.text(
        0.015, 0.89, "Lower is better: perplexity over the dense model's; at 1 nothing is lost.", fontsize=10, color=INK
    )
    if any(not line.ours for line in lines):
        figure.text(0.985, 0.945, "blue: moesaic", fontsize=10, color=BLUES[0], weight="bold", ha="right")
        figure.text(0.985, 0.89, "grey: other methods", fontsize=10, color=GREYS[1].color, ha="right")
    _label_lines(panels[0], lines, styles, panels[0].get_position().height * figure.get_figheight() * 72)
    return figure


def _styles(lines: Sequence[Line]) -> dict[Line, Style]:
    """Colour, dashes and marker of each line: ours blue, the others grey."""
    ours = [line for line in lines if line.ours]
    rivals = [line for line in lines if not line.ours]
    found = {line: Style(BLUES[i % len(BLUES)], "-", "osD^vP"[i % 6]) for i, line in enumerate(ours)}
    return found | {line: GREYS[i % len(GREYS)] for i, line in enumerate(rivals)}


def _draw_line(panel: Axes, line: Line, style: Style, speed: bool) -> None:
    points = [point for point in line.points if point.speedup or not speed]
    color, dashes, marker = style
    x = [(point.speedup or 0) if speed else point.ffn_active for point in points]
    panel.errorbar(
        x, [point.perplexity_ratio for point in points], [point.perplexity_ratio_deviation for point in points],
        linestyle=dashes, marker=marker,
        color=color, linewidth=2.4 if line.ours else 1.4, markersize=6 if line.ours else 5, zorder=2 + line.ours,
    )  # fmt: skip


def _dress(panel: Axes, speed: bool, top: float) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

    panel.set(yscale="log", ylim=(0.94, top))
    panel.yaxis.set_major_locator(FixedLocator(TICKS))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_locator(NullLocator())
    panel.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    panel.plot([1], [1], "o", color=INK, markersize=5, clip_on=False, zorder=4)
    if speed:
        panel.set_xlabel("decode speed over the dense model's")
        panel.xaxis.set_major_formatter("{x:g}×")
    else:
        panel.annotate("dense", (1, 1), (0, 6), textcoords="offset points", fontsize=LABEL, color=INK, ha="center")
        panel.set(xlabel="share of each FFN that runs per token", xlim=(1.1, 0.22))
        panel.xaxis.set_major_locator(FixedLocator([1, 0.75, 0.5, 0.25]))
        panel.xaxis.set_major_formatter(PercentFormatter(1))
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(length=3)


def _label_lines(panel: Axes, lines: Sequence[Line], styles: Mapping[Line, Style], height: float) -> None:
    """Name each line to the right of its end, with the number there; names that would overlap move apart.

    Args:
        panel: where the lines are.
        lines: what to name.
        styles: their colours.
        height: of the panel, in points as fonts have them.
    """
    low, high = (float(edge) for edge in np.log(panel.get_ylim()))
    ends = [min(float(np.log(line.points[-1].perplexity_ratio)), high) for line in lines]
    places = spread(ends, 1.35 * LABEL * (high - low) / height)
    for line, end, place in zip(lines, ends, places, strict=True):
        color = styles[line].color
        panel.annotate(
            f"{line.label}  {line.points[-1].perplexity_ratio:.2f}", (line.points[-1].ffn_active, np.exp(end)),
            xytext=(1.06, (place - low) / (high - low)), textcoords="axes fraction", fontsize=LABEL, va="center",
            color=color, weight="bold" if line.ours else "normal", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4},
        )  # fmt: skip
