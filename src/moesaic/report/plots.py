"""Plots: of a conversion (layer error, expert load, activation rates), of speed, of the frontier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

INK, ACCENT, SOFT = "#1b1b1f", "#2a6f97", "#c9a227"
TOP = 12
"""Perplexity over dense from which a model is of no use, so that its exact place on a chart is of none either."""
OURS = ("default", "specialists", "coactivation")
"""Beginnings of the frontier's lines that are drawn solid."""


def write_plots(metrics: dict[str, Any], folder: Path) -> None:
    """Write `layer_error.png`, `activation_rates.png` and, for routed models, `expert_load.png`."""
    layers = metrics["layers"]
    _layer_error(layers, metrics["plan"], folder / "layer_error.png")
    _activation_rates(layers, folder / "activation_rates.png")
    if layers[0]["expert_tokens"]:
        _expert_load(layers, folder / "expert_load.png")


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _layer_error(layers: list[dict[str, Any]], plan: str, path: Path) -> None:
    figure = Figure(figsize=(7, 3.6))
    axes = figure.subplots()
    x = range(len(layers))
    axes.plot(x, [r["split_error"] for r in layers], "o--", color=SOFT, label="FFN after the split", markersize=4)
    axes.plot(x, [r["error"] for r in layers], "o-", color=ACCENT, label="FFN after recovery", markersize=4)
    axes.plot(x, [r["residual_error"] for r in layers], ":", color=INK, label="residual stream after the layer")
    axes.set(xlabel="layer", ylabel="relative error", title=f"Layer error, plan {plan}")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _activation_rates(layers: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(7, 3.6))
    axes = figure.subplots()
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    for record, color in zip(layers, colors, strict=True):
        axes.plot(range(101), record["activation_rates"][::-1], color=color, linewidth=1)
    axes.axhline(0.1, color=INK, linewidth=0.8, linestyle=":")
    axes.set(
        xlabel="neurons, most active first (%)",
        ylabel="share of tokens where it is\namong the top tenth",
        title="Activation rates, first layer dark to last layer light",
    )
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _expert_load(layers: list[dict[str, Any]], path: Path) -> None:
    load = np.array([record["expert_tokens"] for record in layers], dtype=float)
    share = load / load.sum(1, keepdims=True) * load.shape[1]
    figure = Figure(figsize=(7, 1.6 + 0.14 * len(layers)))
    axes = figure.subplots()
    image = axes.imshow(share, aspect="auto", cmap="cividis", vmin=0, vmax=max(2.0, float(np.quantile(share, 0.98))))
    axes.set(xlabel="routed expert", ylabel="layer", title="Expert load (1 = an even share of the tokens)")
    figure.colorbar(image, ax=axes)
    _save(figure, path)


def write_speed(metrics: dict[str, Any], folder: Path) -> None:
    """Write `speed.png`: speed-up over dense and its limit, for each thing that `benchmark` measured."""
    names = {"decode": "decode\nbatch {}", "prefill": "prefill\n{} tokens", "block": "FFN block\n{} tokens"}
    rows = [(label.format(size), v) for kind, label in names.items() for size, v in metrics[kind].items()]
    figure = Figure(figsize=(7, 3.6))
    axes = figure.subplots()
    x = np.arange(len(rows))
    axes.bar(x, [v["speedup"] for _, v in rows], color=ACCENT, width=0.6, label="measured")
    axes.scatter(x, [v["limit"] for _, v in rows], color=SOFT, marker="_", s=900, linewidth=2.5, label="limit")
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xticks(x, [label for label, _ in rows])
    axes.set(ylabel="speed-up over dense", title=f"Speed, plan {metrics['plan']}, {metrics['threads']} threads")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, folder / "speed.png")


def write_training(history: list[dict[str, Any]], facts: dict[str, Any], path: Path) -> None:
    """Draw a training: the loss of each step, and next-token loss on held-out text with the start as a line."""
    figure = Figure(figsize=(7, 4.6))
    upper, lower = figure.subplots(2, 1, sharex=True)
    minutes = [row["seconds"] / 60 for row in history]
    losses = np.array([row["loss"] for row in history])
    span = max(1, len(losses) // 10)
    upper.plot(minutes, losses, color=SOFT, linewidth=0.6)
    mean = np.convolve(losses, np.ones(span) / span, "valid")
    upper.plot(minutes[span - 1 :], mean, color=ACCENT, label=f"mean of {span} steps")
    upper.legend(frameon=False)
    upper.set(ylabel=f"{facts['objective']} loss\n(nats a token)", title=f"Training, {facts['method']}")
    found = [(row["seconds"] / 60, row["held_out"]) for row in history if "held_out" in row]
    lower.plot(*zip((0.0, facts["held_out_loss_before"]), *found, strict=True), "o-", color=ACCENT, markersize=4)
    lower.axhline(facts["held_out_loss_before"], color=INK, linewidth=0.8, linestyle=":")
    lower.set(xlabel="minutes", ylabel="held-out loss\n(nats a token)")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def write_roofline(result: dict[str, Any], path: Path) -> None:
    """Draw what `benchmark` found of the FFN block under the machine's roof: GFLOP/s over FLOPs a byte."""
    bandwidth, peak = result["roof"]["bytes_per_s"], result["roof"]["flops_per_s"]
    figure = Figure(figsize=(7, 4.2))
    axes = figure.subplots()
    for prefix, color, label in (("dense_", INK, "dense FFN"), ("", ACCENT, "converted FFN")):
        rows = [(int(tokens), row) for tokens, row in result["block"].items()]
        x = [row[f"{prefix}flops"] / row[f"{prefix}bytes"] for _, row in rows]
        y = [row[f"{prefix}flops"] * row[f"{prefix}tokens_per_s"] / tokens / 1e9 for tokens, row in rows]
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


def write_frontier(summary: list[dict[str, Any]], model: str, folder: Path) -> None:
    """Write `frontier.png` and `.svg`: perplexity over the FFN share that is active and over the measured decode speed.

    A line a method (and memory), markers as large as the memory of the experts, bars of one standard deviation. What
    lost more than `TOP` times stands at the upper edge with its number.
    """
    axes_names = [("ffn_active", "share of each FFN active"), ("speedup", "decode speed over dense, batch 1")]
    axes_names = [(key, label) for key, label in axes_names if any(row[key] for row in summary)]
    figure = Figure(figsize=(5.4 * len(axes_names) + 2.2, 4.8))
    panels = figure.subplots(1, len(axes_names), squeeze=False, sharey=True)[0]
    methods = list(dict.fromkeys(row["method"] for row in summary))
    lines = sorted({(methods.index(row["method"]), row["memory_factor"]) for row in summary})
    beyond = [m for m in methods if any(row["method"] == m and row["perplexity_ratio"] > TOP for row in summary)]
    highest = max(row["perplexity_ratio"] for row in summary)
    for panel, (key, label) in zip(panels, axes_names, strict=True):
        for number, factor in lines:
            method = methods[number]
            rows = [r for r in summary if (r["method"], r["memory_factor"]) == (method, factor) and r[key]]
            many = sum(other == number for other, _ in lines) > 1
            shade = colormaps["tab20"](number % 10 * 2 + number // 10 % 2)[:3]  # ten dark ones, then their light ones
            color = (*shade, factor**-0.5)  # paler with more memory
            name = f"{method}, memory x {factor:g}" if many or factor != 1 else method
            below = beyond.index(method) if method in beyond else 0
            _frontier_line(panel, rows, key, color, "-" if method.startswith(OURS) else "--", name, below)
        panel.set(xlabel=label, yscale="log", ylim=(0.95, 1.05 * min(TOP, highest)))
        if key == "ffn_active":
            panel.set_xlim(0, 1)
            panel.xaxis.set_major_formatter(PercentFormatter(1))
        panel.axhline(1, color=INK, linewidth=0.8, linestyle=":")
        panel.yaxis.set_major_locator(FixedLocator([1, 1.1, 1.2, 1.5, 2, 3, 4, 6, 8, TOP]))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_locator(NullLocator())
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="perplexity over dense", title=model)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="center right")
    figure.tight_layout(rect=(0, 0, 1 - 2.2 / figure.get_figwidth(), 1))
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"frontier.{suffix}", dpi=130)


def _frontier_line(
    panel: Any, rows: list[dict[str, Any]], key: str, color: Any, style: str, label: str, below: int
) -> None:
    """One method's line from budget to budget; numbers at the edge are `below` lines further down."""
    rows = sorted(rows, key=lambda row: row["ffn_active"])
    x, y = [r[key] for r in rows], [min(r["perplexity_ratio"], TOP) for r in rows]
    panel.errorbar(
        x, y, [r["perplexity_ratio_deviation"] for r in rows], fmt=style, linewidth=2 if style == "-" else 1,
        color=color, label=label,
    )  # fmt: skip
    panel.scatter(x, y, s=[40 * (r["memory"] or 1) for r in rows], color=color, zorder=3, clip_on=False)
    for row, at in zip(rows, x, strict=True):
        if row["perplexity_ratio"] > TOP:
            offset = (7, 3 - 10 * below)
            text = f"{row['perplexity_ratio']:.3g}"
            panel.annotate(text, (at, TOP), offset, textcoords="offset points", color=color, fontsize=8)
