"""Verbs that run and measure models: generate, evaluate, benchmark, inspect, frontier."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .. import tables
from ..errors import InputError
from . import options
from .app import app
from .options import emit, people


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
    experts: options.Experts = None,
    as_json: options.Json = False,
) -> None:
    """Continue a prompt with a dense or converted model."""
    from ..evaluation.generate import complete

    prompt = sys.stdin.read() if prompt == "-" else prompt
    if not prompt:
        raise InputError("the prompt is empty; give some text")
    loaded, tokenizer = options.load_model(model, device, dtype, threads, experts)
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
    items: options.Items = None,
    harness: Annotated[str | None, typer.Option(help="lm-eval tasks, comma-separated (needs moesaic[eval])")] = None,
    device: options.Device = "auto",
    dtype: options.ScoringDtype = "auto",
    threads: options.Threads = None,
    experts: options.Experts = None,
    as_json: options.Json = False,
) -> None:
    """Perplexity under a named protocol, and zero-shot accuracy."""
    from ..evaluation.evaluate import check_request
    from ..evaluation.evaluate import evaluate as run

    check_request(text, protocol, window, max_tokens, tasks, harness)
    loaded, tokenizer = options.load_model(model, device, dtype, threads, experts, many_tokens=True)
    with tables.progress(people, "evaluating", "step") as tick:
        result = run(
            loaded, tokenizer, text=text, protocol=protocol, window=window, max_tokens=max_tokens, tasks=tasks,
            items=items, harness=harness, progress=tick,
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
    experts: options.Experts = None,
    plot: options.Plot = None,
    as_json: options.Json = False,
) -> None:
    """Decode and prefill speed against the dense model, alternating in one process."""
    from ..evaluation.benchmark import benchmark as run
    from ..evaluation.inspect import dense_origin, prompt_tokens

    options.check_plot(plot)
    sizes = options.numbers(batch, "--batch")
    against = against or dense_origin(model)
    loaded, tokenizer = options.load_model(model, device, dtype, threads, experts)
    tokens_BL = prompt_tokens(tokenizer, prompt, max(sizes))
    dense, _ = options.load_model(against, device, str(loaded.dtype).removeprefix("torch."), threads)
    with tables.progress(people, "measuring", "measurement") as tick:
        result = run(loaded, dense, tokens_BL, new=new, batches=sizes, rounds=rounds, progress=tick)
    if plot:
        from ..export.plots import write_roofline  # matplotlib is slow to import

        write_roofline(result, plot)
    emit(result, as_json, lambda: tables.show_benchmark(people, result))


@app.command()
def inspect(
    out: Annotated[Path, typer.Argument(help="a converted model's folder", metavar="OUT")],
    as_json: options.Json = False,
) -> None:
    """Plan, method, per-layer errors and expert loads of a converted model."""
    from ..evaluation.inspect import inspect as run

    facts = run(out)
    emit(facts, as_json, lambda: tables.show_inspection(people, facts))


@app.command()
def frontier(
    model: options.ModelArgument,
    out: Annotated[Path, typer.Option(help="folder for rows and chart; finished rows are kept")] = Path("frontier"),
    active: Annotated[str, typer.Option(help="per cent of each FFN that run, comma-separated")] = "25,50,75",
    memory_factor: Annotated[str, typer.Option(help="sizes of all experts relative to the dense FFN")] = "1",
    methods: Annotated[
        str, typer.Option(help="comma-separated, or all that fit")
    ] = "default,static+closed-form,flap,cmoe",
    seeds: Annotated[str, typer.Option(help="seeds, comma-separated")] = "0",
    text: Annotated[Path | None, typer.Option(help="raw text file [default: bundled held-out text]")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="stop the perplexity after so many tokens")] = None,
    tasks: Annotated[Path | None, typer.Option(help="multiple-choice items, .jsonl")] = None,
    items: options.Items = None,
    calibration: Annotated[list[str] | None, typer.Option(help="text; repeat for more [default: bundled]")] = None,
    tokens: Annotated[int, typer.Option(help="calibration tokens", min=1)] = 16_384,
    speed: Annotated[bool, typer.Option(help="measure decode speed")] = True,
    as_json: options.Json = False,
) -> None:
    """Methods x budgets x memory on one model: a table and a chart of quality against speed."""
    from ..frontier import Measurement
    from ..frontier import frontier as run

    measurement = Measurement(
        text=str(text) if text else None, max_tokens=max_tokens, tasks=str(tasks) if tasks else None,
        items=items, calibration=tuple(calibration or ()), tokens=tokens, speed=speed,
    )  # fmt: skip
    with tables.progress(people, "frontier", "conversion") as tick:
        result = run(
            model, out, active=[share / 100 for share in options.numbers(active, "--active", float, most=100)],
            memory_factors=options.numbers(memory_factor, "--memory-factor", float, least=0.01),
            methods=methods.split(","), seeds=options.numbers(seeds, "--seeds", least=0),
            measurement=measurement, progress=tick,
        )  # fmt: skip
    emit(result, as_json, lambda: tables.show_frontier(people, result, str(out)))
