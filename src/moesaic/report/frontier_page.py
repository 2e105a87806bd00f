"""The frontier as one interactive page: all methods with switches, their numbers where one points, a table of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from operator import attrgetter
from pathlib import Path

from ..results import EvaluationResult, FrontierResult, FrontierSibling, FrontierSummary
from .frontier import (
    LIMIT,
    LINE,
    SHARES,
    SIBLING,
    SPEEDS,
    DenseDot,
    Line,
    chosen_lines,
    decode,
    lines_of,
    over_line,
    sibling_dots,
)
from .html import page, table
from .svg import Axis, Curve, Dot, even_ticks, line_chart

BLUES = ("#0b4f8a", "#2f80c4", "#6aa9e0", "#12375c", "#4d6fae", "#7d8fd6", "#3aa0a8", "#0f766e")
OTHERS = ("#8a5a00", "#b3541e", "#6b6b6b", "#8e2f6b", "#c77d9b", "#5f7d1f", "#9aa34d", "#a33a3a", "#c98f7a", "#77756b")
TICKS = (1, 1.2, 1.5, 2, 3, 5, 10, 20)
FAMILY = "siblings"
"""The key of the siblings' curve."""
HIGHEST = 30
"""Perplexity over dense at which the chart ends; the table has every number."""


def write_frontier_page(result: FrontierResult, path: Path, model: str) -> None:
    """Write a frontier as one interactive page: every method, with switches, its numbers and a table of all rows.

    Args:
        result: what `frontier.json` holds.
        path: the file to write.
        model: how to call the model in the title.
    """
    lines = lines_of(result.summary)
    few = chosen_lines(lines)
    theirs = f", which is {result.dense.perplexity:.2f} ({_text(result.dense)})" if result.dense else ""
    colors = _colors(lines)
    charts = [_chart(lines, few, colors, result.siblings, speed=False)]
    if any(point.speedup for line in lines for point in line.points):
        charts.append(_chart(lines, few, colors, result.siblings, speed=True))
    body = [
        f"<h1>{escape(model)} as a Mixture-of-Experts: what is lost</h1>",
        f'<p class="lead">Perplexity over the dense model\'s{escape(theirs)}. Lower is better; at 1 nothing is lost.'
        "</p>",
        '<p class="note">Point at a dot, or tap it, for its numbers. Blue: moesaic. Bounds are no methods: they show '
        "what perfect routing would reach.</p>",
        '<p><button data-show="few">the main lines</button> <button data-show="all">all</button> '
        '<button data-show="none">none</button></p>',
        *[f"<p>{escape(sentence.replace('`', ''))}</p>" for sentence in result.verdict],
        _switches(lines, few, colors, result.siblings),
        '<div class="columns">' + "\n".join(f"<div>{chart}</div>" for chart in charts) + "</div>",
        "<h2>All numbers</h2>",
        _numbers(result.summary, result.siblings),
        *[f'<p class="note">{escape(LINE)}</p>'] * bool(result.siblings),
        *[f'<p class="note">{LIMIT}.</p>'] * any(row.speed_is == "limit" for row in result.summary),
        *[f'<p class="note">Left out: {escape(k)}: {escape(v)}</p>' for k, v in result.unfit.items()],
        f'<p class="note">{escape(result.machine)}; {escape(_pairs(result.versions))}; '
        f"{escape(_pairs(result.setting))}.</p>",
    ]
    path.write_text(page(f"{model}: frontier", body), encoding="utf-8")


def _text(dense: EvaluationResult) -> str:
    return f"{dense.protocol}, {dense.tokens:,} tokens of {dense.text}"


def _pairs(row: Mapping[str, object]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in row.items() if value not in (None, []))


def _colors(lines: Sequence[Line]) -> dict[Line, str]:
    ours = [line for line in lines if line.ours]
    rest = [line for line in lines if not line.ours]
    found = {line: BLUES[i % len(BLUES)] for i, line in enumerate(ours)}
    return found | {line: OTHERS[i % len(OTHERS)] for i, line in enumerate(rest)}


def _switches(
    lines: Sequence[Line], few: Sequence[Line], colors: Mapping[Line, str], siblings: Sequence[FrontierSibling]
) -> str:
    parts = ['<div class="switches">']
    for i, line in enumerate(lines):
        checked = " checked" if line in few else ""
        label = escape(line.label) + (" (bound)" if line.bound else "")
        parts.append(
            f'<label><input type="checkbox" value="{i}"{checked}><i style="border-color:{colors[line]}"></i>'
            f"<span{' class=ours' if line.ours else ''}>{label}</span></label>"
        )
    if siblings:
        parts.append(
            f'<label><input type="checkbox" value="{FAMILY}" checked><i style="border-color:{SIBLING}"></i>'
            "<span>smaller dense siblings</span></label>"
        )
    return "\n".join([*parts, "</div>"])


def _chart(
    lines: Sequence[Line], few: Sequence[Line], colors: Mapping[Line, str], siblings: Sequence[FrontierSibling],
    speed: bool,
) -> str:  # fmt: skip
    """Draw perplexity over speed, or over the share of FFNs; with siblings over that of all active parameters."""
    x_of = attrgetter("speedup" if speed else "active_ratio" if siblings else "ffn_active")
    curves = [
        Curve(
            str(i), [Dot(x_of(p), p.perplexity_ratio, _tip(line, p)) for p in points], colors[line],
            dashes="" if line.ours else "2 4" if line.bound else "6 4", width=2.6 if line.ours else 1.6,
            shown=line in few,
        )
        for i, line in enumerate(lines)
        if (points := [point for point in line.points if x_of(point)])
    ]  # fmt: skip
    if dense := sibling_dots(siblings, speed):
        dots = [Dot(1, 1, "the dense model"), *(Dot(d.x, d.ratio, _dense_tip(d, speed), d.label) for d in dense)]
        curves.append(Curve(FAMILY, dots, SIBLING, dashes="6 4", width=2))
    highest = max(dot.y for curve in curves for dot in curve.dots)
    top = min(HIGHEST, 1.1 * max(highest, 1.5))
    y = Axis("perplexity over dense", 0.93, top, [(t, f"{t:g}") for t in TICKS if t <= top], log=True)
    if siblings and not speed:
        low = 0.85 * min(dot.x for curve in curves for dot in curve.dots)
        marks = [(share, f"{share:.0%}") for share in SHARES if share >= low]
        x = Axis("active parameters over the dense model's", 1.05, low, marks, log=True)
        return line_chart(curves, x, y, "by active parameters")
    if not speed:
        marks = [(share, f"{share:.0%}") for share in (1, 0.75, 0.5, 0.25)]
        return line_chart(curves, Axis("share of each FFN that runs per token", 1.05, 0.15, marks), y, "by share")
    found = [dot.x for curve in curves for dot in curve.dots]
    low, high = min(1, *found) - 0.05, max(1, *found) + 0.05
    marks = [(x, f"{x:g}×") for x in SPEEDS if low <= x <= high] if siblings else even_ticks(low, high, "×")
    x = Axis("decode speed over the dense model's, batch 1", low, high, marks, log=bool(siblings))
    return line_chart(curves, x, y, "by speed")


def _dense_tip(dot: DenseDot, speed: bool) -> str:
    cost = f"decode {dot.x:.2f} × dense" if speed else f"{dot.x:.0%} of the active parameters"
    return f"{dot.label}, a smaller dense model\nperplexity {dot.ratio:.3f} × dense\n{cost}"


def _tip(line: Line, point: FrontierSummary) -> str:
    parts = [line.label, f"perplexity {_ratio(point)} × dense", f"{point.ffn_active:.0%} of each FFN"]
    parts += [f"plan {point.plan}"] if point.plan else []
    parts += [f"decode {decode(point)} × dense"] if point.speedup else []
    parts += [f"zero-shot {point.tasks_mean:.3f}"] if point.tasks_mean is not None else []
    parts += [f"ours / siblings' line {over_line(point)}"] if point.over_line else []
    return "\n".join(parts)


def _ratio(point: FrontierSummary) -> str:
    return f"{point.perplexity_ratio:.3f}" + (f" ± {point.perplexity_ratio_deviation:.3f}" if point.seeds > 1 else "")


def _numbers(rows: Sequence[FrontierSummary], siblings: Sequence[FrontierSibling]) -> str:
    """Every row of the summary, best first under its budget, then the siblings."""
    points = sorted(rows, key=lambda point: (point.active, point.perplexity_ratio))
    with_speed, with_tasks = any(p.speedup for p in points), any(p.tasks_mean is not None for p in points)
    with_line = any(p.over_line for p in points)
    head = ["method", "perplexity over dense", *["ours / line"] * with_line, *["decode"] * with_speed]
    head += [*["zero-shot"] * with_tasks, "plan", "FFN", "memory", "seeds"]
    cells: list[list[str]] = []

    def measured(p: FrontierSummary | FrontierSibling, line: str) -> list[str]:
        row = [line] * with_line + [f"{p.speedup:.2f} ×" if p.speedup else "-"] * with_speed
        return row + ["-" if p.tasks_mean is None else f"{p.tasks_mean:.3f}"] * with_tasks

    for i, p in enumerate(points):
        if not i or p.active != points[i - 1].active:
            cells.append([f"{p.active:.0%} active"])
        line = Line(p.method, p.memory_factor, (p,))
        name = escape(line.label) + (" (bound)" if line.bound else "")
        row = [f'<span class="ours">{name}</span>' if line.ours else name, _ratio(p), *measured(p, over_line(p))]
        cells.append([*row, p.plan or "-", f"{p.ffn_active:.0%}", f"{p.memory_factor:g} ×", str(p.seeds)])
    cells += [["smaller dense siblings"]] * bool(siblings)
    for s in siblings:
        cells.append([escape(s.label), f"{s.perplexity_ratio:.3f}", *measured(s, "-"), "-", "-", "-", "-"])
    return table(head, cells)
