"""`moesaic evaluate`: perplexity and zero-shot accuracy."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import given
from ..report import tables
from ..report.progress import progress
from . import options
from .options import print_result, stderr


def evaluate(
    model: options.ModelArgument,
    text: options.TextFile = None,
    protocol: Annotated[str, typer.Option(help="gptq, llama.cpp or lm-eval")] = "gptq",
    window: Annotated[int, typer.Option(help="tokens in a window")] = 2_048,
    max_tokens: Annotated[int | None, typer.Option(help="stop after so many tokens")] = None,
    tasks: options.Tasks = None,
    items: options.Items = None,
    harness: Annotated[str | None, typer.Option(help="lm-eval tasks, comma-separated (needs moesaic[eval])")] = None,
    device: options.Device = "auto",
    dtype: options.ScoringDtype = "auto",
    threads: options.Threads = None,
    experts: options.Experts = None,
    adapter: options.Adapter = None,
    select: options.Select = None,
    as_json: options.Json = False,
) -> None:
    """Measure perplexity under a named protocol, and zero-shot accuracy."""
    from ..evaluation.evaluate import check_request
    from ..evaluation.evaluate import evaluate as run

    given.check(items=items)
    check_request(text, protocol, window, max_tokens, tasks, harness)
    loaded, tokenizer = options.load_model(
        model, device, dtype, threads, experts, for_scoring=True, adapter=adapter, select=select
    )
    with progress(stderr, "evaluating", "step") as tick:
        result = run(
            loaded, tokenizer, text=text, protocol=protocol, window=window, max_tokens=max_tokens, tasks=tasks,
            items=items, harness=harness, progress=tick,
        )  # fmt: skip
    print_result(result, as_json, lambda: tables.show_evaluation(stderr, result))
