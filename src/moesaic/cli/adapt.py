"""`moesaic adapt`: let the number of experts vary by token."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import registry
from ..report import tables
from ..report.progress import progress
from . import options
from .options import print_result, stderr

Rule = Annotated[
    str | None,
    typer.Option(help=f"how many experts run: {', '.join(registry.names('selection'))} [default: learned-threshold]"),
]
LearnerOption = Annotated[
    str | None,
    typer.Option(help=f"what trains it: {', '.join(registry.names('learner'))} [default: the method's own]"),
]


def adapt(
    model: options.MoEArgument,
    out: options.OutArgument,
    method: Rule = None,
    target_active: Annotated[
        float | None, typer.Option(help="share of the model's own number of experts to run on average [default: 0.7]")
    ] = None,
    learner: LearnerOption = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="text, rows (.jsonl, .csv, ...; also chats) or datasets name; repeatable [default: bundled text]",
            callback=options.expand,
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="steps [default: one pass over the samples]")] = None,
    minutes: Annotated[float | None, typer.Option(help="stop after so many minutes")] = None,
    samples: Annotated[int | None, typer.Option(help="sequences to train on [default: 1000]")] = None,
    window: Annotated[int | None, typer.Option(help="tokens in a sequence [default: 256]")] = None,
    tokens: Annotated[int | None, typer.Option(help="to calibrate the budget on [default: 8192]")] = None,
    batch: Annotated[int | None, typer.Option(help="sequences in a step [default: 4]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="[default: the learner's]")] = None,
    allow_zero: Annotated[
        bool | None, typer.Option("--allow-zero", help="let tokens run the shared expert alone")
    ] = None,
    inside: Annotated[
        bool | None, typer.Option("--inside", help="write a converted model with it in place of an adapter")
    ] = None,
    expert_memory: options.ExpertMemory = None,
    cache: options.Cache = None,
    prefetch: options.Prefetch = True,
    recipe: options.Recipe = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ... [default: auto]")] = None,
    dtype: Annotated[str | None, typer.Option(help="in which the model runs [default: auto]")] = None,
    threads: options.Threads = None,
    seed: Annotated[int | None, typer.Option(help="seed of everything random [default: 0]")] = None,
    resume: Annotated[bool, typer.Option(help="go on with an unfinished training")] = True,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Let the number of experts vary by token, to a budget; any Mixture-of-Experts, its files stay as they are."""
    from ..adaptation.adapt import adapt as run
    from ..config import AdaptConfig

    given = {
        "method": method, "target_active": target_active, "learner": learner, "data": tuple(data) if data else None,
        "steps": steps, "minutes": minutes, "samples": samples, "window": window, "tokens": tokens, "batch": batch,
        "learning_rate": learning_rate, "allow_zero": allow_zero, "inside": inside, "device": device, "dtype": dtype,
        "seed": seed,
    }  # fmt: skip
    config = AdaptConfig.read(recipe, {name: value for name, value in given.items() if value is not None})
    store = options.store_options(expert_memory, cache, prefetch, 0.0)
    options.set_threads(threads)
    with progress(stderr, "adapting", "per cent", "") as tick:
        result = run(model, out, config, store=store, resume=resume, overwrite=overwrite, progress=tick)
    if result.output is not None:  # the others of several processes have nothing to say
        print_result(result, as_json, lambda: tables.show_adaptation(stderr, result))
