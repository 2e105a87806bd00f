"""The table of conversions beside smaller dense models of their family."""

from __future__ import annotations

from collections.abc import Mapping

from measured import grid, number, read, times


def siblings(model: str, labels: Mapping[str, str]) -> str:
    """Conversions beside the line through the smaller dense models of the family."""
    file = f"quality-{model}/frontier.json"
    d, rows = read(file), []
    millions = lambda count: f"{count / 1e6:,.0f} M"  # noqa: E731
    over = lambda value, line: number(value / line) if line else ""  # noqa: E731
    for r in sorted(d["summary"], key=lambda r: (r["active"], r["perplexity_ratio"])):
        found = r["perplexity_ratio"] * d["dense"]["perplexity"]
        line, speed = r["line_by_parameters"], r.get("line_by_speed")
        memory = "" if r["memory_factor"] == 1 else f", memory x {r['memory_factor']:g}"
        head = [labels[r["method"]] + memory, f"{r['active']:.0%}, {r['plan']}", millions(r["active_parameters"])]
        rows.append([*head, number(found), number(line), over(found, line), times(r["speedup"]), over(found, speed)])
    for s in d["siblings"]:
        size = millions(s["active_parameters"])
        rows.append([f"*`{s['model']}`, dense*", "", size, number(s["perplexity"]), "", "", times(s["speedup"]), ""])
    head = ["method", "active, shape", "active parameters", "perplexity", "the line there", "ours / line", "decode"]
    head.append("ours / line at that speed")
    filled = [i for i in range(len(head)) if any(row[i] for row in rows)]
    return grid([head[i] for i in filled], [[row[i] for i in filled] for row in rows])
