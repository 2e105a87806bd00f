"""`moesaic convert`: convert a dense model."""

from __future__ import annotations

from typing import Annotated

import typer

from ..report import tables
from ..report.progress import progress
from . import options
from .options import print_result, stderr


def convert(
    model: options.ModelArgument,
    out: options.OutArgument,
    active: Annotated[float | None, typer.Option(help="share of each FFN that one token runs [default: 0.5]")] = None,
    memory_factor: Annotated[
        float | None, typer.Option(help="size of all experts relative to the dense FFN [default: 1]")
    ] = None,
    plan: Annotated[str | None, typer.Option(help="fixed shape, e.g. S3A3E8: 3 shared + 3 of 8 groups run")] = None,
    expert_width: Annotated[int | None, typer.Option(help="neurons in a group")] = None,
    fine: options.Fine = None,
    partition: options.Partition = None,
    router: options.Router = None,
    selection: options.Selection = None,
    recovery: options.Recovery = None,
    calibration: options.Calibration = None,
    tokens: Annotated[int | None, typer.Option(help="calibration tokens [default: 16384]")] = None,
    window: Annotated[int | None, typer.Option(help="tokens of one calibration sequence [default: 256]")] = None,
    first_tokens: Annotated[
        int | None, typer.Option(help="tokens seen as a text's first [default: an eighth of --tokens; 0 after a BOS]")
    ] = None,
    recipe: options.Recipe = None,
    format: options.Format = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ... [default: auto]")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16, float16, float32, float64 [default: auto]")] = None,
    seed: Annotated[int | None, typer.Option(help="seed of everything random [default: 0]")] = None,
    resume: Annotated[bool, typer.Option(help="go on with an unfinished conversion")] = True,
    overwrite: options.Overwrite = False,
    force: Annotated[bool, typer.Option(help="accept a collapsed result")] = False,
    dry_run: Annotated[bool, typer.Option(help="check everything, print the plan, stop")] = False,
    as_json: options.Json = False,
) -> None:
    """Convert a dense model into a Mixture-of-Experts, layer by layer, without training."""
    from ..checkpoint.writer import check_output
    from ..config import ConvertConfig
    from ..conversion.auto import candidates
    from ..conversion.convert import convert as run
    from ..conversion.dry_run import describe

    given = {
        "active": active, "plan": plan, "expert_width": expert_width, "partition": partition, "router": router,
        "tokens": tokens, "format": format, "seed": seed, "calibration": tuple(calibration) if calibration else None,
        "memory_factor": memory_factor, "recovery": recovery, "window": window, "device": device, "dtype": dtype,
        "first_tokens": first_tokens, "fine": fine, "selection": selection,
    }  # fmt: skip
    config = ConvertConfig.read(recipe, {name: value for name, value in given.items() if value is not None})
    if dry_run:
        with options.status("checking"):
            check_output(out, overwrite)
            conversions = candidates(model, config)
            conversions[0].check_space(out)
            dry = describe(conversions)
        print_result(dry, as_json, lambda: tables.show_facts(stderr, "Dry run: nothing was written", dry.to_dict()))
        return
    with progress(stderr, "converting", "layer") as tick:
        metrics = run(model, out, config, resume=resume, overwrite=overwrite, force=force, progress=tick)
    print_result(metrics, as_json, lambda: tables.show_conversion(stderr, metrics))
