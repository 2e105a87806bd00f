"""What the demo shows a stranger: dense and Mixture-of-Experts side by side, good and bad said plainly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from rich.columns import Columns
from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..results import DemoResult
from .console import command, here, offer

WIDTH = 80
SAME = 0.03
"""A speed within this share of the dense model's counts as the same."""


@dataclass(frozen=True)
class Speed:
    """Tokens a second of both models in one engine."""

    engine: str
    kind: str
    """`decode` or `prefill`."""
    dense: float
    moe: float
    ratio: float

    @property
    def word(self) -> str:
        """Faster, slower or the same as dense."""
        return "same" if abs(self.ratio - 1) <= SAME else "faster" if self.ratio > 1 else "slower"


def speeds(result: DemoResult) -> list[Speed]:
    """Both kinds in each engine that was measured."""
    measured = [
        ("transformers", "decode", next(iter(result.speed.decode.values()))),
        ("transformers", "prefill", next(iter(result.speed.prefill.values()))),
    ]
    if found := result.llama_cpp:
        measured += [("llama.cpp", "decode", found.decode), ("llama.cpp", "prefill", found.prefill)]
    return [Speed(engine, kind, v.dense_tokens_per_s, v.tokens_per_s, v.speedup) for engine, kind, v in measured]


def verdicts(result: DemoResult) -> list[tuple[bool, str]]:
    """Say in sentences what the numbers mean: (good or not, sentence)."""
    less = 1 - result.conversion.active_parameters / result.conversion.dense_parameters
    found = [(less > 0, f"Each token runs {less:.0%} fewer parameters; all of them stay in memory.")]
    for speed in speeds(result):
        action = "Writing text" if speed.kind == "decode" else "Reading a prompt"
        where = f"{action} in {speed.engine}"
        if speed.word == "same":
            found.append((False, f"{where} is as fast as before ({speed.ratio:.2f}x)."))
        else:
            found.append((speed.ratio > 1, f"{where} is {speed.word}: {speed.ratio:.2f}x the dense model's speed."))
    if result.ratio < 1.1:
        found.append((True, f"The text is nearly as good: perplexity {result.ratio:.2f}x the dense model's."))
    else:
        much = "somewhat" if result.ratio < 1.25 else "clearly"
        found.append(
            (False, f"The text is {much} worse, as you see: perplexity {result.ratio:.2f}x the dense model's.")
        )
    return found


class Trained(NamedTuple):
    """WikiText-2 perplexity over the dense model's, before and after a quarter of an hour of training."""

    before: float
    after: float


TRAINED = {"demo": Trained(1.51, 1.24)}
"""Of models cut to half, as measured: `benchmarks/results/recovery-demo`."""


def next_commands(result: DemoResult) -> list[tuple[str, str]]:
    """List what to do now: (command, why)."""
    out, good = here(result.conversion.output), command("moesaic", "convert", result.model, "good", "--effort", "good")
    win = ""
    if found := TRAINED.get(result.model):
        win = f"; at half those minutes took {found.before} times dense to {found.after} (WikiText-2)"
    return [
        (command("moesaic", "finetune", out, f"{out}-tuned", "--minutes", 15), "win quality back by a short training"),
        (good, f"or at once: more calibration text, then 15 minutes of training{win}"),
        *[(command("moesaic", "convert", result.model, "three-quarters", "--active", 0.75),
           "lose less: three quarters of each FFN run")] * (result.active < 0.75),
        (command("moesaic", "generate", out, "def quicksort(arr):"), "type with it"),
        (command("moesaic", "export", out, f"{out}.gguf", "--format", "gguf"), "take it to llama.cpp"),
    ]  # fmt: skip


def show_demo(console: Console, result: DemoResult) -> None:
    """Print the screen that the demo ends with, 80 columns wide."""
    width = min(WIDTH, console.width)
    console.print(Text(f"\n{result.name}: dense, and as a Mixture-of-Experts", style="bold"), width=width)
    console.print(_numbers(result), width=width)
    for head, typed in zip(("Both go on from the same beginning:", "And from this one:"), result.typed, strict=True):
        console.print(Text(f"\n{head}", style="bold"))
        console.print(Padding(Text(typed.prompt.rstrip("\n"), style="dim"), (0, 2)), width=width)
        panels = [
            Panel(Text(text.strip("\n") or "(nothing)"), title=title, title_align="left", width=width // 2)
            for title, text in (("dense", typed.dense), ("Mixture-of-Experts", typed.converted))
        ]
        console.print(Columns(panels, padding=0), width=width)
    console.print(Text("\nWhat this means", style="bold"))
    for good, sentence in verdicts(result):
        console.print(Text(f" {'+' if good else '-'} {sentence}", style="green" if good else "yellow"), width=width)
    if result.llama_cpp_missing:
        console.print(Text(f"   {result.llama_cpp_missing}"), width=width)
    console.print(Text("\nNext", style="bold"))
    for words, why in next_commands(result):
        console.print(Text(f"   # {why}", style="dim"), width=width)
        offer(console, words, "   ", width)
    console.print(Text(f"\nThe whole report: {result.conversion.output}/report.html", style="bold"), width=width)


def _numbers(result: DemoResult) -> Table:
    grid = Table(header_style="bold")
    for i, column in enumerate(("", "dense", "MoE", "MoE / dense", "")):
        grid.add_column(column, justify="left" if i in (0, 4) else "right", no_wrap=True)
    for label, dense, moe, ratio, word in number_rows(result):
        style = {"better": "green", "faster": "green", "less": "green", "worse": "yellow", "slower": "yellow"}
        grid.add_row(label, dense, moe, ratio, Text(word, style=style.get(word, "")))
    return grid


class Number(NamedTuple):
    """A row of the table, as text."""

    label: str
    dense: str
    moe: str
    ratio: str
    """MoE over dense."""
    word: str
    """What the ratio means: less, worse, faster, ..."""


def number_rows(result: DemoResult) -> list[Number]:
    """List what the table of the screen and of the page says."""
    made = result.conversion
    dense, total, active = made.dense_parameters, made.total_parameters, made.active_parameters
    rows = [
        ("parameters in memory", _millions(dense), _millions(total), total / dense),
        ("parameters a token runs", _millions(dense), _millions(active), active / dense),
        ("perplexity on unseen text", f"{made.perplexity_dense:.2f}", f"{made.perplexity:.2f}", result.ratio),
    ]
    words = ["same" if abs(rows[0][3] - 1) < 0.01 else "more", "less", "worse" if result.ratio > 1.01 else "same"]
    for speed in speeds(result):
        label = f"{'writes' if speed.kind == 'decode' else 'reads'} in {speed.engine}, tokens/s"
        rows.append((label, _speed(speed.dense), _speed(speed.moe), speed.ratio))
        words.append(speed.word)
    return [Number(label, a, b, f"{ratio:.2f}x", word) for (label, a, b, ratio), word in zip(rows, words, strict=True)]


def _millions(count: int) -> str:
    return f"{count / 1e6:,.0f} M" if count >= 10_000_000 else f"{count / 1e6:.2f} M"


def _speed(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"
