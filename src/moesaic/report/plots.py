"""Pictures by matplotlib: of a conversion (layer error, expert load, activation rates), of speed, of a training.

matplotlib is optional: without it nothing is drawn, and one line says how to get it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec

import numpy as np

from ..errors import InputError
from ..results import (
    AdaptResult,
    AdaptStep,
    BenchmarkResult,
    ConversionResult,
    DemoResult,
    FinetuneResult,
    LayerRecord,
    StepRecord,
)
from .modality import even_shares, modalities_of, name_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MISSING = "matplotlib is not installed; install it with: pip install 'moesaic[plots]'"
INK, ACCENT, SOFT = "#1b1b1f", "#2a6f97", "#c9a227"
EXPERT_LOAD = "Expert load (1 = an even share of the tokens)"
P = ParamSpec("P")


@functools.cache
def _say_missing() -> None:
    logging.getLogger(__name__).warning(f"plots are left out: {MISSING}")


def check_matplotlib() -> None:
    """Check that pictures can be drawn, where a user asked for one by name.

    Raises:
        InputError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise InputError(f"pictures need matplotlib, and {MISSING}")


def optional(draw: Callable[P, None]) -> Callable[P, None]:
    """Leave the picture out where matplotlib is missing, and say so once."""

    @functools.wraps(draw)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        if find_spec("matplotlib") is None:
            _say_missing()
        else:
            draw(*args, **kwargs)

    return run


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure, inches."""
    from matplotlib.figure import Figure  # slow to import

    return Figure(figsize=(width, height))


@optional
def write_plots(result: ConversionResult, folder: Path) -> None:
    """Write `layer_error.png`, `activation_rates.png` and, for routed models, `expert_load.png`."""
    layers = result.layers
    _layer_error(layers, result.plan, folder / "layer_error.png")
    _activation_rates([r for r in layers if r.activation_rates], folder / "activation_rates.png")
    routed = [record for record in layers if record.expert_tokens]
    if routed:
        _expert_load(routed, folder / "expert_load.png")


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _layer_error(layers: Sequence[LayerRecord], plan: str, path: Path) -> None:
    by_modality = [record.error_by_modality or {} for record in layers]  # of a layer that stays dense there is none
    modalities = modalities_of(by_modality)
    figure = new_figure(9 if modalities else 7, 3.6)
    axes = figure.subplots()
    x = range(len(layers))
    axes.plot(x, [r.split_error for r in layers], "o--", color=SOFT, label="FFN after the split", markersize=4)
    axes.plot(x, [r.error for r in layers], "o-", color=ACCENT, label="FFN after recovery", markersize=4)
    for modality, marker in zip(modalities, "^s", strict=False):
        errors = [found.get(modality, r.error) for r, found in zip(layers, by_modality, strict=True)]
        label = f"the same on {name_of(modality)}"
        axes.plot(x, errors, f"{marker}-", color=ACCENT, alpha=0.45, linewidth=1, label=label, markersize=4)
    residual = [np.nan if r.residual_error is None else r.residual_error for r in layers]
    axes.plot(x, residual, ":", color=INK, label="residual stream after the layer")
    axes.set(xlabel="layer", ylabel="relative error", title=f"Layer error, plan {plan}")
    axes.set_ylim(bottom=0)
    if modalities:  # five lines leave no room for their names
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    else:
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _activation_rates(layers: Sequence[LayerRecord], path: Path) -> None:
    figure = new_figure(7, 3.6)
    axes = figure.subplots()
    from matplotlib import colormaps

    colors = colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    for record, color in zip(layers, colors, strict=True):
        axes.plot(range(101), record.activation_rates[::-1], color=color, linewidth=1)
    axes.axhline(0.1, color=INK, linewidth=0.8, linestyle=":")
    axes.set(
        xlabel="neurons, most active first (%)",
        ylabel="share of tokens where it is\namong the top tenth",
        title="Activation rates, first layer dark to last layer light",
    )
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _expert_load(layers: Sequence[LayerRecord], path: Path) -> None:
    by_modality = [record.expert_tokens_by_modality or {} for record in layers]
    loads = {"all tokens": [record.expert_tokens for record in layers]}
    loads |= {name_of(m): [found[m] for found in by_modality] for m in modalities_of(by_modality)}
    even = {name: np.array([even_shares(row) for row in rows]) for name, rows in loads.items()}
    top = max(2.0, *(float(np.quantile(share, 0.98)) for share in even.values()))
    figure = new_figure(7, 1.6 + 0.14 * len(layers))
    panels = figure.subplots(1, len(even), sharey=True, squeeze=False)[0]
    for axes, (name, share) in zip(panels, even.items(), strict=True):
        image = axes.imshow(share, aspect="auto", cmap="cividis", vmin=0, vmax=top)
        axes.set(xlabel="routed expert", title=name if len(even) > 1 else EXPERT_LOAD)
    panels[0].set_ylabel("layer")
    if len(layers) <= layers[-1].layer:  # some stay dense
        panels[0].set_yticks(range(len(layers)), [str(record.layer) for record in layers])
    if len(even) > 1:
        figure.suptitle(EXPERT_LOAD)
    figure.colorbar(image, ax=panels[-1])
    _save(figure, path)


@optional
def write_speed(result: DemoResult, folder: Path) -> None:
    """Write `speed.png`: speed-up over dense and its limit, for each thing that `benchmark` measured."""
    speed = result.speed
    kinds = (
        ("decode\nbatch {}", speed.decode), ("prefill\n{} tokens", speed.prefill),
        ("FFN block\n{} tokens", speed.block),
    )  # fmt: skip
    rows = [(label.format(size), one) for label, speeds in kinds for size, one in speeds.items()]
    figure = new_figure(7, 3.6)
    axes = figure.subplots()
    x = np.arange(len(rows))
    axes.bar(x, [one.speedup for _, one in rows], color=ACCENT, width=0.6, label="measured")
    limits = [one.limit for _, one in rows]
    axes.scatter(x, limits, color=SOFT, marker="_", s=900, linewidth=2.5, label="limit")
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xticks(x, [label for label, _ in rows])
    axes.set(ylabel="speed-up over dense", title=f"Speed, plan {result.conversion.plan}, {speed.threads} threads")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, folder / "speed.png")


@optional
def write_training(history: Sequence[StepRecord], result: FinetuneResult, path: Path) -> None:
    """Draw a training: the loss of each step, and next-token loss on held-out text with the start as a line."""
    figure = new_figure(7, 4.6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    minutes = [row.seconds / 60 for row in history]
    losses = np.array([row.loss for row in history])
    span = max(1, len(losses) // 10)
    upper.plot(minutes, losses, color=SOFT, linewidth=0.6)
    mean = np.convolve(losses, np.ones(span) / span, "valid")
    upper.plot(minutes[span - 1 :], mean, color=ACCENT, label=f"mean of {span} steps")
    upper.legend(frameon=False)
    upper.set(ylabel=f"{result.objective} loss\n(nats a token)", title=f"Training, {result.method}")
    before = result.held_out_loss_before
    found = [(row.seconds / 60, row.held_out) for row in history if row.held_out is not None]
    x, y = zip((0.0, before), *found, strict=True)
    lower.plot(x, y, "o-", color=ACCENT, markersize=4)
    lower.axhline(before, color=INK, linewidth=0.8, linestyle=":")
    lower.set(xlabel="minutes", ylabel="held-out loss\n(nats a token)")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def write_roofline(result: BenchmarkResult, path: Path) -> None:
    """Draw what `benchmark` found of the FFN block under the machine's roof: GFLOP/s over FLOPs a byte.

    Raises:
        InputError: matplotlib is missing.
    """
    check_matplotlib()
    figure = new_figure(7, 4.2)
    axes = figure.subplots()
    sizes = [int(tokens) for tokens in result.block]
    dense = [(s.dense_flops, s.dense_bytes, s.dense_tokens_per_s) for s in result.block.values()]
    made = [(s.flops, s.bytes, s.tokens_per_s) for s in result.block.values()]
    for rows, color, label, align in ((dense, INK, "dense FFN", "right"), (made, ACCENT, "converted FFN", "left")):
        x = [flops / bytes_ for flops, bytes_, _ in rows]
        y = [flops * speed / tokens / 1e9 for tokens, (flops, _, speed) in zip(sizes, rows, strict=True)]
        axes.plot(x, y, "o", color=color, label=label)
        side = (-6, 4) if align == "right" else (6, -10)
        for tokens, at_x, at_y in zip(sizes, x, y, strict=True):
            axes.annotate(
                str(tokens), (at_x, at_y), side, textcoords="offset points", ha=align, color=color, fontsize=8
            )
    intensity = np.geomspace(0.5, 2 * axes.get_xlim()[1], 200)
    roof = np.minimum(result.roof.bytes_per_s * intensity, result.roof.flops_per_s) / 1e9
    axes.plot(intensity, roof, color=SOFT, label="one large product", zorder=0)
    axes.set(
        xscale="log", yscale="log", xlabel="FLOPs per byte of weights", ylabel="GFLOP/s",
        title=f"FFN block by tokens, {result.threads} threads, {result.dtype}",
    )  # fmt: skip
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


@optional
def write_adaptation(history: Sequence[AdaptStep], result: AdaptResult, path: Path) -> None:
    """Draw how many experts ran and what that cost over the steps of a training, and where each layer ended."""
    figure = new_figure(7, 6.6)
    upper, middle, lower = figure.subplots(3)
    steps = [row.step for row in history]
    default = result.default_experts_per_token
    upper.plot(steps, [row.experts_per_token for row in history], color=ACCENT, linewidth=0.9)
    upper.axhline(default * result.target_active, color=INK, linewidth=0.8, linestyle=":")
    upper.set(ylabel="experts a token", title=f"{result.learner} to {result.target_active:.0%} of {default:g}")
    gaps = np.array([row.gap for row in history])
    span = max(1, len(gaps) // 10)
    middle.plot(steps, gaps, color=SOFT, linewidth=0.6)
    middle.plot(steps[span - 1 :], np.convolve(gaps, np.ones(span) / span, "valid"), color=ACCENT)
    middle.axhline(0, color=INK, linewidth=0.8, linestyle=":")
    middle.set(xlabel="step", ylabel="loss above default\n(nats a token)")
    lower.bar(range(len(result.experts_by_layer)), result.experts_by_layer, color=ACCENT)
    lower.axhline(default, color=INK, linewidth=0.8, linestyle=":")
    lower.set(xlabel="layer", ylabel="experts a token\n(held-out text)")
    for axes in (upper, middle, lower):
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
