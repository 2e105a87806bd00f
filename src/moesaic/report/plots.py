"""Pictures by matplotlib: of a conversion (layer error, expert load, activation rates), of speed, training, frontier.

matplotlib is optional: without it nothing is drawn, and one line says how to get it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec

import numpy as np

from ..errors import InputError
from ..results import FrontierSummary
from .frontier import Line, chosen_lines, lines_of, spread
from .rows import number, numbers, part, parts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = "matplotlib is not installed; install it with: pip install 'moesaic[plots]'"
INK, ACCENT, SOFT = "#1b1b1f", "#2a6f97", "#c9a227"
BLUES = ("#0b4f8a", "#2f80c4", "#6aa9e0")
"""Ours on the frontier's chart."""
GREYS = (("#4a4a4a", "--", "s"), ("#7d7d7d", "-.", "^"), ("#a3a3a3", ":", "D"), ("#a3a3a3", "--", "v"))
"""Other methods: colour, dashes, marker."""
TOP = 25
"""Perplexity over dense at which the frontier's chart ends: a model beyond is of no use."""
TICKS = (1, 1.2, 1.5, 2, 3, 5, 10, 20)
LABEL = 8.5
P = ParamSpec("P")


@functools.cache
def _say_missing() -> None:
    logging.getLogger(__name__).warning(f"plots are left out: {MISSING}")


def check_matplotlib() -> None:
    """Raises InputError if no picture can be drawn, for those that a user asked for by name."""
    if find_spec("matplotlib") is None:
        raise InputError(f"pictures need matplotlib, and {MISSING}")


def _optional(draw: Callable[P, None]) -> Callable[P, None]:
    """Leave the picture out where matplotlib is missing, and say so once."""

    @functools.wraps(draw)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        if find_spec("matplotlib") is None:
            _say_missing()
        else:
            draw(*args, **kwargs)

    return run


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # slow to import

    return Figure(figsize=(width, height))


@_optional
def write_plots(metrics: Mapping[str, object], folder: Path) -> None:
    """Write `layer_error.png`, `activation_rates.png` and, for routed models, `expert_load.png`."""
    layers = parts(metrics, "layers")
    _layer_error(layers, str(metrics["plan"]), folder / "layer_error.png")
    _activation_rates(layers, folder / "activation_rates.png")
    if layers[0]["expert_tokens"]:
        _expert_load(layers, folder / "expert_load.png")


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _layer_error(layers: Sequence[Mapping[str, object]], plan: str, path: Path) -> None:
    figure = _figure(7, 3.6)
    axes = figure.subplots()
    x = range(len(layers))
    axes.plot(
        x, [number(r, "split_error") for r in layers], "o--", color=SOFT, label="FFN after the split", markersize=4
    )
    axes.plot(x, [number(r, "error") for r in layers], "o-", color=ACCENT, label="FFN after recovery", markersize=4)
    axes.plot(x, [number(r, "residual_error") for r in layers], ":", color=INK, label="residual stream after the layer")
    axes.set(xlabel="layer", ylabel="relative error", title=f"Layer error, plan {plan}")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _activation_rates(layers: Sequence[Mapping[str, object]], path: Path) -> None:
    figure = _figure(7, 3.6)
    axes = figure.subplots()
    from matplotlib import colormaps

    colors = colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    for record, color in zip(layers, colors, strict=True):
        axes.plot(range(101), numbers(record, "activation_rates")[::-1], color=color, linewidth=1)
    axes.axhline(0.1, color=INK, linewidth=0.8, linestyle=":")
    axes.set(
        xlabel="neurons, most active first (%)",
        ylabel="share of tokens where it is\namong the top tenth",
        title="Activation rates, first layer dark to last layer light",
    )
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _expert_load(layers: Sequence[Mapping[str, object]], path: Path) -> None:
    load = np.array([numbers(record, "expert_tokens") for record in layers], dtype=float)
    share = load / load.sum(1, keepdims=True) * load.shape[1]
    figure = _figure(7, 1.6 + 0.14 * len(layers))
    axes = figure.subplots()
    image = axes.imshow(share, aspect="auto", cmap="cividis", vmin=0, vmax=max(2.0, float(np.quantile(share, 0.98))))
    axes.set(xlabel="routed expert", ylabel="layer", title="Expert load (1 = an even share of the tokens)")
    figure.colorbar(image, ax=axes)
    _save(figure, path)


@_optional
def write_speed(metrics: Mapping[str, object], folder: Path) -> None:
    """Write `speed.png`: speed-up over dense and its limit, for each thing that `benchmark` measured."""
    names = {"decode": "decode\nbatch {}", "prefill": "prefill\n{} tokens", "block": "FFN block\n{} tokens"}
    rows = [
        (label.format(size), part(part(metrics, kind), size))
        for kind, label in names.items()
        for size in part(metrics, kind)
    ]
    figure = _figure(7, 3.6)
    axes = figure.subplots()
    x = np.arange(len(rows))
    axes.bar(x, [number(v, "speedup") for _, v in rows], color=ACCENT, width=0.6, label="measured")
    axes.scatter(x, [number(v, "limit") for _, v in rows], color=SOFT, marker="_", s=900, linewidth=2.5, label="limit")
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xticks(x, [label for label, _ in rows])
    axes.set(ylabel="speed-up over dense", title=f"Speed, plan {metrics['plan']}, {metrics['threads']} threads")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, folder / "speed.png")


@_optional
def write_training(history: Sequence[Mapping[str, object]], facts: Mapping[str, object], path: Path) -> None:
    """Draw a training: the loss of each step, and next-token loss on held-out text with the start as a line."""
    figure = _figure(7, 4.6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    minutes = [number(row, "seconds") / 60 for row in history]
    losses = np.array([number(row, "loss") for row in history])
    span = max(1, len(losses) // 10)
    upper.plot(minutes, losses, color=SOFT, linewidth=0.6)
    mean = np.convolve(losses, np.ones(span) / span, "valid")
    upper.plot(minutes[span - 1 :], mean, color=ACCENT, label=f"mean of {span} steps")
    upper.legend(frameon=False)
    upper.set(ylabel=f"{facts['objective']} loss\n(nats a token)", title=f"Training, {facts['method']}")
    before = number(facts, "held_out_loss_before")
    found = [(number(row, "seconds") / 60, number(row, "held_out")) for row in history if "held_out" in row]
    x, y = zip((0.0, before), *found, strict=True)
    lower.plot(x, y, "o-", color=ACCENT, markersize=4)
    lower.axhline(before, color=INK, linewidth=0.8, linestyle=":")
    lower.set(xlabel="minutes", ylabel="held-out loss\n(nats a token)")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def write_roofline(result: Mapping[str, object], path: Path) -> None:
    """Draw what `benchmark` found of the FFN block under the machine's roof: GFLOP/s over FLOPs a byte.

    Raises:
        InputError: matplotlib is missing.
    """
    check_matplotlib()
    bandwidth, peak = (number(part(result, "roof"), f"{name}_per_s") for name in ("bytes", "flops"))
    figure = _figure(7, 4.2)
    axes = figure.subplots()
    for prefix, color, label in (("dense_", INK, "dense FFN"), ("", ACCENT, "converted FFN")):
        rows = [(int(tokens), part(part(result, "block"), tokens)) for tokens in part(result, "block")]
        x = [number(row, f"{prefix}flops") / number(row, f"{prefix}bytes") for _, row in rows]
        y = [
            number(row, f"{prefix}flops") * number(row, f"{prefix}tokens_per_s") / tokens / 1e9 for tokens, row in rows
        ]
        axes.plot(x, y, "o", color=color, label=label)
        for (tokens, _), at_x, at_y in zip(rows, x, y, strict=True):
            side = (-6, 4) if prefix else (6, -10)
            axes.annotate(
                str(tokens), (at_x, at_y), side, textcoords="offset points", ha="right" if prefix else "left",
                color=color, fontsize=8,
            )  # fmt: skip
    intensity = np.geomspace(0.5, 2 * axes.get_xlim()[1], 200)
    axes.plot(intensity, np.minimum(bandwidth * intensity, peak) / 1e9, color=SOFT, label="one large product", zorder=0)
    axes.set(
        xscale="log", yscale="log", xlabel="FLOPs per byte of weights", ylabel="GFLOP/s",
        title=f"FFN block by tokens, {result['threads']} threads, {result['dtype']}",
    )  # fmt: skip
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


@_optional
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
    figure = _figure(9.6, 4.8)
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
        figure.text(0.985, 0.89, "grey: other methods", fontsize=10, color=GREYS[1][0], ha="right")
    _label_lines(panels[0], lines, styles, panels[0].get_position().height * figure.get_figheight() * 72)
    return figure


def _styles(lines: Sequence[Line]) -> dict[Line, tuple[str, str, str]]:
    """Colour, dashes and marker of each line: ours blue, the others grey."""
    ours = [line for line in lines if line.ours]
    rivals = [line for line in lines if not line.ours]
    found = {line: (BLUES[i % len(BLUES)], "-", "osD^vP"[i % 6]) for i, line in enumerate(ours)}
    return found | {line: GREYS[i % len(GREYS)] for i, line in enumerate(rivals)}


def _draw_line(panel: Axes, line: Line, style: tuple[str, str, str], speed: bool) -> None:
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


def _label_lines(
    panel: Axes, lines: Sequence[Line], styles: Mapping[Line, tuple[str, str, str]], height: float
) -> None:
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
        color = styles[line][0]
        panel.annotate(
            f"{line.label}  {line.points[-1].perplexity_ratio:.2f}", (line.points[-1].ffn_active, np.exp(end)),
            xytext=(1.06, (place - low) / (high - low)), textcoords="axes fraction", fontsize=LABEL, va="center",
            color=color, weight="bold" if line.ours else "normal", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4},
        )  # fmt: skip
