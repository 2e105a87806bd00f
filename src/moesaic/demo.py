"""The demo: a real model converted and shown beside the dense one, as a screen, a page and numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .comparison.frontier import known_as
from .comparison.llama_cpp import find_llama_cpp, llama_cpp_speed
from .config import ConvertConfig
from .conversion.convert import convert
from .errors import InputError, WorkError
from .evaluation.benchmark import benchmark
from .evaluation.inspect import prompt_tokens
from .formats.loading import load
from .report.demo import Facts
from .report.demo_page import write_demo_page
from .report.plots import write_speed
from .report.tables import note
from .serving.generate import complete

PROMPTS = (
    'def fibonacci(n: int) -> list[int]:\n    """The first n Fibonacci numbers."""\n',
    "Water is a molecule made of two hydrogen atoms and",
)
"""Code, which the demo's model was trained for, and plain text, which it is calibrated on."""
PROMPT = 512
"""Tokens read for a speed of prefill."""
INSTALL = "Not measured in llama.cpp. To add it: pip install xllamacpp"
SHARES = {"convert": 0.62, "speed": 0.18, "typed": 0.05, "llama.cpp": 0.15}
"""Of the demo's time, about."""
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Demo:
    """What the demo found."""

    facts: Facts
    """What its screen and its page show."""
    metrics: dict[str, object]
    """All that `metrics.json` holds: of `convert`, of `benchmark`, `typed` by both, `llama_cpp`."""

    def to_dict(self) -> dict[str, object]:
        """The metrics."""
        return self.metrics


def demo(
    output: Path,
    model: str = "demo",
    active: float = 0.5,
    *,
    llama_cpp: Path | None = None,
    progress: Progress | None = None,
) -> Demo:
    """Convert a model, measure both, let both type; model, `metrics.json`, plots and `report.html` stay in `output`.

    Args:
        output: the folder to make; one of an earlier demo is replaced.
        model: what to convert.
        active: share of each FFN that one token runs.
        llama_cpp: a Python that can import `xllamacpp`; None takes this one if it can.
        progress: called with (per cent done, 100, what goes on).

    Raises:
        InputError: no such model, or `llama_cpp` has no `xllamacpp`; before anything is converted.
    """
    python = find_llama_cpp(llama_cpp)
    steps = Steps(progress)
    metrics: dict[str, object] = dict(
        convert(model, output, ConvertConfig(active=active), overwrite=True, progress=steps.converting)
    )
    converted, tokenizer = load(output)
    dense, _ = load(model)
    tokens = prompt_tokens(tokenizer, PROMPT)
    metrics |= benchmark(
        converted, dense, tokens, new=16, rounds=7,
        progress=lambda done, count: steps.report("speed", done / count, "speed in transformers"),
    )  # fmt: skip
    steps.report("typed", 0, "both type")
    typed = [
        {
            "prompt": prompt,
            "dense": _continue(dense, tokenizer, prompt),
            "converted": _continue(converted, tokenizer, prompt),
        }
        for prompt in PROMPTS
    ]
    metrics |= {"model": model, "name": known_as(model), "typed": typed, "llama_cpp": None}
    del dense, converted
    metrics["llama_cpp_missing"] = INSTALL
    if python:
        try:
            metrics["llama_cpp"] = llama_cpp_speed(
                model, output, tokens[0].tolist(), python,
                progress=lambda done, count, what: steps.report("llama.cpp", done / count, what),
            ).to_dict()  # fmt: skip
            metrics["llama_cpp_missing"] = None
        except (InputError, WorkError) as error:
            metrics["llama_cpp_missing"] = f"Not measured in llama.cpp: {error}"
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    facts = Facts.from_row(metrics)
    write_speed(metrics, output)
    write_demo_page(facts, output / "report.html")
    steps.report("llama.cpp", 1, "done")
    return Demo(facts, metrics)


class Steps:
    """One bar over all parts of the demo."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress or (lambda done, count, note: None)
        self.trials: list[str] = []
        self.tried = 0.0
        """Of the conversion, the share that its trials took."""

    def report(self, part: str, share: float, what: str) -> None:
        """Say that a share of a part is done."""
        names = list(SHARES)
        before = sum(SHARES[name] for name in names[: names.index(part)])
        self.progress(round(100 * (before + share * SHARES[part])), 100, what)

    def converting(self, done: int, count: int, record: dict[str, object] | None) -> None:
        """Follow `convert`: trials, of which nobody knows how many come, then the layers."""
        if record and "trial" in record:
            name = str(record["trial"])
            if name not in self.trials:
                self.trials.append(name)
            self.tried = 0.4 * (1 - 0.6 ** (len(self.trials) - 1 + done / count))
            self.report("convert", self.tried, note(record))
        else:
            self.report("convert", self.tried + (1 - self.tried) * done / count, f"layer {done} of {count}")


def _continue(model: object, tokenizer: object, prompt: str) -> str:
    """What a model writes next, to the end of the function or of the last whole sentence."""
    text = complete(model, tokenizer, prompt, max_new_tokens=80)
    if prompt.endswith("\n"):
        lines = text.splitlines()
        end = next((i for i, line in enumerate(lines) if line.strip() and not line[:1].isspace()), len(lines))
        return "\n".join(lines[:end]).rstrip()
    return text[: text.rfind(".") + 1] or text
