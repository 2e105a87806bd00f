"""`moesaic convert`: convert a dense model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..report import tables
from ..report.progress import progress
from . import options
from .options import print_result, stderr

if TYPE_CHECKING:
    from ..config import ConvertConfig
    from ..results import ConversionResult

ImageWeight = Annotated[
    float | None, typer.Option(help="worth of a picture's token relative to one of text [default: 0.25]")
]
TextOnly = Annotated[bool | None, typer.Option("--text-only", help="of a vision-language model the text model alone")]

Effort = Annotated[str, typer.Option(help="fast, good (more tokens, 15 minutes of training) or best (an hour)")]
FirstTokens = Annotated[
    int | None,
    typer.Option(help="tokens seen as a text's first, where none always is (BOS) [default: an eighth of --tokens]"),
]


def convert(
    model: options.DenseArgument,
    out: options.OutOrFileArgument,
    active: Annotated[float | None, typer.Option(help="share of each FFN that one token runs [default: 0.5]")] = None,
    memory_factor: Annotated[
        float | None, typer.Option(help="size of all experts relative to the dense FFN [default: 1]")
    ] = None,
    plan: Annotated[str | None, typer.Option(help="fixed shape, e.g. S3A3E8: 3 shared + 3 of 8 groups run")] = None,
    expert_width: Annotated[int | None, typer.Option(help="neurons in a group")] = None,
    fine: options.Fine = None,
    engine: options.Engine = None,
    outtype: options.Outtype = None,
    dense_layers: options.DenseLayers = None,
    partition: options.Partition = None,
    router: options.Router = None,
    selection: options.Selection = None,
    recovery: options.Recovery = None,
    calibration: options.Calibration = None,
    for_use: Annotated[
        str | None, typer.Option(help="code, chat or text: chooses the calibration text [default: by the model]")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="calibration tokens [default: 16384]")] = None,
    window: Annotated[int | None, typer.Option(help="tokens of one calibration sequence [default: 256]")] = None,
    first_tokens: FirstTokens = None,
    image_weight: ImageWeight = None,
    text_only: TextOnly = None,
    effort: Effort = "fast",
    recipe: options.Recipe = None,
    format: options.Format = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ... [default: auto]")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16, float16, float32, float64 [default: auto]")] = None,
    threads: options.Threads = None,
    seed: Annotated[int | None, typer.Option(help="seed of everything random [default: 0]")] = None,
    resume: Annotated[bool, typer.Option(help="go on with an unfinished conversion")] = True,
    overwrite: options.Overwrite = False,
    force: Annotated[bool, typer.Option(help="accept a collapsed result")] = False,
    dry_run: Annotated[bool, typer.Option(help="check everything, print the plan, stop")] = False,
    as_json: options.Json = False,
) -> None:
    """Convert a dense model into a Mixture-of-Experts, layer by layer; training is only with --effort."""
    from ..config import ConvertConfig
    from ..conversion.engines import for_output
    from ..effort import at_effort

    given = {
        "active": active, "plan": plan, "expert_width": expert_width, "partition": partition, "router": router,
        "tokens": tokens, "format": format, "seed": seed, "calibration": tuple(calibration) if calibration else None,
        "memory_factor": memory_factor, "recovery": recovery, "window": window, "device": device, "dtype": dtype,
        "first_tokens": first_tokens, "dense_layers": dense_layers, "fine": fine, "selection": selection,
        "for_use": for_use, "image_weight": image_weight, "text_only": text_only, "engine": engine, "outtype": outtype,
    }  # fmt: skip
    options.set_threads(threads)
    config = ConvertConfig.read(recipe, {name: value for name, value in given.items() if value is not None})
    config = for_output(at_effort(config, effort), out)
    if dry_run:
        return dry(model, out, config, effort, overwrite, as_json)
    metrics = run(model, out, config, effort, resume, overwrite, force)
    dense = model if Path(model).exists() else None  # OUT knows hub ids and built-in names, not places
    print_result(metrics, as_json, lambda: tables.show_made(stderr, metrics, dense))


def run(
    model: str, out: Path, config: ConvertConfig, effort: str, resume: bool, overwrite: bool, force: bool
) -> ConversionResult:
    """Convert, and show how far it is; of more than little effort first how long it will take."""
    from ..effort import convert, estimate

    if effort != "fast":
        stderr.print(f"{effort}: {estimate(model, config, effort)}, on this machine")
    with progress(stderr, "converting", "layer") as tick:
        return convert(
            model, out, config, effort=effort, resume=resume, overwrite=overwrite, force=force, progress=tick,
            training_progress=tick.phase("training", "%", ""),
        )  # fmt: skip


def dry(model: str, out: Path, config: ConvertConfig, effort: str, overwrite: bool, as_json: bool) -> None:
    """Check everything, and say what a conversion would do and how long it would take."""
    from ..checkpoint.single_file import check_file
    from ..checkpoint.writer import check_output
    from ..conversion.auto import candidates, unwritten
    from ..conversion.dry_run import describe
    from ..conversion.engines import GGUF
    from ..effort import estimate

    with options.status("checking"):
        (check_file if out.suffix.lower() == GGUF else check_output)(out, overwrite)
        conversions = candidates(model, unwritten(config))
        conversions[0].check_space(out)
        found = describe(conversions, config)
    stderr.print(f"{estimate(model, config, effort)}, on this machine")
    print_result(found, as_json, lambda: tables.show_facts(stderr, "Dry run: nothing was written", found.to_dict()))
