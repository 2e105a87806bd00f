"""The command line: verbs in pipeline order. Parses, calls, prints; nothing else.

Exit codes: 0 done, 1 the work failed (self-test, collapse), 2 bad input. With `--json` standard output holds exactly
one JSON object; everything for people goes to standard error.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options, tables
from .errors import InputError, WorkError
from .options import emit, people

app = typer.Typer(
    help="Turn a dense language model into a Mixture-of-Experts, without training, and measure what that gives.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line; errors become one line and an exit code."""
    try:
        app(standalone_mode=True)
    except (InputError, WorkError, OSError) as error:  # OSError: a disk fills up, a file goes away under our hands
        people.print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        people.print("interrupted")
        sys.exit(130)


def _escape(text: str) -> str:
    return text.replace("[", "\\[")


@app.callback()
def _quiet() -> None:
    """Keep libraries' progress bars and notices out of our output."""
    import transformers
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("gguf").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=transformers.__name__)


@app.command()
def plan(
    model: options.ModelArgument,
    active: Annotated[float, typer.Option(help="wanted share of each FFN that one token runs")] = 0.5,
    memory_factor: Annotated[float, typer.Option(help="size of all experts relative to the dense FFN")] = 1.0,
    as_json: options.Json = False,
) -> None:
    """Shapes near a budget: memory, possible speed, and which engines run each."""
    from .shapes import plans

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
    partition: options.Partition = None,
    router: options.Router = None,
    recovery: options.Recovery = None,
    calibration: Annotated[
        list[str] | None, typer.Option(help=".txt or .jsonl file or datasets name; repeat for more [default: bundled]")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="calibration tokens [default: 16384]")] = None,
    window: Annotated[int | None, typer.Option(help="tokens of one calibration sequence [default: 256]")] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML with any of these settings; options override it")] = None,
    format: options.Format = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ... [default: auto]")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16, float16, float32 [default: auto]")] = None,
    seed: Annotated[int | None, typer.Option(help="seed of everything random [default: 0]")] = None,
    resume: Annotated[bool, typer.Option(help="go on with an unfinished conversion")] = True,
    overwrite: Annotated[bool, typer.Option(help="replace OUT if it exists")] = False,
    force: Annotated[bool, typer.Option(help="accept a collapsed result")] = False,
    dry_run: Annotated[bool, typer.Option(help="check everything, print the plan, stop")] = False,
    as_json: options.Json = False,
) -> None:
    """Convert a dense model into a Mixture-of-Experts, layer by layer, without training."""
    from .choice import candidates
    from .convert import convert as run
    from .job import describe, make_config
    from .models.writer import check_output

    given = {
        "active": active, "plan": plan, "expert_width": expert_width, "partition": partition, "router": router,
        "tokens": tokens, "format": format, "seed": seed, "calibration": tuple(calibration) if calibration else None,
        "memory_factor": memory_factor, "recovery": recovery, "window": window, "device": device, "dtype": dtype,
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
def generate(
    model: options.ModelArgument,
    prompt: Annotated[str, typer.Argument(help="text to continue; - reads standard input")],
    max_new_tokens: Annotated[int, typer.Option(help="tokens to add", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy", min=0)] = 0.0,
    chat: Annotated[bool, typer.Option(help="use the model's chat template")] = False,
    seed: Annotated[int, typer.Option(help="seed of sampling")] = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Continue a prompt with a dense or converted model."""
    from .evaluation.generate import complete

    prompt = sys.stdin.read() if prompt == "-" else prompt
    if not prompt:
        raise InputError("the prompt is empty; give some text")
    loaded, tokenizer = options.load_model(model, device, dtype, threads)
    with people.status("generating"):
        text = complete(
            loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, chat=chat, seed=seed
        )
    emit({"prompt": prompt, "completion": text}, as_json, lambda: print(text if chat else prompt + text))


@app.command()
def evaluate(
    model: options.ModelArgument,
    text: Annotated[Path | None, typer.Option(help="raw text file [default: bundled held-out text]")] = None,
    protocol: Annotated[str, typer.Option(help="gptq, llama.cpp or lm-eval")] = "gptq",
    window: Annotated[int, typer.Option(help="tokens in a window")] = 2_048,
    max_tokens: Annotated[int | None, typer.Option(help="stop after so many tokens")] = None,
    tasks: Annotated[Path | None, typer.Option(help="multiple-choice items, .jsonl")] = None,
    harness: Annotated[str | None, typer.Option(help="lm-eval tasks, comma-separated (needs moesaic[eval])")] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Perplexity under a named protocol, and zero-shot accuracy."""
    from .evaluation.evaluate import check_request
    from .evaluation.evaluate import evaluate as run

    check_request(text, protocol, window, max_tokens, tasks, harness)
    loaded, tokenizer = options.load_model(model, device, dtype, threads)
    with tables.progress(people, "evaluating", "step") as tick:
        result = run(
            loaded, tokenizer, text=text, protocol=protocol, window=window, max_tokens=max_tokens, tasks=tasks,
            harness=harness, progress=tick,
        )  # fmt: skip
    emit(result, as_json, lambda: tables.show_evaluation(people, result))


@app.command()
def benchmark(
    model: options.ModelArgument,
    against: options.Against = None,
    prompt: Annotated[int, typer.Option(help="prompt tokens", min=2)] = 512,
    new: Annotated[int, typer.Option(help="new tokens", min=1)] = 32,
    batch: Annotated[str, typer.Option(help="sequences decoded at once, comma-separated")] = "1",
    rounds: Annotated[int, typer.Option(help="timed rounds", min=1)] = 5,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    plot: options.Plot = None,
    as_json: options.Json = False,
) -> None:
    """Decode and prefill speed against the dense model, alternating in one process."""
    from .evaluation.benchmark import benchmark as run
    from .evaluation.inspect import dense_origin, prompt_tokens

    options.check_plot(plot)
    sizes = options.numbers(batch, "--batch")
    against = against or dense_origin(model)
    loaded, tokenizer = options.load_model(model, device, dtype, threads)
    tokens_BL = prompt_tokens(tokenizer, prompt, max(sizes))
    dense, _ = options.load_model(against, device, str(loaded.dtype).removeprefix("torch."), threads)
    with tables.progress(people, "measuring", "measurement") as tick:
        result = run(loaded, dense, tokens_BL, new=new, batches=sizes, rounds=rounds, progress=tick)
    if plot:
        from .export.plots import write_roofline  # matplotlib is slow to import

        write_roofline(result, plot)
    emit(result, as_json, lambda: tables.show_benchmark(people, result))


@app.command()
def inspect(
    out: Annotated[Path, typer.Argument(help="a converted model's folder", metavar="OUT")],
    as_json: options.Json = False,
) -> None:
    """Plan, method, per-layer errors and expert loads of a converted model."""
    from .evaluation.inspect import inspect as run

    facts = run(out)
    emit(facts, as_json, lambda: tables.show_inspection(people, facts))


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="a converted model's folder", metavar="MODEL")],
    out: Annotated[Path, typer.Argument(help="folder (or .gguf file) to make", metavar="OUT")],
    to: options.Target = "auto",
    outtype: options.Outtype = None,
    resume: Annotated[bool, typer.Option(help="go on with an unfinished export")] = True,
    overwrite: Annotated[bool, typer.Option(help="replace OUT if it exists")] = False,
    as_json: options.Json = False,
) -> None:
    """Write a converted model as an architecture that stock engines load, and check that it says the same."""
    from .export.native import export as run

    with tables.progress(people, "exporting", "layer") as tick:
        facts = run(model, out, to, outtype=outtype, resume=resume, overwrite=overwrite, progress=tick)
    done = "read back" if facts["target"] == "gguf" else "checked"
    emit(facts, as_json, lambda: tables.show_facts(people, f"{out}: written and {done}", facts))


@app.command()
def frontier(
    model: options.ModelArgument,
    out: Annotated[Path, typer.Option(help="folder for rows and chart; finished rows are kept")] = Path("frontier"),
    active: Annotated[str, typer.Option(help="per cent of each FFN that run, comma-separated")] = "25,50,75",
    memory_factor: Annotated[str, typer.Option(help="sizes of all experts relative to the dense FFN")] = "1",
    methods: Annotated[str, typer.Option(help="comma-separated, or all")] = "default,static+closed-form,flap,cmoe",
    seeds: Annotated[str, typer.Option(help="seeds, comma-separated")] = "0",
    text: Annotated[Path | None, typer.Option(help="raw text file [default: bundled held-out text]")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="stop the perplexity after so many tokens")] = None,
    tasks: Annotated[Path | None, typer.Option(help="multiple-choice items, .jsonl")] = None,
    calibration: Annotated[list[str] | None, typer.Option(help="text; repeat for more [default: bundled]")] = None,
    tokens: Annotated[int, typer.Option(help="calibration tokens", min=1)] = 16_384,
    speed: Annotated[bool, typer.Option(help="measure decode speed")] = True,
    as_json: options.Json = False,
) -> None:
    """Methods x budgets x memory on one model: a table and a chart of quality against speed."""
    from .frontier import METHODS, NEURONS, Measurement
    from .frontier import frontier as run

    measurement = Measurement(
        text=str(text) if text else None, max_tokens=max_tokens, tasks=str(tasks) if tasks else None,
        calibration=tuple(calibration or ()), tokens=tokens, speed=speed,
    )  # fmt: skip
    with tables.progress(people, "frontier", "conversion") as tick:
        result = run(
            model, out, active=[share / 100 for share in options.numbers(active, "--active", float)],
            memory_factors=options.numbers(memory_factor, "--memory-factor", float, least=0.01),
            methods=[*METHODS, NEURONS] if methods == "all" else methods.split(","),
            seeds=options.numbers(seeds, "--seeds", least=0), measurement=measurement, progress=tick,
        )  # fmt: skip
    emit(result, as_json, lambda: tables.show_frontier(people, result, str(out)))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for the result")] = Path("demo-output"),
    model: Annotated[str, typer.Option(help="the model to show")] = "demo",
    active: Annotated[float, typer.Option(help="share of each FFN that one token runs")] = 0.5,
    as_json: options.Json = False,
) -> None:
    """Convert the demo model and show it beside the dense one: perplexity, speed, text."""
    from .demo import demo as run

    with tables.progress(people, "demo", "step") as tick:
        result = run(out, model, active, progress=tick)
    emit(result, as_json, lambda: tables.show_demo(people, result))


if __name__ == "__main__":
    main()
