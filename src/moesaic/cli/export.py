"""`moesaic export`: write a converted model in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..report import tables
from ..report.progress import progress
from . import options
from .options import print_result, stderr


def export(
    model: options.ConvertedArgument,
    out: Annotated[Path, typer.Argument(help="folder (or .gguf file) to make", metavar="OUT", callback=options.expand)],
    format: options.Target = "auto",
    to: Annotated[str | None, typer.Option(hidden=True, help="the old name of --format")] = None,
    outtype: options.Outtype = None,
    resume: Annotated[bool, typer.Option(help="go on with an unfinished export")] = True,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Write a converted model as an architecture that stock engines load, and check that it says the same."""
    from ..formats.export import export as run

    with progress(stderr, "exporting", "layer") as tick:
        result = run(model, out, to or format, outtype=outtype, resume=resume, overwrite=overwrite, progress=tick)
    done = "read back" if result.target == "gguf" else "checked"
    print_result(result, as_json, lambda: tables.show_facts(stderr, f"{out}: written and {done}", result.to_dict()))
