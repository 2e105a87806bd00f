"""`moesaic evaluate`: perplexity, zero-shot accuracy and what the model writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import given
from ..report import tables
from ..report.generation import show_generation
from ..report.progress import progress
from ..report.store import show_store
from ..results import EvaluationResult
from . import options, pictures
from .options import print_result, stderr

if TYPE_CHECKING:
    from ..evaluation.generation import Generating

Generate = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE", help="exercises to write: HumanEval, MBPP, GSM8K, or any text; repeat for more",
        callback=options.expand,
    ),
]  # fmt: skip
AllowCode = Annotated[
    bool, typer.Option("--allow-code-execution", help="run code that the model writes, within limits")
]
Reference = Annotated[
    str | None,
    typer.Option(metavar="DENSE", help="compare what is written with this dense model's", callback=options.expand),
]
Answers = Annotated[
    Path | None, typer.Option(metavar="OUT.jsonl", help="write what was written there", callback=options.expand)
]


def evaluate(
    model: options.ModelArgument,
    text: options.TextFile = None,
    protocol: Annotated[str, typer.Option(help="gptq, llama.cpp or lm-eval")] = "gptq",
    window: Annotated[int, typer.Option(help="tokens in a window")] = 2_048,
    max_tokens: Annotated[int | None, typer.Option(help="stop after so many tokens")] = None,
    tasks: options.Tasks = None,
    items: options.Items = None,
    answer_tokens: Annotated[int, typer.Option(help="of an answer that is written out, at most")] = 16,
    harness: Annotated[str | None, typer.Option(help="lm-eval tasks, comma-separated (needs moesaic[eval])")] = None,
    generate: Generate = None,
    allow_code_execution: AllowCode = False,
    reference: Reference = None,
    reference_tokens: Annotated[int, typer.Option(help="that it writes for a prompt, at most")] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="that the model writes for a prompt, at most")] = 512,
    batch: Annotated[int, typer.Option(help="prompts that are continued together")] = 16,
    chat: Annotated[bool | None, typer.Option(help="ask by the chat template [default: questions only]")] = None,
    answers: Answers = None,
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
    as_json: options.Json = False,
) -> None:
    """Measure perplexity under a named protocol, zero-shot accuracy, and what the model writes."""
    from ..evaluation.evaluate import check_request
    from ..evaluation.evaluate import evaluate as run
    from ..store.opening import report_of

    store = options.store_options(expert_memory, cache, prefetch, cache_bias)
    given.check(items=items, answer_tokens=answer_tokens)
    generating: Generating = {
        "allow_code_execution": allow_code_execution, "reference": reference, "reference_tokens": reference_tokens,
        "max_new_tokens": max_new_tokens, "batch": batch, "chat": chat, "answers": answers,
    }  # fmt: skip
    check_request(text, protocol, window, max_tokens, tasks, harness, generate, items, generating)
    processor = pictures.task_processor(model, tasks)
    loaded, tokenizer = options.load_model(
        model, device, dtype, threads, experts, adapter=adapter, select=select, store=store
    )
    with progress(stderr, "evaluating", "step") as tick:
        result = run(
            loaded, processor or tokenizer, text=text, protocol=protocol, window=window, max_tokens=max_tokens,
            tasks=tasks, items=items, answer_tokens=answer_tokens, harness=harness, generate=generate, progress=tick,
            **generating,
        )  # fmt: skip
    result = replace(result, expert_store=report_of(loaded))
    print_result(result, as_json, lambda: _show(result))


def _show(result: EvaluationResult) -> None:
    tables.show_evaluation(stderr, result)
    show_generation(stderr, result.generation)
    if result.expert_store:
        show_store(stderr, result.expert_store)
