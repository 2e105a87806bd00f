"""Verbs that make models: plan, convert, finetune, export, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import tables
from . import options
from .app import app
from .options import emit, people


@app.command()
def plan(
    model: options.ModelArgument,
    active: Annotated[float, typer.Option(help="wanted share of each FFN that one token runs")] = 0.5,
    memory_factor: Annotated[float, typer.Option(help="size of all experts relative to the dense FFN")] = 1.0,
    as_json: options.Json = False,
) -> None:
    """Shapes near a budget: memory, possible speed, and which engines run each."""
    from ..shapes import plans

    with people.status("counting"):
        found = plans(model, active, memory_factor)
    emit(found, as_json, lambda: tables.show_plans(people, found))


@app.command()
def convert(
    model: options.ModelArgument,
    out: options.OutArgument,
    active: Annotated[float | None, typer.Option(help="share of each FFN that one token runs [default: 0.5]")] = None,
    memory_factor: Annotated[
        float | None, typer.Option(help="size of all experts relative to the dense FFN [default: 1]")
    ] = None,
    plan: Annotated[str | None, typer.Option(help="fixed shape, e.g. S3A3E8: 3 shared + 3 of 8 groups run")] = None,
    expert_width: Annotated[int | None, typer.Option(help="neurons in a group", min=1)] = None,
    fine: options.Fine = None,
    partition: options.Partition = None,
    router: options.Router = None,
    recovery: options.Recovery = None,
    calibration: Annotated[
        list[str] | None, typer.Option(help=".txt or .jsonl file or datasets name; repeat for more [default: bundled]")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="calibration tokens [default: 16384]")] = None,
    window: Annotated[int | None, typer.Option(help="tokens of one calibration sequence [default: 256]")] = None,
    first_tokens: Annotated[
        int | None, typer.Option(help="tokens seen as a text's first [default: an eighth of --tokens; 0 after a BOS]")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML with any of these settings; options override it")] = None,
    format: options.Format = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ... [default: auto]")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16, float16, float32 [default: auto]")] = None,
    seed: Annotated[int | None, typer.Option(help="seed of everything random [default: 0]")] = None,
    resume: Annotated[bool, typer.Option(help="go on with an unfinished conversion")] = True,
    overwrite: options.Overwrite = False,
    force: Annotated[bool, typer.Option(help="accept a collapsed result")] = False,
    dry_run: Annotated[bool, typer.Option(help="check everything, print the plan, stop")] = False,
    as_json: options.Json = False,
) -> None:
    """Convert a dense model into a Mixture-of-Experts, layer by layer, without training."""
    from ..choice import candidates
    from ..convert import convert as run
    from ..job import describe, make_config
    from ..models.writer import check_output

    given = {
        "active": active, "plan": plan, "expert_width": expert_width, "partition": partition, "router": router,
        "tokens": tokens, "format": format, "seed": seed, "calibration": tuple(calibration) if calibration else None,
        "memory_factor": memory_factor, "recovery": recovery, "window": window, "device": device, "dtype": dtype,
        "first_tokens": first_tokens, "fine": fine,
    }  # fmt: skip
    config = make_config(recipe, {name: value for name, value in given.items() if value is not None})
    if dry_run:
        check_output(out, overwrite)
        jobs = candidates(model, config)
        jobs[0].check_space(out)
        facts = describe(jobs)
        emit(facts, as_json, lambda: tables.show_facts(people, "Dry run: nothing was written", facts))
        return
    with tables.progress(people, "converting", "layer") as tick:

        def show(done: int, count: int, record: dict[str, Any] | None) -> None:
            tick(done, count, tables.note(record))

        metrics = run(model, out, config, resume=resume, overwrite=overwrite, force=force, progress=show)
    emit(metrics, as_json, lambda: tables.show_conversion(people, metrics))


@app.command()
def finetune(
    model: Annotated[str, typer.Argument(help="a converted model's folder", metavar="MODEL")],
    out: options.OutArgument,
    teacher: Annotated[str | None, typer.Option(help="the dense model [default: what MODEL was made of]")] = None,
    data: options.Data = None,
    method: options.Method = None,
    objective: options.Objective = None,
    steps: Annotated[int | None, typer.Option(help="steps [default: one pass over the samples]", min=1)] = None,
    minutes: Annotated[float | None, typer.Option(help="stop after so many minutes")] = None,
    samples: Annotated[int | None, typer.Option(help="sequences to train on [default: 2000]", min=1)] = None,
    window: Annotated[int | None, typer.Option(help="tokens in a sequence [default: 512]", min=2)] = None,
    batch: Annotated[int | None, typer.Option(help="sequences in a step [default: 2]", min=1)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="[default: the method's]")] = None,
    rank: Annotated[int | None, typer.Option(help="of low-rank adapters [default: 8]", min=1)] = None,
    alpha: Annotated[int | None, typer.Option(help="of low-rank adapters [default: 32]", min=1)] = None,
    balance: options.Balance = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML with any of these settings; options override it")] = None,
    teacher_cache: Annotated[Path | None, typer.Option(help="keep the teacher's logits there, for other runs")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ... [default: auto]")] = None,
    shard: Annotated[bool | None, typer.Option(help="cut parameters over the processes (FSDP)")] = None,
    seed: Annotated[int | None, typer.Option(help="seed of everything random [default: 0]")] = None,
    resume: Annotated[bool, typer.Option(help="go on with an unfinished training")] = True,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Train a converted model a little, taught by the dense one; never worse than it came."""
    from ..finetune import finetune as run
    from ..training.config import make_config

    given = {
        "teacher": teacher, "data": tuple(data) if data else None, "method": method, "objective": objective,
        "steps": steps, "minutes": minutes, "samples": samples, "window": window, "batch": batch, "rank": rank,
        "learning_rate": learning_rate, "alpha": alpha, "balance": balance, "device": device, "shard": shard,
        "seed": seed,
    }  # fmt: skip
    config = make_config(recipe, {name: value for name, value in given.items() if value is not None})
    with tables.progress(people, "training", "per cent", "") as tick:
        facts = run(model, out, config, resume=resume, overwrite=overwrite, teacher_cache=teacher_cache, progress=tick)
    if "output" in facts:  # the others of several processes have nothing to say
        emit(facts, as_json, lambda: tables.show_training(people, facts))


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="a converted model's folder", metavar="MODEL")],
    out: Annotated[Path, typer.Argument(help="folder (or .gguf file) to make", metavar="OUT")],
    to: options.Target = "auto",
    outtype: options.Outtype = None,
    resume: Annotated[bool, typer.Option(help="go on with an unfinished export")] = True,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Write a converted model as an architecture that stock engines load, and check that it says the same."""
    from ..export.native import export as run

    with tables.progress(people, "exporting", "layer") as tick:
        facts = run(model, out, to, outtype=outtype, resume=resume, overwrite=overwrite, progress=tick)
    done = "read back" if facts["target"] == "gguf" else "checked"
    emit(facts, as_json, lambda: tables.show_facts(people, f"{out}: written and {done}", facts))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for the result")] = Path("demo-output"),
    model: Annotated[str, typer.Option(help="the model to show")] = "demo",
    active: Annotated[float, typer.Option(help="share of each FFN that one token runs")] = 0.5,
    as_json: options.Json = False,
) -> None:
    """Convert the demo model and show it beside the dense one: perplexity, speed, text."""
    from ..demo import demo as run

    with tables.progress(people, "demo", "step") as tick:
        result = run(out, model, active, progress=tick)
    emit(result, as_json, lambda: tables.show_demo(people, result))
