"""`moesaic describe`: methods, their options, and what recipes may hold."""

from __future__ import annotations

from typing import Annotated

import typer

from ..report.describe import show_description
from . import options
from .options import print_result, stderr


def describe(
    what: Annotated[
        str | None, typer.Argument(metavar="[WHAT]", help="finetune, partition, partition:cmoe; none lists all kinds")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show methods, their options, and the settings of recipes."""
    from ..config.describe import describe

    with options.status("reading"):
        found = describe(what)
    print_result(found, as_json, lambda: show_description(stderr, found))
