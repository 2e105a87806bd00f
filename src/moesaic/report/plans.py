"""Shapes near a budget, for people."""

from __future__ import annotations

from rich.console import Console

from ..plan import KEPT_SPEED
from ..results import Plans
from .console import command, here, offer
from .grid import grid, say


def show_plans(console: Console, found: Plans) -> None:
    """Print a row for each shape, and how to make the first."""
    rows = grid(
        f"{found.model}: running about {found.active:.0%} of {found.intermediate_size} neurons",
        "partition", "plan", "width", "active", "memory", "decode", "prefill", "GGUF", wrapped=7,
    )  # fmt: skip
    for c in found.choices:
        rows.add_row(
            c.partition, c.plan, str(c.expert_width), f"{c.ffn_active:.0%}", f"{c.memory_factor:.2f}x",
            f"{c.decode_limit:.2f}x", f"{c.prefill_limit:.2f}x", c.gguf[0] if c.gguf else "-",
        )  # fmt: skip
    console.print(rows)
    first = found.choices[0]
    say(
        console,
        "decode, prefill: at most so much faster than dense, by bytes and by FLOPs. Format: "
        f"{first.format} ({first.format_reason or 'runs in ' + ', '.join(first.engines)}).",
    )
    for engine in dict.fromkeys(engine for c in found.choices for engine in c.good_for):
        plans = ", ".join(dict.fromkeys(c.plan for c in found.choices if engine in c.good_for))
        say(console, f"At least {KEPT_SPEED:.0%} of the measured best of {engine}: {plans}")
    if found.engine is None:
        say(console, "The first:")
        offer(console, command("moesaic", "convert", here(found.model), "OUT", *first.options.split()), "  ")
        return
    e = found.engine
    say(console, f"For {e.engine}: {e.reason}. Between the first two a trial on the model itself decides:")
    wishes = ["--for", e.engine, "--active", f"{found.active:g}", *(["--outtype", e.outtype] if e.outtype else [])]
    offer(
        console,
        command("moesaic", "convert", here(found.model), "OUT.gguf" if e.engine == "llama.cpp" else "OUT", *wishes),
        "  ",
    )
