"""`moesaic inspect`: what a converted model says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..report import tables
from . import options
from .options import print_result, stderr


def inspect(
    out: Annotated[Path, typer.Argument(help="a converted model's folder", metavar="OUT", callback=options.expand)],
    as_json: options.Json = False,
) -> None:
    """Show plan, method, per-layer errors and expert loads of a converted model."""
    from ..evaluation.inspect import inspect as run

    inspection = run(out)
    print_result(inspection, as_json, lambda: tables.show_inspection(stderr, inspection))
