"""The demo: a real model converted and shown beside the dense one, as a screen, a page and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .checkpoint.builtin import known_as
from .checkpoint.facts import METRICS_FILE
from .comparison.llama_cpp import find_llama_cpp, llama_cpp_speed
from .config import ConvertConfig
from .conversion.convert import convert
from .errors import InputError, WorkError
from .evaluation.benchmark import benchmark
from .evaluation.inspect import prompt_tokens
from .files import write_json
from .given import check, optional_path, path, place
from .progress import Progress, unheard
from .report.demo_page import PAGE, write_demo_page
from .report.plots import write_speed
from .results import DemoResult, Typed
from .serving.generate import complete
from .serving.loading import load

PROMPTS = {
    'def fibonacci(n: int) -> list[int]:\n    """The first n Fibonacci numbers."""\n': 128,
    "Water is a molecule made of two hydrogen atoms and": 40,
}
"""Code, which the demo's model was trained for, and plain text; at most so many new tokens each."""
TOKENS = 8_192
"""Of calibration, half of what `convert` takes by default: the demo is to end within minutes."""
ACTIVE = 0.5
PARTITIONS = {"demo": "coactivation"}
"""What `auto` finds, of models whose trial need not be seen again."""


class Shape(NamedTuple):
    """What is shown of a model that was measured."""

    active: float
    plan: str | None = None


SHAPES = {"demo": Shape(0.625, "S3A2E8")}
"""The least that still writes a right function."""
PROMPT = 512
"""Tokens read for a speed of prefill."""
ROUNDS = 3
INSTALL = "Not measured in llama.cpp. To add it: pip install xllamacpp"
SHARES = {"convert": 0.62, "speed": 0.18, "typed": 0.05, "llama.cpp": 0.15}
"""Of the demo's time, about."""


def demo(
    output: str | Path,
    model: str = "demo",
    active: float | None = None,
    *,
    llama_cpp: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> DemoResult:
    """Convert a model, measure both, let both type; model, `metrics.json`, plots and `report.html` stay in `output`.

    Args:
        output: the folder to make; one of an earlier demo is replaced.
        overwrite: replace another model of moesaic's too.
        model: what to convert.
        active: share of each FFN that one token runs; None: half, or for `demo` five eighths.
        llama_cpp: a Python that can import `xllamacpp`; None takes this one if it can.
        progress: called with (per cent done, 100, what goes on).

    Raises:
        InputError: no such model, or `llama_cpp` has no `xllamacpp`; before anything is converted.
    """
    check(active=active)
    output, model = path(output), place(model)
    python = find_llama_cpp(optional_path(llama_cpp))
    steps = Steps(progress)
    active, config = shown(model, active).active, shown_config(model, active)
    overwrite = overwrite or (output / PAGE).is_file()
    conversion = convert(model, output, config, overwrite=overwrite, progress=steps.converting)
    converted, tokenizer = load(output)
    dense = load(model).model
    tokens_BL = prompt_tokens(tokenizer, PROMPT)
    speed = benchmark(
        converted, dense, tokens_BL, new=16, rounds=ROUNDS,
        progress=lambda done, count, _: steps.report("speed", done / count, "speed in transformers"),
    )  # fmt: skip
    typed = []
    for i, (prompt, new) in enumerate(PROMPTS.items()):
        steps.report("typed", i / len(PROMPTS), "both type")
        texts = [_continue(m, tokenizer, prompt, new) for m in (dense, converted)]
        typed.append(Typed(prompt=prompt, dense=texts[0], converted=texts[1]))
    del dense, converted  # llama.cpp needs the room
    found, missing = None, INSTALL
    if python:
        try:
            found, missing = llama_cpp_speed(
                model, output, tokens_BL[0].tolist(), python,
                progress=lambda done, count, what: steps.report("llama.cpp", done / count, what),
            ), None  # fmt: skip
        except (InputError, WorkError) as error:
            missing = f"Not measured in llama.cpp: {error}"
    result = DemoResult(
        model=model, name=known_as(model), active=active, conversion=conversion, speed=speed, typed=typed,
        llama_cpp=found, llama_cpp_missing=missing,
    )  # fmt: skip
    write_json(output / METRICS_FILE, result.to_dict())
    write_speed(result, output)
    write_demo_page(result, output / PAGE)
    steps.report("llama.cpp", 1, "done")
    return result


def shown(model: str, active: float | None) -> Shape:
    """Choose what to show of a model: what was asked for, or what was measured."""
    measured = SHAPES.get(model, Shape(ACTIVE))
    return measured if active in (None, measured.active) else Shape(active or ACTIVE)


def shown_config(model: str, active: float | None) -> ConvertConfig:
    """Make the configuration of the conversion that is shown."""
    shape, partition = shown(model, active), PARTITIONS.get(model, "auto")
    return ConvertConfig(
        active=None if shape.plan else shape.active, plan=shape.plan, partition=partition, tokens=TOKENS
    )


class Steps:
    """One bar over all parts of the demo."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress or unheard
        self.trials: list[str] = []
        self.tried = 0.0
        """Of the conversion, the share that its trials took."""

    def report(self, part: str, share: float, what: str) -> None:
        """Say that a share of a part is done."""
        names = list(SHARES)
        before = sum(SHARES[name] for name in names[: names.index(part)])
        self.progress(round(100 * (before + share * SHARES[part])), 100, what)

    def converting(self, done: int, count: int, what: str) -> None:
        """Follow `convert`: trials, of which nobody knows how many come, then the layers."""
        if what.startswith("trying"):
            if what not in self.trials:
                self.trials.append(what)
            self.tried = 0.4 * (1 - 0.6 ** (len(self.trials) - 1 + done / count))
            self.report("convert", self.tried, what)
        else:
            self.report("convert", self.tried + (1 - self.tried) * done / count, f"layer {done} of {count}")


def _continue(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new: int) -> str:
    """Continue a prompt, to the end of the function or of the last whole sentence."""
    text = complete(model, tokenizer, prompt, max_new_tokens=new)
    if prompt.endswith("\n"):
        lines = text.splitlines()
        end = next((i for i, line in enumerate(lines) if line.strip() and not line[:1].isspace()), len(lines))
        return "\n".join(lines[:end]).rstrip()
    return text[: text.rfind(".") + 1] or text
