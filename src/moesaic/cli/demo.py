"""`moesaic demo`: the demo model, converted and shown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..report import tables
from . import options
from .options import print_result, stderr


def demo(
    out: Annotated[Path, typer.Option(help="folder for the result")] = Path("demo-output"),
    model: Annotated[str, typer.Option(help="the model to show")] = "demo",
    active: Annotated[float, typer.Option(help="share of each FFN that one token runs")] = 0.5,
    as_json: options.Json = False,
) -> None:
    """Convert the demo model and show it beside the dense one: perplexity, speed, text."""
    from ..demo import demo as run

    with tables.progress(stderr, "demo", "step") as tick:
        result = run(out, model, active, progress=tick)
    print_result(result, as_json, lambda: tables.show_demo(stderr, result))
