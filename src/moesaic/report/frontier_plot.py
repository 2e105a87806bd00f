"""The frontier's printed chart, by matplotlib: six lines at most, named where they end, read in ten seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..results import FrontierSibling, FrontierSummary
from .frontier import SHARES, SIBLING, SPEEDS, DenseDot, Line, chosen_lines, lines_of, sibling_dots, spread
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
def write_frontier(
    rows: Iterable[FrontierSummary], model: str, folder: Path, siblings: Sequence[FrontierSibling] = ()
) -> None:
    """Draw at most six lines of the frontier, as `chosen_lines` picks them, into `frontier.png` and `frontier.svg`.

    Args:
        rows: the summary of `frontier.json`.
        model: what was converted, for the title.
        folder: where to put the files.
        siblings: smaller dense models, whose line is drawn too.
    """
    import matplotlib

    figure = draw_frontier(rows, model, siblings)
    with matplotlib.rc_context({"svg.hashsalt": "moesaic"}):  # the same rows give the same files
        figure.savefig(folder / "frontier.png", dpi=150)
        figure.savefig(folder / "frontier.svg", metadata={"Date": None})


def draw_frontier(rows: Iterable[FrontierSummary], model: str, siblings: Sequence[FrontierSibling] = ()) -> Figure:
    """Draw the frontier's chart: perplexity over the share of each FFN that runs, and over decode speed if measured.

    With smaller dense siblings the share is that of all active parameters, and both axes are logarithmic, so that the
    siblings' line is straight between neighbours.
    """
    lines = chosen_lines(lines_of(rows))
    with_speed = any(point.speedup for line in lines for point in line.points)
    figure = new_figure(9.6, 4.8)
    grid = figure.add_gridspec(
        1, 2 if with_speed else 1, left=0.055, right=0.985 if with_speed else 0.66, bottom=0.115, top=0.82,
        wspace=1.02, width_ratios=[1.1, 1] if with_speed else None,
    )  # fmt: skip
    panels = grid.subplots(squeeze=False, sharey=True)[0]
    ratios = [point.perplexity_ratio for line in lines for point in line.points]
    highest = max([*ratios, *(sibling.perplexity_ratio for sibling in siblings)], default=2)
    styles = styles_of(lines)
    for panel, speed in zip(panels, (False, True), strict=False):
        for line in lines:
            limited = speed and any(p.speed_is == "limit" for p in line.points)
            _draw_line(panel, line, styles[line], _x_of(speed, bool(siblings)), limited)
        limits = any(p.speed_is == "limit" for line in lines for p in line.points)
        _dress(panel, speed, min(TOP, 1.15 * highest), bool(siblings), limits)
        if siblings:
            _draw_siblings(panel, sibling_dots(siblings, speed), speed)
    figure.text(0.015, 0.945, f"{model} as a Mixture-of-Experts: what is lost", fontsize=13, weight="bold", color=INK)
    says = "Lower is better: perplexity over the dense model's; at 1 nothing is lost."
    figure.text(0.015, 0.89, says, fontsize=10, color=INK)
    if siblings:
        says = "Dashed, orange: smaller dense models of the family."
        figure.text(0.015, 0.842, says, fontsize=10, color=SIBLING)
    if any(not line.ours for line in lines):
        figure.text(0.985, 0.945, "blue: moesaic", fontsize=10, color=BLUES[0], weight="bold", ha="right")
        figure.text(0.985, 0.89, "grey: other methods", fontsize=10, color=GREYS[1].color, ha="right")
    height = panels[0].get_position().height * figure.get_figheight() * 72
    _label_lines(panels[0], lines, styles, height, _x_of(False, bool(siblings)))
    return figure


def styles_of(lines: Sequence[Line]) -> dict[Line, Style]:
    """Colour, dashes and marker of each line: ours blue, the others grey."""
    ours = [line for line in lines if line.ours]
    rivals = [line for line in lines if not line.ours]
    found = {line: Style(BLUES[i % len(BLUES)], "-", "osD^vP"[i % 6]) for i, line in enumerate(ours)}
    return found | {line: GREYS[i % len(GREYS)] for i, line in enumerate(rivals)}


X = Callable[[FrontierSummary], float | None]


def _x_of(speed: bool, parameters: bool) -> X:
    """Choose what a point's place is: its speed, its share of all active parameters, or that of its FFNs."""
    return attrgetter("speedup" if speed else "active_ratio" if parameters else "ffn_active")


def _draw_line(panel: Axes, line: Line, style: Style, x_of: X, hollow: bool) -> None:
    points = [point for point in line.points if x_of(point)]
    color, dashes, marker = style
    panel.errorbar(
        [x_of(point) or 0 for point in points], [point.perplexity_ratio for point in points],
        [point.perplexity_ratio_deviation for point in points], linestyle=dashes, marker=marker,
        color=color, linewidth=2.4 if line.ours else 1.4, markersize=6 if line.ours else 5, zorder=2 + line.ours,
        markerfacecolor="white" if hollow else color,
    )  # fmt: skip


def _draw_siblings(panel: Axes, dots: Sequence[DenseDot], speed: bool) -> None:
    """Draw the line from the dense model through its siblings, each named, and make the axis fit it."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    x, ratio = [1, *(dot.x for dot in dots)], [1, *(dot.ratio for dot in dots)]
    panel.plot(x, ratio, "--", color=SIBLING, linewidth=1.6, zorder=3)
    panel.plot(x[1:], ratio[1:], "*", color=SIBLING, markersize=9, zorder=4)
    for dot in dots:
        panel.annotate(
            dot.label, (dot.x, dot.ratio), (-8, 0), textcoords="offset points", ha="right", va="center", fontsize=LABEL,
            color=SIBLING,
        )  # fmt: skip
    panel.set_xscale("log")
    if not speed:
        panel.set(xlabel="active parameters over the dense model's", xlim=(1.3, 0.85 * min(dot.x for dot in dots)))
    low, high = sorted(panel.get_xlim())
    panel.xaxis.set_major_locator(FixedLocator([x for x in (SPEEDS if speed else SHARES) if low <= x <= high]))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_minor_formatter(NullFormatter())
    if speed:
        panel.xaxis.set_major_formatter("{x:g}×")
    else:
        panel.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")


def _dress(panel: Axes, speed: bool, top: float, siblings: bool, limits: bool = False) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

    panel.set(yscale="log", ylim=(0.94, top))
    panel.yaxis.set_major_locator(FixedLocator(TICKS))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_locator(NullLocator())
    panel.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    panel.plot([1], [1], "o", color=INK, markersize=5, clip_on=False, zorder=4)
    if speed:
        panel.set_xlabel("decode speed over the dense model's" + "; hollow: the bytes' limit" * limits)
        panel.xaxis.set_major_formatter("{x:g}×")
    else:
        at, side = ((-4, 5), "right") if siblings else ((0, 6), "center")
        panel.annotate("dense", (1, 1), at, textcoords="offset points", fontsize=LABEL, color=INK, ha=side)
        panel.set(xlabel="share of each FFN that runs per token", xlim=(1.1, 0.22))
        panel.xaxis.set_major_locator(FixedLocator([1, 0.75, 0.5, 0.25]))
        panel.xaxis.set_major_formatter(PercentFormatter(1))
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(length=3)


def _label_lines(panel: Axes, lines: Sequence[Line], styles: Mapping[Line, Style], height: float, x_of: X) -> None:
    """Name each line to the right of its end, with the number there; names that would overlap move apart.

    Args:
        panel: where the lines are.
        lines: what to name.
        styles: their colours.
        height: of the panel, in points as fonts have them.
        x_of: where a point lies.
    """
    low, high = (float(edge) for edge in np.log(panel.get_ylim()))
    ends = [min(float(np.log(line.points[-1].perplexity_ratio)), high) for line in lines]
    places = spread(ends, 1.35 * LABEL * (high - low) / height)
    for line, end, place in zip(lines, ends, places, strict=True):
        color = styles[line].color
        panel.annotate(
            f"{line.label}  {line.points[-1].perplexity_ratio:.2f}", (x_of(line.points[-1]) or 0, np.exp(end)),
            xytext=(1.06, (place - low) / (high - low)), textcoords="axes fraction", fontsize=LABEL, va="center",
            color=color, weight="bold" if line.ours else "normal", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4},
        )  # fmt: skip
