"""A passage and how many experts its tokens run: a heat map by matplotlib, and a page that holds everything."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from ..results import ExpertGroup, ExpertsInspection, Passage
from .experts import experts_lead, experts_title
from .html import page, table
from .plots import new_figure, optional
from .svg import Axis, Curve, Dot, even_ticks, line_chart

STRIP = 64
"""Tokens side by side in the heat map."""
LABEL = 12
"""Characters of a token that are shown there."""
IN_A_LINE = 8
"""Layers, where a token says its numbers."""
PALE, DARK = (240, 244, 250), (11, 79, 138)
COLOR = "#0b4f8a"
SIGNS = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "↵", " ": "·"})


@optional
def write_heat_map(passage: Passage, path: Path, title: str = "Experts that run") -> None:
    """Draw numbers of experts as colours: the passage's tokens from left to right, in strips, and a row each layer."""
    counts_TB = np.array([token.experts for token in passage.tokens])
    strips = [slice(start, start + STRIP) for start in range(0, len(counts_TB), STRIP)]
    layers = len(passage.layers)
    figure = new_figure(12, 0.7 + len(strips) * (0.75 + max(0.8, 0.13 * layers)))
    figure.set_layout_engine("constrained")
    most = max(passage.default_experts_per_token, int(counts_TB.max()))
    step = max(1, layers // 6)
    every = figure.subplots(len(strips), 1, squeeze=False)[:, 0]
    for axes, strip in zip(every, strips, strict=True):
        image = axes.imshow(
            counts_TB[strip].T, aspect="auto", cmap="cividis", vmin=0, vmax=most, interpolation="nearest"
        )
        names = [shown(token.text)[:LABEL].replace("$", r"\$") for token in passage.tokens[strip]]
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(0, layers, step), [str(layer) for layer in passage.layers[::step]], fontsize=7)
        axes.set_xlim(-0.5, STRIP - 0.5)  # so that a token is as wide in the last strip
        axes.set_ylabel("layer", fontsize=8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.suptitle(title.replace("$", r"\$"), fontsize=11)
    figure.colorbar(image, ax=list(every), label="experts", aspect=30, pad=0.01)
    figure.savefig(path, dpi=130)


def shown(text: str) -> str:
    """Show blanks, line ends and beginnings of characters as signs."""
    return text.translate(SIGNS) or "▯"


def write_passage_page(passage: Passage, path: Path, title: str = "Experts that run") -> None:
    """Write a passage as one page, its tokens coloured by their mean number of experts.

    Args:
        passage: from `inspect_passage`.
        path: the file to write.
        title: of the page.
    """
    path.write_text(page(title, [f"<h1>{escape(title)}</h1>", *_passage(passage)]), encoding="utf-8")


def write_experts_page(result: ExpertsInspection, path: Path) -> None:
    """Write what `inspect --adaptive` found as one page: the passage, and means by layer and by group."""
    title = experts_title(result)
    head = ["tokens", "how many", "experts", "loss (nats)"]
    kinds, domains, quarters = (_rows(found) for found in (result.by_kind, result.by_domain, result.by_difficulty))
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(experts_lead(result))}</p>',
        *_passage(result.passage),
        '<div class="columns">',
        f"<div><h2>By layer</h2>{_by_layer(result.layers, result.experts_by_layer)}</div>",
        f"<div><h2>By kind of token</h2>{table(head, kinds)}</div>",
        f"<div><h2>By domain</h2>{table(head, domains)}</div>",
        f"<div><h2>By difficulty</h2>{table(head, quarters)}"
        '<p class="note">Quarters of the tokens by the loss of predicting the next one.</p></div>',
        "</div>",
    ]
    path.write_text(page(title, body), encoding="utf-8")


def _rows(groups: dict[str, ExpertGroup]) -> list[list[str]]:
    return [
        [escape(name), f"{g.tokens:,}", f"{g.experts_per_token:.2f}", f"{g.loss:.3f}"] for name, g in groups.items()
    ]


def _by_layer(layers: Sequence[int], experts: Sequence[float]) -> str:
    dots = [Dot(n, mean, f"layer {layers[n]}\n{mean:.2f} experts") for n, mean in enumerate(experts)]
    high, last = 1.1 * max(1.0, *experts), len(layers) - 1
    marks = [(n, str(layers[n])) for n in range(0, last + 1, max(1, last // 6))]
    x, y = Axis("layer", 0, max(1, last), marks), Axis("experts", 0, high, even_ticks(0, high))
    return line_chart([Curve("0", dots, COLOR)], x, y, "experts by layer")


def _passage(passage: Passage) -> list[str]:
    means = [sum(token.experts) / len(token.experts) for token in passage.tokens]
    low, high = min(means), max(means)
    spans = []
    for token, mean in zip(passage.tokens, means, strict=True):
        color = _style((mean - low) / (high - low) if high > low else 0.0)
        tip = "\n".join([
            f"{shown(token.text)}  ({token.kind})", f"{mean:.2f} experts, loss {token.loss:.2f} nats",
            *_by_layer_lines(passage.layers, token.experts),
        ])  # fmt: skip
        text = escape(token.text) if token.text.strip("\n") else shown(token.text) + token.text
        counts = " ".join(map(str, token.experts))
        spans.append(
            f'<span style="{color}" data-experts="{counts}" data-tip="{escape(tip)}" tabindex="0">{text}</span>'
        )
    choices = [f'<option value="{n}">layer {layer}</option>' for n, layer in enumerate(passage.layers)]
    return [
        f'<p class="note">Experts that run: <b class="end" style="{_style(0)}">{low:.2f}</b> to <b class="end" '
        f'style="{_style(1)}">{high:.2f}</b>, <select class="layers"><option value="">mean over layers</option>'
        f"{''.join(choices)}</select>. The routers take {passage.default_experts_per_token} by themselves. Point at a "
        "token, or tap it, for all layers.</p>",
        f'<pre class="tokens">{"".join(spans)}</pre>',
    ]


def _by_layer_lines(layers: Sequence[int], experts: Sequence[int]) -> list[str]:
    lines = []
    for start in range(0, len(layers), IN_A_LINE):
        part = layers[start : start + IN_A_LINE]
        name = f"layer {part[0]}" if len(part) == 1 else f"layers {part[0]}-{part[-1]}"
        lines.append(f"{name}: {' '.join(map(str, experts[start : start + IN_A_LINE]))}")
    return lines


def _style(depth: float) -> str:
    """Mix a colour, pale at 0 and dark at 1, as page.js does."""
    mixed = ",".join(f"{a + (b - a) * depth:.0f}" for a, b in zip(PALE, DARK, strict=True))
    return f"background:rgb({mixed});color:{'#fff' if depth > 0.55 else '#1b1b1f'}"
