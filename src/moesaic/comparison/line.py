"""The siblings' line: what smaller dense models of the same family reach at the cost of a conversion.

`x` says how many times cheaper than the dense model something is: its decode speed over the dense model's, or the dense
model's active parameters over its own. The dense model is at x = 1.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from ..report.frontier import OURS
from ..results import FrontierRow, FrontierSibling, FrontierSummary
from ..results.evaluation import perplexity_of
from .rows import shape_of


class Dot(NamedTuple):
    """A dense model in the chart."""

    x: float
    perplexity: float


class OnLine(NamedTuple):
    """What the line says at some x."""

    perplexity: float
    extrapolated: bool
    """Whether x is beyond the cheapest sibling."""


def line_at(siblings: Sequence[Dot], dense: float, x: float) -> OnLine | None:
    """Read the line through the dense model and its siblings, straight in log perplexity over log x.

    Between neighbours `ln p = ln p0 + (ln x - ln x0) / (ln x1 - ln x0) * (ln p1 - ln p0)`; beyond the cheapest sibling
    the last piece goes on. What is no cheaper than the dense model stands against the dense model itself.

    Args:
        siblings: in any order; those that are no cheaper than the dense model say nothing and are passed over.
        dense: the dense model's perplexity.
        x: where to read.

    Returns:
        None where no sibling is cheaper than the dense model.
    """
    best: dict[float, float] = {}
    for dot in siblings:
        if dot.x > 1:
            best[dot.x] = min(dot.perplexity, best.get(dot.x, math.inf))
    if not best:
        return None
    dots = [Dot(1.0, dense), *(Dot(*pair) for pair in sorted(best.items()))]
    if x <= 1:
        return OnLine(dense, extrapolated=False)
    end = min(bisect_left([dot.x for dot in dots], x), len(dots) - 1)
    start, stop = dots[end - 1], dots[end]
    if x == stop.x:
        return OnLine(stop.perplexity, extrapolated=False)
    share = math.log(x / start.x) / math.log(stop.x / start.x)
    rise = math.log(stop.perplexity / start.perplexity)
    found = perplexity_of(math.log(start.perplexity) + share * rise)
    return OnLine(found, x > stop.x)


def same_tokens(bits_per_byte: float, scored_bytes: int, scored_tokens: int) -> float:
    """Translate bits per byte into a perplexity at tokens of so many bytes, `2 ** (bits * bytes / tokens)`."""
    return perplexity_of(bits_per_byte * math.log(2) * scored_bytes / scored_tokens)


def by_speed(siblings: Sequence[FrontierSibling]) -> list[Dot]:
    """Place siblings by decode speed, those whose speed is known."""
    return [Dot(s.speedup, s.perplexity) for s in siblings if s.speedup]


def by_parameters(siblings: Sequence[FrontierSibling]) -> list[Dot]:
    """Place siblings by active parameters."""
    return [Dot(1 / s.active_ratio, s.perplexity) for s in siblings]


def place_row(row: FrontierRow, siblings: Sequence[FrontierSibling], dense: float) -> FrontierRow:
    """Put a row beside the line: by decode speed where both are measured, else by active parameters.

    Args:
        row: a conversion; a bound, which no engine runs, stays as it is.
        siblings: measured.
        dense: the dense model's perplexity.
    """
    if row.active_ratio is None or shape_of(row) is None:
        return row
    speed = line_at(by_speed(siblings), dense, row.speedup) if row.speedup else None
    parameters = line_at(by_parameters(siblings), dense, 1 / row.active_ratio)
    line = speed or parameters
    if line is None or parameters is None:
        return row
    return replace(
        row, line=line.perplexity, over_line=row.perplexity / line.perplexity,
        line_by="speed" if speed else "parameters", extrapolated=line.extrapolated,
        line_by_speed=speed.perplexity if speed else None, line_by_parameters=parameters.perplexity,
    )  # fmt: skip


def verdicts(summary: Sequence[FrontierSummary], siblings: Sequence[FrontierSibling], dense: float) -> list[str]:
    """Say for each budget whether the best row of `default...`, else of our other methods, else of all, beats it."""
    said = []
    for active in sorted({row.active for row in summary}):
        rows = [row for row in summary if row.active == active and row.over_line is not None]
        for first in ("default", OURS):
            rows = [row for row in rows if row.method.startswith(first)] or rows
        if rows:
            said.append(verdict(min(rows, key=lambda row: row.over_line or math.inf), siblings, dense))
    return said


def verdict(row: FrontierSummary, siblings: Sequence[FrontierSibling], dense: float) -> str:
    """Say in a sentence whether a conversion beats the smaller siblings' line, and if not, what to take."""
    assert row.line is not None
    assert row.over_line is not None
    assert row.active_ratio is not None
    ours = row.over_line * row.line
    if row.line_by == "speed":
        x, cost = row.speedup or 0.0, f"At {row.speedup:.2f} x the speed"
    else:
        timed = row.speedup and any(s.speedup for s in siblings)
        why = "no sibling is faster than the dense model" if timed else "no speed measured"
        x, cost = 1 / row.active_ratio, f"At {row.active_ratio:.0%} of the active parameters ({why})"
    memory = "" if row.memory_factor == 1 else f" with {row.memory_factor:g} x the memory"
    better = row.over_line < 1
    text = f"{cost}, `{row.method}` at {row.active:.0%} active{memory} is {'' if better else 'not '}better than the "
    text += f"smaller siblings' line: perplexity {ours:.1f} against {row.line:.1f}"
    text += " (extrapolated: no sibling is that small)" if row.extrapolated else ""
    if better:
        return text + "."
    place = (lambda s: s.speedup or 0.0) if row.line_by == "speed" else (lambda s: 1 / s.active_ratio)
    real = [s for s in siblings if place(s) >= x and s.perplexity <= ours]
    if x <= 1:
        return text + "; take the dense model, which is no slower."
    if not real:
        return text + "; a sibling of that cost would do better."
    best = min(real, key=lambda s: s.perplexity)
    return text + f"; take the sibling {best.label}, no dearer and at {best.perplexity:.1f}."
