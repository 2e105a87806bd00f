"""Plots that stand beside a converted model: layer error, expert load, activation rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

INK, ACCENT, SOFT = "#1b1b1f", "#2a6f97", "#c9a227"


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
    axes.plot(x, [r["split_error"] for r in layers], "o--", color=SOFT, label="after the split", markersize=4)
    axes.plot(x, [r["error"] for r in layers], "o-", color=ACCENT, label="after recovery", markersize=4)
    axes.set(xlabel="layer", ylabel="relative error of the FFN's output", title=f"Layer error, plan {plan}")
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
