"""Draw docs/images/moesaic.png: a dense FFN, its neurons in groups, and the experts of a token.

python scripts/draw_picture.py
"""

from __future__ import annotations

import random
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

OUT = Path(__file__).parent.parent / "docs" / "images" / "moesaic.png"
GROUPS, SHARED, CHOSEN, EACH = 8, (0,), (4,), 6
COLOURS = ["#1f6feb", "#e36209", "#2da44e", "#8250df", "#bf3989", "#9a6700", "#1b7c83", "#57606a"]
IDLE = "#d0d7de"


def dots(ax: Axes, x: float, y: float, colours: list[str]) -> None:
    """A row of neurons."""
    for i, colour in enumerate(colours):
        ax.plot(x + 0.32 * i, y, "o", color=colour, markersize=7.5)


def box(ax: Axes, x: float, y: float, width: float, height: float, edge: str, face: str = "white") -> None:
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.05,rounding_size=0.12")
    shape.set(edgecolor=edge, facecolor=face, linewidth=1.6)
    ax.add_patch(shape)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = "#57606a") -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=colour, linewidth=1.4))


def draw() -> Figure:
    """Three panels, left to right."""
    figure = Figure(figsize=(11, 4.1), dpi=130, facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 14), ylim=(-0.75, 5.2))
    ax.axis("off")

    neurons = [COLOURS[g] for g in range(GROUPS) for _ in range(EACH)]
    random.Random(3).shuffle(neurons)
    box(ax, 0.25, 0.15, 2.2, 4.0, "#57606a")
    for row in range(GROUPS):
        dots(ax, 0.55, 0.4 + 0.5 * row, neurons[EACH * row : EACH * (row + 1)])
    ax.text(1.35, 4.6, "dense FFN", ha="center", fontsize=13, weight="bold")
    ax.text(1.35, -0.35, "every neuron runs\nfor every token", ha="center", va="center", fontsize=10.5)

    arrow(ax, (2.7, 2.15), (4.05, 2.15))
    ax.text(3.35, 2.35, "calibrate", ha="center", fontsize=10.5)
    for group in range(GROUPS):
        y = 0.4 + 0.5 * (GROUPS - 1 - group)
        box(ax, 4.3, y - 0.13, 2.2, 0.26, COLOURS[group])
        dots(ax, 4.6, y, [COLOURS[group]] * EACH)
    ax.text(5.4, 4.6, "groups of neurons", ha="center", fontsize=13, weight="bold")
    ax.text(5.4, -0.35, "that matter for\nthe same tokens", ha="center", va="center", fontsize=10.5)

    arrow(ax, (6.75, 2.15), (8.1, 2.15))
    ax.text(7.42, 2.35, "convert", ha="center", fontsize=10.5)
    box(ax, 8.35, 1.75, 1.15, 0.8, "#24292f", "#f6f8fa")
    ax.text(8.925, 2.15, "router", ha="center", va="center", fontsize=11.5)
    for group in range(GROUPS):
        y = 0.4 + 0.5 * (GROUPS - 1 - group)
        runs = group in SHARED or group in CHOSEN
        colour = COLOURS[group] if runs else IDLE
        box(ax, 10.5, y - 0.13, 2.2, 0.26, colour)
        dots(ax, 10.8, y, [colour] * EACH)
        if runs:
            note = "shared:\nalways runs" if group in SHARED else "chosen for\nthis token"
            ax.text(12.85, y, note, va="center", fontsize=10, color=colour)
        if group in CHOSEN:
            arrow(ax, (9.6, 2.15), (10.4, y), colour)
    ax.text(11.6, 4.6, "Mixture-of-Experts", ha="center", fontsize=13, weight="bold")
    ax.text(
        11.6,
        -0.35,
        "all neurons kept, 2 of 8 groups\nrun for a token (S1A1E8)",
        ha="center",
        va="center",
        fontsize=10.5,
    )
    return figure


if __name__ == "__main__":
    OUT.parent.mkdir(parents=True, exist_ok=True)
    draw().savefig(OUT, metadata={"Software": None})
