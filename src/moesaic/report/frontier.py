"""What a chart of the frontier shows: its rows as lines, and which of the lines are shown where room is short."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..results import FrontierSibling, FrontierSummary

MOST_LINES = 6
"""On the printed chart; the page has them all."""
OURS = ("default", "specialists", "coactivation")
"""Beginnings of our methods' names."""
BOUNDS = ("neurons", "coactivation-oracle", "cats-top-k", "teal", "wina")
"""What no router can do, or only kernels of batch 1; shown on the page only."""
RIVALS = {
    "static+closed-form": "static pruning + our recovery",
    "depth+closed-form": "fewer layers + our recovery",
    "depth": "fewer layers (ShortGPT)",
    "depth-contiguous+closed-form": "a run of layers + our recovery",
    "depth-contiguous": "a run of layers (Gromov et al.)",
    "cats+closed-form": "CATS + our recovery",
    "cats": "CATS",
    "flap": "static pruning (FLAP)",
    "cmoe": "CMoE",
    "cmoe-code": "CMoE, as its code has it",
    "moefication": "MoEfication",
    "moefication-coarse": "MoEfication, 8 experts",
    "expertweaver": "ExpertWeaver",
    "expertweaver-coarse": "ExpertWeaver, 8 experts",
    "llama-moe": "LLaMA-MoE",
    "read-me": "Read-ME",
}
"""Other methods, those first that the printed chart takes first, and what a reader knows them as."""
LIMIT = "≤: what the bytes allow at batch 1; nothing here runs it so fast"
"""What a speed-up says that is not measured."""


def decode(point: FrontierSummary) -> str:
    """Write a speed-up with its digits; `≤` before one that is a limit, `-` where there is none."""
    if not point.speedup:
        return "-"
    return "≤" * (point.speed_is == "limit") + f"{point.speedup:.2f}"


SIBLING = "#b3541e"
"""The colour of smaller dense models."""
SPEEDS = (0.25, 0.35, 0.5, 0.7, 1, 1.5, 2, 3, 5, 8, 12)
SHARES = (1, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05, 0.02)
"""Marks of the axes where smaller dense models are shown."""
LINE = (
    "ours / line: perplexity over that of the smaller dense models' line (straight in log perplexity over log cost) at "
    "the same decode speed; p: at the same active parameters, as a speed is missing or no sibling is faster; *: "
    "the line is extrapolated beyond the smallest. Below 1 the conversion is better."
)
"""What the column says."""


class DenseDot(NamedTuple):
    """A dense model in a chart."""

    x: float
    """Its decode speed, or its active parameters, over the dense model's."""
    ratio: float
    """Its perplexity over the dense model's."""
    label: str


def sibling_dots(siblings: Iterable[FrontierSibling], speed: bool) -> list[DenseDot]:
    """Place the siblings that are cheaper than the dense model, the largest first; none where speed is not known."""
    found = [DenseDot(s.speedup or 0 if speed else s.active_ratio, s.perplexity_ratio, s.label) for s in siblings]
    cheaper = [dot for dot in found if (dot.x > 1 if speed else dot.x < 1)]
    return sorted(cheaper, key=lambda dot: dot.x, reverse=not speed)


def over_line(row: FrontierSummary) -> str:
    """Write a row's perplexity over the siblings' line, with the signs that `LINE` explains."""
    if row.over_line is None:
        return "-"
    return f"{row.over_line:.3f}" + "p" * (row.line_by == "parameters") + "*" * bool(row.extrapolated)


@dataclass(frozen=True)
class Line:
    """A method with one size of memory, from budget to budget."""

    method: str
    memory_factor: float
    points: tuple[FrontierSummary, ...]
    """One a budget, the largest share first."""

    @property
    def ours(self) -> bool:
        """Whether the method is moesaic's own."""
        return self.method.startswith(OURS) and not self.bound

    @property
    def bound(self) -> bool:
        """Whether it is a bound that no real model reaches."""
        return self.method in BOUNDS

    @property
    def label(self) -> str:
        """What a reader knows the line as."""
        name = RIVALS.get(self.method, self.method)
        return name if self.memory_factor == 1 else f"{name}, memory ×{self.memory_factor:g}"

    @property
    def quality(self) -> float:
        """The geometric mean of the ratios; of two lines with the same budgets the lower one is better."""
        return math.exp(sum(math.log(point.perplexity_ratio) for point in self.points) / len(self.points))


def lines_of(rows: Iterable[FrontierSummary]) -> list[Line]:
    """All lines: ours first, then other methods in the order of `RIVALS`, bounds last.

    Rows of one method and budget that differ in their cut (`default` may choose another with another seed) become
    their best one.
    """
    best: dict[tuple[str, float, float], FrontierSummary] = {}
    for point in rows:
        key = (point.method, point.memory_factor, point.active)
        if key not in best or point.perplexity_ratio < best[key].perplexity_ratio:
            best[key] = point
    lines = []
    for method, factor in dict.fromkeys(key[:2] for key in best):
        points = [point for key, point in best.items() if key[:2] == (method, factor)]
        lines.append(Line(method, factor, tuple(sorted(points, key=lambda point: -point.ffn_active))))
    order = list(RIVALS)

    def rank(line: Line) -> list[float]:
        known = order.index(line.method) if line.method in order else len(order)
        return [2 if line.bound else not line.ours, 0 if line.ours else known, line.memory_factor, line.quality]

    return sorted(lines, key=rank)


def chosen_lines(lines: Sequence[Line], most: int = MOST_LINES) -> list[Line]:
    """Choose the lines of the printed chart, at most `most`, of those with the most budgets.

    Three of ours: the best with the dense model's memory; the best such one that decodes no slower than the dense
    model at any budget, or else the second best; the best with more memory. Then other methods in the order of
    `RIVALS`. Bounds are left out.
    """
    possible = [line for line in lines if not line.bound]
    budgets = max((len(line.points) for line in possible), default=0)
    full = [line for line in possible if len(line.points) == budgets]
    ours = sorted((line for line in full if line.ours), key=lambda line: line.quality)
    measured = [line for line in ours if any(point.speedup for point in line.points)] or ours
    same = [line for line in measured if line.memory_factor == 1]
    fast = [line for line in same[1:] if all((point.speedup or 0) >= 1 for point in line.points)]
    larger = [line for line in measured if line.memory_factor > 1]
    picked = [*same[:1], *(fast or same[1:])[:1], *larger[:1]]
    picked += [line for line in full if not line.ours][:3]
    return [line for line in lines if line in picked[:most]]


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions as near as possible to the wanted ones, in their order, no two nearer than `gap`."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks: list[list[int]] = []

    def centre(block: list[int]) -> float:
        return sum(wanted[i] for i in block) / len(block)

    for i in order:
        blocks.append([i])
        while len(blocks) > 1:
            lower, upper = blocks[-2:]
            if centre(upper) - centre(lower) >= gap * (len(lower) + len(upper)) / 2:
                break
            blocks[-2:] = [lower + upper]
    placed = [0.0] * len(wanted)
    for block in blocks:
        for rank, i in enumerate(block):
            placed[i] = centre(block) + gap * (rank - (len(block) - 1) / 2)
    return placed
