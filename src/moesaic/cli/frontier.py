"""`moesaic frontier`: methods at equal cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..given import LIMITS, Limit
from ..report.frontier_table import show_frontier
from ..report.progress import progress
from . import options
from .options import print_result, stderr

PER_CENT = Limit(1, 100, whole=False)


def frontier(
    model: options.DenseArgument,
    out: Annotated[
        Path, typer.Option(help="folder for rows and chart; finished rows are kept", callback=options.expand)
    ] = Path("frontier"),
    active: Annotated[str, typer.Option(help="per cent of each FFN that run, comma-separated")] = "25,50,75",
    memory_factor: Annotated[str, typer.Option(help="sizes of all experts relative to the dense FFN")] = "1",
    methods: Annotated[
        str, typer.Option(help="comma-separated, or all that fit")
    ] = "default,static+closed-form,flap,cmoe",
    seeds: Annotated[str, typer.Option(help="seeds, comma-separated")] = "0",
    siblings: Annotated[
        str | None, typer.Option(help="smaller dense models of the family, comma-separated: their line is to be beaten")
    ] = None,
    text: options.TextFile = None,
    max_tokens: Annotated[int | None, typer.Option(help="stop the perplexity after so many tokens")] = None,
    tasks: options.Tasks = None,
    items: options.Items = None,
    calibration: options.Calibration = None,
    tokens: Annotated[int, typer.Option(help="calibration tokens")] = 16_384,
    speed: Annotated[bool, typer.Option(help="measure decode speed")] = True,
    threads: options.Threads = None,
    html: Annotated[bool, typer.Option("--html", help="write frontier.html too: all methods, interactive")] = False,
    as_json: options.Json = False,
) -> None:
    """Compare methods x budgets x memory on one model: a table and a chart of quality against speed."""
    from ..comparison.frontier import frontier as run
    from ..comparison.rows import Measurement

    options.set_threads(threads)
    measurement = Measurement(
        text=str(text) if text else None, max_tokens=max_tokens, tasks=str(tasks) if tasks else None,
        items=items, calibration=tuple(calibration or ()), tokens=tokens, speed=speed,
    )  # fmt: skip
    with progress(stderr, "frontier", "conversion") as tick:
        result = run(
            model, out, active=[share / 100 for share in options.numbers(active, "--active", PER_CENT)],
            memory_factors=options.numbers(memory_factor, "--memory-factor", LIMITS["memory_factor"]),
            methods=methods.split(","), seeds=options.whole_numbers(seeds, "--seeds", LIMITS["seed"]),
            siblings=siblings.split(",") if siblings is not None else (), measurement=measurement,
            html=html, progress=tick,
        )  # fmt: skip
    print_result(result, as_json, lambda: show_frontier(stderr, result, str(out)))
