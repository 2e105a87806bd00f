"""One call for what `moesaic evaluate` measures: perplexity, task files, the lm-eval harness, what models write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Unpack

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError
from ..given import check, optional_path
from ..machine import versions
from ..models.devices import dtype_name
from ..models.processor import Processor
from ..progress import Progress, unheard
from ..results import EvaluationResult, Json, TaskScore
from ..serving.questions import Words, load_processor, tokenizer_of
from .generation import Files, Generating, check_model, evaluate_generation, read_request, reference_continuations
from .perplexity import check_protocol, perplexity
from .questions import ANSWER_TOKENS
from .tasks import check_items, evaluate_tasks, have_pictures, read_tasks

Harness = Callable[[PreTrainedModel, PreTrainedTokenizerBase, list[str]], dict[str, TaskScore]]


def evaluate(
    model: PreTrainedModel,
    tokenizer: Words,
    *,
    text: str | Path | None = None,
    protocol: str = "gptq",
    window: int = 2_048,
    max_tokens: int | None = None,
    tasks: str | Path | None = None,
    items: int | None = None,
    answer_tokens: int = ANSWER_TOKENS,
    harness: str | None = None,
    generate: Files | None = None,
    progress: Progress | None = None,
    **generating: Unpack[Generating],
) -> EvaluationResult:
    """Measure perplexity (see `perplexity`), a task file (see `evaluate_tasks`), lm-eval tasks, and what models write.

    Args:
        model: a dense or converted model.
        tokenizer: the model's; for tasks with pictures its processor, from `load_processor`.
        text: a raw text file, or for `gptq` one of rows; None is the bundled held-out text.
        protocol: `gptq`, `llama.cpp` or `lm-eval`.
        window: tokens in a window.
        max_tokens: tokens after which the perplexity stops; None: all, but two windows beside `generate` alone.
        tasks: a file of items: choices, or questions with answers, with pictures or without.
        items: of each task in that file, and of each file of `generate`, at most so many.
        answer_tokens: of an answer that is written out, at most so many.
        harness: names of lm-eval's tasks, separated by commas.
        generate: files of exercises (see `read_exercises`) that the model writes greedily.
        progress: called with (finished, all) parts of a measurement, and its name.
        generating: how; `allow_code_execution`, `reference` and the other fields of `Generating`.

    Raises:
        InputError: bad text, window, protocol or task file, items that the model cannot be asked, or the harness is
            not installed; before any costly work.
    """
    text, tasks = optional_path(text), optional_path(tasks)
    check(window=window, max_tokens=max_tokens, items=items, answer_tokens=answer_tokens)
    questions = read_tasks(tasks, items) if tasks else []
    check_items(tokenizer, questions)
    request = read_request(generate, items, **generating)
    check_model(request, model, tokenizer)
    run_harness = _harness() if harness else None
    report = progress or unheard
    theirs = reference_continuations(request, model, tokenizer, report)  # first, as there may be no such model
    if request.sets and text is None and max_tokens is None:
        max_tokens = 2 * window
    found = perplexity(
        model, tokenizer_of(tokenizer), text=text, protocol=protocol, window=window, max_tokens=max_tokens,
        progress=report,
    )  # fmt: skip
    scores: dict[str, TaskScore] = {}
    if questions:
        scores = evaluate_tasks(model, tokenizer, questions, report, answer_tokens)
    if run_harness and harness:
        scores |= run_harness(model, tokenizer_of(tokenizer), harness.split(","))
    wrote = evaluate_generation(request, model, tokenizer, theirs, report)
    dtype = dtype_name(model.dtype)
    return EvaluationResult(**found._asdict(), tasks=scores, generation=wrote, dtype=dtype, versions=versions())


def task_processor(model: str | Path, tasks: Path | None) -> Processor | None:
    """Load the processor of a model that is to be asked a task file with pictures; None where there are none.

    Raises:
        InputError: a bad task file, a model of text, or no processor.
    """
    return load_processor(model) if tasks and have_pictures(read_tasks(tasks)) else None


def check_request(
    text: str | Path | None,
    protocol: str,
    window: int,
    max_tokens: int | None,
    tasks: str | Path | None,
    harness: str | None,
    generate: Files | None = None,
    items: int | None = None,
    generating: Generating | None = None,
) -> None:
    """Check a request, whatever the model is, before one is loaded.

    Raises:
        InputError: bad text, window, protocol, task file or file of exercises, or the harness is not installed.
    """
    text, tasks = optional_path(text), optional_path(tasks)
    check(window=window, max_tokens=max_tokens)
    check_protocol(text, protocol, window, max_tokens)
    if tasks:
        read_tasks(tasks)
    read_request(generate, items, **(generating or {}))
    if items is not None and not (tasks or generate):
        raise InputError("--items has no use without --tasks or --generate; give one of them too")
    if harness:
        _harness(harness.split(","))


def _harness(names: list[str] | None = None) -> Harness:
    """Import EleutherAI's lm-evaluation-harness as a function of (model, tokenizer, task names)."""
    try:
        from lm_eval import simple_evaluate  # pyrefly: ignore[missing-import]
        from lm_eval.models.huggingface import HFLM  # pyrefly: ignore[missing-import]
        from lm_eval.tasks import TaskManager  # pyrefly: ignore[missing-import]
    except ImportError:
        raise InputError("--harness needs lm-eval; install it with: pip install 'moesaic[eval]'") from None
    if names:
        manager = TaskManager()  # reads the list of all tasks, once
        if unknown := [name for name in names if not manager.match_tasks([name])]:
            name = unknown[0]
            raise InputError(f"--harness: lm-eval has no task '{name}'; lm-eval ls tasks lists them")

    def run(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: list[str]) -> dict[str, TaskScore]:
        return harness_scores(simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=names))

    return run


def harness_scores(done: Json) -> dict[str, TaskScore]:
    """Read what `lm_eval.simple_evaluate` gave; a group of tasks has the items of its tasks."""

    def items(name: str) -> int:
        own = done["n-samples"].get(name)
        return own["effective"] if own else sum(map(items, done.get("group_subtasks", {}).get(name, ())))

    def number(value: object) -> float | None:  # of one item the harness writes "N/A" as the error
        return float(value) if isinstance(value, int | float) else None

    return {
        name: TaskScore(
            acc=number(values.get("acc,none")), acc_norm=number(values.get("acc_norm,none")),
            stderr=number(values.get("acc_stderr,none")), n=items(name),
        )
        for name, values in done["results"].items()
    }  # fmt: skip
