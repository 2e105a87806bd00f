"""`moesaic plan`: shapes near a budget."""

from __future__ import annotations

from typing import Annotated

import typer

from ..report.plans import show_plans
from . import options
from .options import print_result, stderr


def plan(
    model: options.DenseArgument,
    active: Annotated[float, typer.Option(help="wanted share of each FFN that one token runs")] = 0.5,
    memory_factor: Annotated[float, typer.Option(help="size of all experts relative to the dense FFN")] = 1.0,
    engine: options.Engine = None,
    outtype: options.Outtype = None,
    as_json: options.Json = False,
) -> None:
    """List shapes near a budget: memory, possible speed, and which engines run each."""
    from ..conversion.plans import plans

    with options.status("counting"):
        found = plans(model, active, memory_factor, engine, outtype)
    print_result(found, as_json, lambda: show_plans(stderr, found))
