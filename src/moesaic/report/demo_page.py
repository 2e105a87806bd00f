"""The demo's report as one page: numbers with what they mean, the text of both, layers, machine, commands."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from ..results import DemoResult, LayerRecord, Typed
from .console import command, here
from .demo import next_commands, number_rows, verdicts
from .html import page, table
from .svg import Axis, Curve, Dot, even_ticks, heat_map, line_chart

PAGE = "report.html"
INK, ACCENT, SOFT = "#1b1b1f", "#0b4f8a", "#c9a227"
MEANING = {
    "parameters in memory": "Nothing is thrown away: the experts together hold the dense model's feed-forward layers.",
    "parameters a token runs": "The router picks a few experts for each token; the others rest.",
    "perplexity on unseen text": "How surprised the model is by text it has not seen. Lower is better.",
    "writes in": "Decoding, batch 1: how fast text appears. Higher is better.",
    "reads in": "Prefill: how fast a long prompt is taken in. Higher is better.",
}


def write_demo_page(result: DemoResult, path: Path) -> None:
    """Write the page."""
    made = result.conversion
    rows = [
        [escape(label), dense, f"<b>{moe}</b>", ratio, escape(word), _meaning(label)]
        for label, dense, moe, ratio, word in number_rows(result)
    ]
    numbers = table(["", "dense", "MoE", "MoE / dense", "", "what it says"], rows, prose=True)
    found = "\n".join(
        f'<p class="{"ours" if good else "bad"}">{"+" if good else "−"} {escape(sentence)}</p>'
        for good, sentence in verdicts(result)
    )
    again = command(
        "moesaic", "demo", "--model", result.model, "--active", f"{result.active:g}", "--out", here(made.output)
    )
    body = [
        f"<h1>{escape(result.name)}: dense, and as a Mixture-of-Experts</h1>",
        f'<p class="lead">Converted without training in {made.seconds:.0f} s on {escape(made.machine)}. '
        f"Plan {made.plan}: {made.ffn_active:.0%} of each feed-forward layer runs per token.</p>",
        found,
        *([f"<p>{escape(result.llama_cpp_missing)}</p>"] if result.llama_cpp_missing else []),
        "<h2>Numbers</h2>",
        numbers,
        f'<p class="note">transformers: {escape(result.speed.protocol)}; threads: {result.speed.threads}, '
        f"{result.speed.dtype}.{_llama_cpp(result)}</p>",
        "<h2>Text, typed by both</h2>",
        *map(_typed, result.typed),
        "<h2>Layers</h2>",
        _layers(made.layers),
        "<h2>Next</h2>",
        *[f"<p>{escape(why)}</p>\n<pre>{escape(line)}</pre>" for line, why in next_commands(result)],
        "<h2>How this was made</h2>",
        f"<pre>{escape(again)}</pre>",
        f'<p class="note">{escape(", ".join(f"{name} {version}" for name, version in made.versions.items()))}. '
        "Every number is in metrics.json beside this page.</p>",
    ]
    path.write_text(page(f"{result.name} as a Mixture-of-Experts", body), encoding="utf-8")


def _llama_cpp(result: DemoResult) -> str:
    found = result.llama_cpp
    if not found:
        return ""
    how = f"{found.rounds} alternating rounds after a warm-up, medians; prompt {found.prompt}, {found.new} new tokens"
    return escape(f" llama.cpp ({found.version}): {how}; threads: {found.threads}, {found.type}.")


def _meaning(label: str) -> str:
    return next(text for start, text in MEANING.items() if label.startswith(start))


def _typed(typed: Typed) -> str:
    sides = "".join(
        f"<div><h3>{title}</h3><pre><b>{escape(typed.prompt)}</b>{escape(text)}</pre></div>"
        for title, text in (("dense", typed.dense), ("Mixture-of-Experts", typed.converted))
    )
    return f'<div class="columns">{sides}</div>'


def _layers(layers: Sequence[LayerRecord]) -> str:
    names = {
        "split_error": ("FFN as split into experts", SOFT, "6 4"),
        "error": ("FFN after recovery", ACCENT, ""),
        "residual_error": ("what leaves the layer", INK, "2 4"),
    }
    curves = []
    for key, (name, color, dashes) in names.items():
        values = [getattr(layer, key) or 0.0 for layer in layers]
        dots = [Dot(i, value, f"layer {i}\n{name}: {value:.3f}") for i, value in enumerate(values)]
        curves.append(Curve(key, dots, color, dashes))
    high = 1.1 * max(dot.y for curve in curves for dot in curve.dots)
    last = len(layers) - 1
    x = Axis("layer", 0, max(1, last), [(i, str(i)) for i in range(0, last + 1, max(1, last // 6))])
    y = Axis("relative error", 0, high, even_ticks(0, high))
    legend = "".join(
        f'<label><input type="checkbox" value="{key}" checked><i style="border-color:{color}"></i>{name}</label>'
        for key, (name, color, _) in names.items()
    )
    chart = line_chart(curves, x, y, "layer error")
    error = (
        "<div><h3>Relative error of each layer</h3><p class=note>0 is the dense model. Recovery in closed form wins "
        f'back what the split lost.</p><div class="switches">{legend}</div>{chart}</div>'
    )
    loads = [[n * len(r.expert_tokens) / max(1, sum(r.expert_tokens)) for n in r.expert_tokens] for r in layers]
    if not all(loads):
        return f'<div class="columns">{error}</div>'
    tips = [
        [f"layer {i}, expert {j}\n{share:.2f} of an even share" for j, share in enumerate(load)]
        for i, load in enumerate(loads)
    ]
    load = (
        "<div><h3>How often each expert is chosen</h3><p class=note>Pale: seldom. Dark: twice an even share or more."
        f"</p>{heat_map(loads, tips, 'routed expert (a row is a layer)', 'expert load')}</div>"
    )
    return f'<div class="columns">{error}{load}</div>'
