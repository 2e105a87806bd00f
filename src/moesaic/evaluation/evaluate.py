"""One call for what `moesaic evaluate` measures: perplexity, task files, the lm-eval harness."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError
from ..given import check, optional_path
from ..machine import versions
from ..results import EvaluationResult, TaskScore
from .perplexity import check_protocol, perplexity
from .tasks import evaluate_tasks, read_tasks

Harness = Callable[[PreTrainedModel, PreTrainedTokenizerBase, list[str]], dict[str, TaskScore]]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: str | Path | None = None,
    protocol: str = "gptq",
    window: int = 2_048,
    max_tokens: int | None = None,
    tasks: str | Path | None = None,
    items: int | None = None,
    harness: str | None = None,
    progress: Callable[..., None] | None = None,
) -> EvaluationResult:
    """Measure perplexity (see `perplexity`), accuracies of a task file (see `evaluate_tasks`), lm-eval tasks by name.

    Args:
        model: a dense or converted model.
        tokenizer: the model's.
        text: a raw text file, or for `gptq` one of rows; None is the bundled held-out text.
        protocol: `gptq`, `llama.cpp` or `lm-eval`.
        window: tokens in a window.
        max_tokens: tokens after which the perplexity stops; None: all.
        tasks: a file of multiple-choice items.
        items: of each task in that file, at most so many.
        harness: names of lm-eval's tasks, separated by commas.
        progress: called with (finished, all) measurements.

    Raises:
        InputError: bad text, window, protocol or task file, or the harness is not installed; before any costly work.
    """
    text, tasks = optional_path(text), optional_path(tasks)
    check(window=window, max_tokens=max_tokens, items=items)
    questions = read_tasks(tasks, items) if tasks else []
    run_harness = _harness() if harness else None
    report = progress or (lambda done, count, note="": None)
    found = perplexity(
        model, tokenizer, text=text, protocol=protocol, window=window, max_tokens=max_tokens,
        progress=lambda done, count: report(done, count, "perplexity"),
    )  # fmt: skip
    scores: dict[str, TaskScore] = {}
    if questions:
        scores = evaluate_tasks(model, tokenizer, questions, lambda done, count: report(done, count, "tasks"))
    if run_harness and harness:
        scores |= run_harness(model, tokenizer, harness.split(","))
    dtype = str(model.dtype).removeprefix("torch.")
    return EvaluationResult(**found._asdict(), tasks=scores, dtype=dtype, versions=versions())


def check_request(
    text: str | Path | None,
    protocol: str,
    window: int,
    max_tokens: int | None,
    tasks: str | Path | None,
    harness: str | None,
) -> None:
    """Check a request, whatever the model is, before one is loaded.

    Raises:
        InputError: bad text, window, protocol or task file, or the harness is not installed.
    """
    text, tasks = optional_path(text), optional_path(tasks)
    check(window=window, max_tokens=max_tokens)
    check_protocol(text, protocol, window, max_tokens)
    if tasks:
        read_tasks(tasks)
    if harness:
        _harness()


def _harness() -> Harness:
    """Import EleutherAI's lm-evaluation-harness as a function of (model, tokenizer, task names)."""
    try:
        from lm_eval import simple_evaluate  # pyrefly: ignore[missing-import]
        from lm_eval.models.huggingface import HFLM  # pyrefly: ignore[missing-import]
    except ImportError:
        raise InputError("--harness needs lm-eval; install it with: pip install 'moesaic[eval]'") from None

    def run(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: list[str]) -> dict[str, TaskScore]:
        done = simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=names)
        return {
            name: TaskScore(
                acc=values.get("acc,none"),
                acc_norm=values.get("acc_norm,none"),
                stderr=values.get("acc_stderr,none"),
                n=done["n-samples"][name]["effective"],
            )
            for name, values in done["results"].items()
        }

    return run
