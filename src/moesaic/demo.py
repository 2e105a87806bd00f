"""The demo: a real model converted and shown beside the dense one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .config import ConvertConfig
from .conversion.convert import convert
from .evaluation.benchmark import benchmark
from .evaluation.inspect import prompt_tokens
from .formats.loading import load
from .report.plots import write_speed
from .report.tables import note
from .serving.generate import complete

PROMPT = 'def fibonacci(n: int) -> list[int]:\n    """The first n Fibonacci numbers."""\n'


def demo(
    output: Path, model: str = "demo", active: float = 0.5, *, progress: Callable[..., None] | None = None
) -> dict[str, Any]:
    """Convert a model, then measure and complete a prompt with both; the result stays in `output`.

    Returns:
        The metrics of `convert` and `benchmark` in one, and both completions; also in `output/metrics.json`.
    """
    report = progress or (lambda done, count, note="": None)
    metrics = convert(
        model, output, ConvertConfig(active=active), overwrite=True,
        progress=lambda done, count, record: report(done, count, f"converting layers, {note(record)}"),
    )  # fmt: skip
    converted, tokenizer = load(output)
    dense, _ = load(model)
    speed = benchmark(
        converted, dense, prompt_tokens(tokenizer, 512), new=16, rounds=7,
        progress=lambda done, count: report(done, count, "measuring speed"),
    )  # fmt: skip
    completions = {
        name: complete(m, tokenizer, PROMPT, max_new_tokens=64)
        for name, m in (("dense", dense), ("converted", converted))
    }
    result = metrics | speed | {"model": model, "prompt": PROMPT, "completions": completions}
    (output / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
    write_speed(result, output)
    return result
