"""`moesaic benchmark`: speed against the dense model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from .. import given
from ..errors import InputError
from ..models.devices import dtype_name
from ..report import tables
from ..report.progress import progress
from . import options, pictures
from .options import print_result, stderr

Measured = Annotated[
    str | None, typer.Option("--for", help="llama.cpp: dense, --siblings and MODEL in its types, and their quality")
]
Outtypes = Annotated[str, typer.Option("--outtype", help="for llama.cpp, comma-separated")]
Siblings = Annotated[str | None, typer.Option(help="for llama.cpp: smaller dense models, comma-separated")]


class Models(NamedTuple):
    """What is compared in llama.cpp."""

    model: str
    against: str | None
    siblings: str | None
    outtypes: str
    python: Path | None


class Asked(NamedTuple):
    """How it is measured."""

    prompt: int
    new: int
    rounds: int
    threads: int | None
    text: Path | None
    max_tokens: int | None
    plot: Path | None


ONLY_HERE = (
    "image", "batch", "device", "dtype", "experts", "adapter", "select", "expert_memory", "cache", "prefetch",
    "cache_bias",
)  # fmt: skip
ONLY_LLAMA_CPP = ("siblings", "outtypes", "text", "max_tokens", "llama_cpp")


def refuse_options(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Check that options are left out of a command line.

    Raises:
        InputError: one is given; the message is its name and why it is not heard.
    """
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name in names and source and source.name == "COMMANDLINE":
            raise InputError(f"{option.opts[0]} {why}")


def check_heard(context: typer.Context, engine: str | None) -> None:
    """Check that no option of this command line is passed over: some are for llama.cpp, some for transformers.

    Raises:
        InputError: one is given that has no say.
    """
    if engine is None:
        refuse_options(context, ONLY_LLAMA_CPP, "is for --for llama.cpp alone; give both, or drop it")
    else:
        refuse_options(context, ONLY_HERE, f"has no say in {engine}; drop it, or --for {engine}")


def in_llama_cpp(engine: str, models: Models, asked: Asked, as_json: bool) -> None:
    """Measure dense, siblings and a converted model in llama.cpp's types.

    Raises:
        InputError: another engine, or no xllamacpp.
    """
    from ..comparison.llama_cpp import find_llama_cpp
    from ..comparison.quantised import compare_quantised
    from ..report.quantised import show_quantised, write_quantised

    if engine != "llama.cpp":
        raise InputError(f"--for {engine}: only llama.cpp is measured so; without --for it is transformers")
    options.check_plot(asked.plot)
    options.set_threads(asked.threads)
    python = find_llama_cpp(models.python)
    if python is None:
        raise InputError("llama.cpp is run by xllamacpp: pip install xllamacpp, or --llama-cpp PYTHON that has it")
    with progress(stderr, "measuring", "file") as tick:
        result = compare_quantised(
            [models.model], python, against=models.against, outtypes=models.outtypes.split(","),
            siblings=models.siblings.split(",") if models.siblings else (), text=asked.text,
            max_tokens=asked.max_tokens, prompt=asked.prompt, new=asked.new, rounds=asked.rounds, progress=tick,
        )  # fmt: skip
    if asked.plot:
        write_quantised(result, asked.plot)
    print_result(result, as_json, lambda: show_quantised(stderr, result))


def compared(model: str, against: str | None, adapted: bool) -> tuple[str, str]:
    """Say what a model is measured against, and what that is called; with an adapter or a store itself without.

    Raises:
        InputError: it was converted from a folder, which must be named.
    """
    if adapted and against is None:
        return "without", model
    from ..formats.converted import dense_origin

    return "dense", against or dense_origin(model)


def benchmark(
    context: typer.Context,
    model: options.ModelArgument,
    against: options.Against = None,
    prompt: Annotated[int, typer.Option(help="prompt tokens")] = 512,
    new: Annotated[int, typer.Option(help="new tokens")] = 32,
    batch: Annotated[str, typer.Option(help="sequences decoded at once, comma-separated")] = "1",
    rounds: Annotated[int, typer.Option(help="timed rounds")] = 5,
    image: pictures.Timed = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    experts: options.Experts = None,
    adapter: options.Adapter = None,
    select: options.Select = None,
    expert_memory: options.ExpertMemory = None,
    cache: options.Cache = None,
    prefetch: options.Prefetch = True,
    cache_bias: options.CacheBias = 0.0,
    engine: Measured = None,
    llama_cpp: options.LlamaCpp = None,
    outtypes: Outtypes = "f16,q8_0,q4_0",
    siblings: Siblings = None,
    text: options.TextFile = None,
    max_tokens: Annotated[int | None, typer.Option(help="for llama.cpp: of --text, so many tokens")] = None,
    plot: options.Plot = None,
    as_json: options.Json = False,
) -> None:
    """Measure speed against the dense model, or with --adapter, --select or --expert-memory against it without."""
    check_heard(context, engine)
    if engine is not None:
        models = Models(model, against, siblings, outtypes, llama_cpp)
        return in_llama_cpp(engine, models, Asked(prompt, new, rounds, threads, text, max_tokens, plot), as_json)
    from ..evaluation.benchmark import benchmark as run
    from ..evaluation.inspect import prompt_tokens
    from ..serving.generate import check_length

    options.check_plot(plot)
    sizes = options.whole_numbers(batch, "--batch", given.LIMITS["batch"])
    given.check(prompt=prompt, new=new, rounds=rounds)
    store = options.store_options(expert_memory, cache, prefetch, cache_bias)
    adapted = store is not None or adapter is not None or select is not None
    column, against = compared(model, against, adapted)
    processor, shown = pictures.read_pictures(model, image)
    loaded, tokenizer = options.load_model(
        model, device, dtype, threads, experts, adapter=adapter, select=select, store=store
    )
    check_length(loaded, prompt, new, "--new")
    tokens_BL = prompt_tokens(tokenizer, prompt, max(sizes))
    dense, _ = options.load_model(against, device, dtype_name(loaded.dtype), threads)
    with progress(stderr, "measuring", "measurement") as tick:
        result = run(
            loaded, dense, tokens_BL, new=new, batches=sizes, rounds=rounds, processor=processor, images=shown,
            progress=tick,
        )  # fmt: skip
    if plot:
        from ..report.plots import write_roofline  # matplotlib is slow to import

        write_roofline(result, plot)
    print_result(result, as_json, lambda: tables.show_benchmark(stderr, result, column))
