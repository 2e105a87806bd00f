"""What an expert store did, for people."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console

from .grid import grid, say

LITTLE = 0.5
"""Of uses that find their expert: below it, reading is most of the time."""


def show_store(console: Console, report: Mapping[str, float]) -> None:
    """Show how many uses found their expert in memory, what was read, and how long layers waited."""
    table = grid("experts", "", "")
    table.add_row("in memory when used", f"{report['hit_ratio']:.1%} of {report['hits'] + report['misses']:,.0f}")
    table.add_row("memory for experts", f"{report['memory_bytes'] / 1e6:,.1f} MB of {report['all_bytes'] / 1e6:,.1f}")
    table.add_row("read", f"{report['bytes_read'] / 1e6:,.1f} MB")
    if report["prefetched"]:
        vain = report["prefetched_in_vain"] / report["prefetched"]
        table.add_row("read a layer early", f"{report['prefetched']:,.0f}, {vain:.0%} in vain")
    table.add_row("layers waited", f"{report['waited_seconds']:.2f} s")
    if report["cache_bias"]:
        table.add_row("routing", f"changed: prefers what is in memory, --cache-bias {report['cache_bias']:g}")
    console.print(table)
    if report["hit_ratio"] < LITTLE:
        say(console, "Most uses had to wait for a read; more --expert-memory helps most.")
