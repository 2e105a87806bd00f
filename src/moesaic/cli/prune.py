"""`moesaic prune`: fewer experts for a Mixture of Experts, or fewer layers for any model."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import registry
from ..report import tables
from ..report.progress import progress
from . import options
from .options import print_result, stderr


def prune(
    model: options.ModelArgument,
    out: options.OutArgument,
    experts: Annotated[int | None, typer.Option(help="routed experts that each layer keeps")] = None,
    ratio: Annotated[
        float | None, typer.Option(help="share of the routed experts (depth: of the layers) that goes, e.g. 0.25")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="decoder layers that stay, with --method depth")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help=f"which experts stay, or depth: which layers, of dense models too: "
            f"{', '.join(registry.names('pruning'))} [default: reap]"
        ),
    ] = None,
    recovery: Annotated[
        str | None, typer.Option(help="of what was left out: closed-form or none [default: closed-form]")
    ] = None,
    calibration: options.Calibration = None,
    tokens: Annotated[int | None, typer.Option(help="calibration tokens [default: 16384]")] = None,
    window: Annotated[int | None, typer.Option(help="tokens of one calibration sequence [default: 256]")] = None,
    recipe: options.Recipe = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ... [default: auto]")] = None,
    threads: options.Threads = None,
    seed: Annotated[int | None, typer.Option(help="seed of everything random [default: 0]")] = None,
    resume: Annotated[bool, typer.Option(help="go on with an unfinished pruning")] = True,
    overwrite: options.Overwrite = False,
    force: Annotated[bool, typer.Option(help="accept a collapsed result")] = False,
    as_json: options.Json = False,
) -> None:
    """Leave out experts of a Mixture of Experts, or layers of any model, and write what the same engines load."""
    from ..config import PruneConfig
    from ..pruning.prune import prune as run

    given = {
        "experts": experts, "ratio": ratio, "layers": layers, "method": method, "recovery": recovery, "tokens": tokens,
        "window": window,
        "calibration": tuple(calibration) if calibration else None, "device": device, "seed": seed,
    }  # fmt: skip
    options.set_threads(threads)
    config = PruneConfig.read(recipe, {name: value for name, value in given.items() if value is not None})
    with progress(stderr, "pruning", "layer") as tick:
        result = run(model, out, config, resume=resume, overwrite=overwrite, force=force, progress=tick)
    print_result(result, as_json, lambda: tables.show_pruning(stderr, result))
