"""`moesaic finetune`: train a converted model a little."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..report import tables
from ..report.progress import progress
from . import options
from .options import print_result, stderr


def finetune(
    model: options.ConvertedArgument,
    out: options.OutArgument,
    teacher: Annotated[
        str | None, typer.Option(help="the dense model [default: what MODEL was made of]", callback=options.expand)
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="text, rows (.jsonl, .csv, ...; also chats) or datasets name; repeatable [default: what MODEL was "
            "calibrated on, if bundled]",
            callback=options.expand,
        ),
    ] = None,
    method: options.Method = None,
    objective: options.Objective = None,
    steps: Annotated[int | None, typer.Option(help="steps [default: one pass over the samples]")] = None,
    minutes: Annotated[float | None, typer.Option(help="stop after so many minutes")] = None,
    samples: Annotated[int | None, typer.Option(help="sequences to train on [default: 2000]")] = None,
    window: Annotated[int | None, typer.Option(help="tokens in a sequence [default: 512]")] = None,
    batch: Annotated[int | None, typer.Option(help="sequences in a step [default: 2]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="[default: the method's]")] = None,
    rank: Annotated[int | None, typer.Option(help="of low-rank adapters [default: 8]")] = None,
    alpha: Annotated[int | None, typer.Option(help="of low-rank adapters [default: 32]")] = None,
    rounds: Annotated[int | None, typer.Option(help="of --method read-me: router and experts in turn")] = None,
    locality: Annotated[
        float | None, typer.Option(help="pull routers to the experts of the token before; try 0.01 to 1 [default: 0]")
    ] = None,
    balance: options.Balance = None,
    recipe: options.Recipe = None,
    teacher_cache: Annotated[
        Path | None, typer.Option(help="keep the teacher's logits there, for other runs", callback=options.expand)
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ... [default: auto]")] = None,
    threads: options.Threads = None,
    shard: Annotated[bool | None, typer.Option(help="cut parameters over the processes (FSDP)")] = None,
    seed: Annotated[int | None, typer.Option(help="seed of everything random [default: 0]")] = None,
    resume: Annotated[bool, typer.Option(help="go on with an unfinished training")] = True,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Train a converted model a little, taught by the dense one; never worse than it came."""
    from ..config import FinetuneConfig
    from ..training.finetune import finetune as run

    given = {
        "teacher": teacher, "data": tuple(data) if data else None, "method": method, "objective": objective,
        "steps": steps, "minutes": minutes, "samples": samples, "window": window, "batch": batch, "rank": rank,
        "learning_rate": learning_rate, "alpha": alpha, "balance": balance, "device": device, "shard": shard,
        "seed": seed, "rounds": rounds, "locality": locality,
    }  # fmt: skip
    options.set_threads(threads)
    config = FinetuneConfig.read(recipe, {name: value for name, value in given.items() if value is not None})
    with progress(stderr, "training", "per cent", "") as tick:
        result = run(model, out, config, resume=resume, overwrite=overwrite, teacher_cache=teacher_cache, progress=tick)
    if result.output is not None:  # the others of several processes have nothing to say
        print_result(result, as_json, lambda: tables.show_training(stderr, result))
