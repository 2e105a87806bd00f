"""Small charts as SVG text, for pages that hold everything themselves; no library is needed to draw or to read them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 520, 340
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 14, 46


@dataclass(frozen=True)
class Dot:
    """A point of a curve, and what is said of it when it is pointed at."""

    x: float
    y: float
    tip: str
    name: str = ""
    """Written beside it."""


@dataclass(frozen=True)
class Curve:
    """Dots joined by a line; `key` ties it to its switch on the page."""

    key: str
    dots: Sequence[Dot]
    color: str
    dashes: str = ""
    width: float = 2
    shown: bool = True


@dataclass(frozen=True)
class Axis:
    """From where to where (downwards too), on which scale, with which marks."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies: 0 at `low`, 1 at `high`."""
        scale = math.log if self.log else float
        return (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))


def even_ticks(low: float, high: float, suffix: str = "") -> list[tuple[float, str]]:
    """Four to eight round numbers between two."""
    rough = (high - low) / 7
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(i * step, f"{i * step:.6g}{suffix}") for i in range(first, last + 1)]


def line_chart(curves: Sequence[Curve], x: Axis, y: Axis, title: str) -> str:
    """Draw an SVG with both axes and the curves; what lies above is cut off at the upper edge."""

    def at(dot: Dot) -> tuple[float, float]:
        return (
            LEFT + x.share(dot.x) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - y.share(dot.y) * (HEIGHT - TOP - BOTTOM),
        )

    clip = f"clip-{zlib.crc32(f'{title} {x.label}'.encode())}"
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<clipPath id="{clip}"><rect x="{LEFT - 8}" y="{TOP - 8}" width="{WIDTH - LEFT - RIGHT + 16}" '
        f'height="{HEIGHT - TOP - BOTTOM + 16}"/></clipPath>',
        *_axes(x, y),
        f'<g clip-path="url(#{clip})">',
    ]
    for curve in curves:
        hidden = "" if curve.shown else ' style="display:none"'
        parts.append(f'<g class="curve" data-key="{escape(curve.key)}"{hidden}>')
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in map(at, curve.dots))
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{curve.color}" stroke-width="{curve.width}" '
            f'stroke-dasharray="{curve.dashes}"/>'
        )
        for dot in curve.dots:
            a, b = at(dot)
            tip = escape(dot.tip)
            parts.append(
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4.5" fill="{curve.color}" data-tip="{tip}" tabindex="0">'
                f"<title>{tip}</title></circle>"
            )
            if dot.name:
                said = f'<text x="{a - 9:.1f}" y="{b + 4:.1f}" text-anchor="end" style="fill:{curve.color}">'
                parts.append(f"{said}{escape(dot.name)}</text>")
        parts.append("</g>")
    return "\n".join([*parts, "</g>", "</svg>"])


def _axes(x: Axis, y: Axis) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value, name in y.ticks:
        at = bottom - y.share(value) * (bottom - TOP)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{escape(name)}</text>')
    for value, name in x.ticks:
        at = LEFT + x.share(value) * (right - LEFT)
        parts.append(f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(name)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle = (LEFT + right) / 2
    parts.append(f'<text class="name" x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x.label)}</text>')
    return parts


def heat_map(rows: Sequence[Sequence[float]], tips: Sequence[Sequence[str]], x_label: str, y_label: str) -> str:
    """Draw a field of colours, a row each; 1 is in the middle of the scale, 0 pale and 2 dark."""
    columns = max(len(row) for row in rows)
    cell_width, cell_height = (WIDTH - LEFT - RIGHT) / columns, 12
    height = TOP + cell_height * len(rows) + BOTTOM
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(y_label)}">']
    for i, (row, row_tips) in enumerate(zip(rows, tips, strict=True)):
        for j, (value, tip) in enumerate(zip(row, row_tips, strict=True)):
            depth = min(value, 2) / 2
            color = f"rgb({235 - 224 * depth:.0f},{243 - 164 * depth:.0f},{250 - 112 * depth:.0f})"
            said = escape(tip)
            parts.append(
                f'<rect x="{LEFT + j * cell_width:.1f}" y="{TOP + i * cell_height}" width="{cell_width - 1:.1f}" '
                f'height="{cell_height - 1}" fill="{color}" data-tip="{said}"><title>{said}</title></rect>'
            )
        if i % 4 == 0:
            parts.append(f'<text x="{LEFT - 7}" y="{TOP + i * cell_height + 10}" text-anchor="end">{i}</text>')
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    parts.append(f'<text class="name" x="{middle}" y="{height - 22}" text-anchor="middle">{escape(x_label)}</text>')
    return "\n".join([*parts, "</svg>"])
