"""`moesaic demo`: the demo model, converted and shown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..report.demo import show_demo
from ..report.progress import progress
from . import options
from .options import print_result, stderr


def demo(
    out: Annotated[Path, typer.Option(help="folder for the result", callback=options.expand)] = Path("demo-output"),
    model: Annotated[str, typer.Option(help="the model to show", callback=options.expand)] = "demo",
    active: Annotated[
        float | None, typer.Option(help="share of each FFN that one token runs [default: 0.5; of demo 0.625]")
    ] = None,
    llama_cpp: options.LlamaCpp = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Convert the demo model and show it beside the dense one: perplexity, speed, text; report.html has it all."""
    from ..demo import demo as run

    with progress(stderr, "demo", "%", "") as tick:
        result = run(out, model, active, llama_cpp=llama_cpp, overwrite=overwrite, progress=tick)
    print_result(result, as_json, lambda: show_demo(stderr, result))
