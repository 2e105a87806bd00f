"""What the demo shows a stranger: dense and Mixture-of-Experts side by side, good and bad said plainly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.columns import Columns
from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .rows import number, numbers, part, parts, text_or_none

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


@dataclass(frozen=True)
class Typed:
    """What both models wrote after the same beginning."""

    prompt: str
    dense: str
    moe: str


@dataclass(frozen=True)
class Layer:
    """How one layer came out."""

    split_error: float
    error: float
    residual_error: float
    load: tuple[float, ...]
    """Tokens of each routed expert over an even share; empty without routing."""


@dataclass(frozen=True)
class Facts:
    """Everything that the demo's screen and page show."""

    model: str
    name: str
    """What the model is, for readers."""
    output: str
    plan: str
    ffn_active: float
    dense_parameters: int
    total_parameters: int
    active_parameters: int
    perplexity_dense: float
    perplexity: float
    conversion_seconds: float
    speeds: tuple[Speed, ...]
    typed: tuple[Typed, ...]
    layers: tuple[Layer, ...]
    llama_cpp_missing: str | None
    """Why llama.cpp was not measured, and what to do; None where it was."""
    machine: str
    threads: int
    protocol: str
    versions: Mapping[str, object]

    @classmethod
    def from_row(cls, row: Mapping[str, object]) -> Facts:
        """What the demo's `metrics.json` holds."""
        engines = [(part(row, "llama_cpp"), "llama.cpp")] if row.get("llama_cpp") else []
        speeds = []
        for source, engine in [(row, "transformers"), *engines]:
            for kind in ("decode", "prefill"):
                found = part(source, kind)
                found = found if "speedup" in found else part(found, next(iter(found)))
                rates = (number(found, name) for name in ("dense_tokens_per_s", "tokens_per_s", "speedup"))
                speeds.append(Speed(engine, kind, *rates))
        typed = [Typed(*(str(t[name]) for name in ("prompt", "dense", "converted"))) for t in parts(row, "typed")]
        whole = {f"{k}_parameters": int(number(row, f"{k}_parameters")) for k in ("dense", "total", "active")}
        return cls(
            model=str(row["model"]), name=str(row["name"]), output=str(row["output"]), plan=str(row["plan"]),
            ffn_active=number(row, "ffn_active"), **whole, perplexity_dense=number(row, "perplexity_dense"),
            perplexity=number(row, "perplexity"), conversion_seconds=number(row, "seconds"), speeds=tuple(speeds),
            typed=tuple(typed), layers=tuple(map(_layer, parts(row, "layers"))),
            llama_cpp_missing=text_or_none(row, "llama_cpp_missing"), machine=str(row["machine"]),
            threads=int(number(row, "threads")), protocol=str(row["protocol"]), versions=part(row, "versions"),
        )  # fmt: skip

    @property
    def ratio(self) -> float:
        """Perplexity over the dense model's."""
        return self.perplexity / self.perplexity_dense


def _layer(row: Mapping[str, object]) -> Layer:
    load = numbers(row, "expert_tokens")
    split, after, residual = (number(row, name) for name in ("split_error", "error", "residual_error"))
    return Layer(split, after, residual, tuple(tokens * len(load) / sum(load) for tokens in load))


def verdicts(facts: Facts) -> list[tuple[bool, str]]:
    """Say in sentences what the numbers mean: (good or not, sentence)."""
    less = 1 - facts.active_parameters / facts.dense_parameters
    found = [(less > 0, f"Each token runs {less:.0%} fewer parameters; all of them stay in memory.")]
    for speed in facts.speeds:
        action = "Writing text" if speed.kind == "decode" else "Reading a prompt"
        where = f"{action} in {speed.engine}"
        if speed.word == "same":
            found.append((False, f"{where} is as fast as before ({speed.ratio:.2f}x)."))
        else:
            found.append((speed.ratio > 1, f"{where} is {speed.word}: {speed.ratio:.2f}x the dense model's speed."))
    if facts.ratio < 1.1:
        found.append((True, f"The text is nearly as good: perplexity {facts.ratio:.2f}x the dense model's."))
    else:
        much = "somewhat" if facts.ratio < 1.25 else "clearly"
        found.append((False, f"The text is {much} worse: perplexity {facts.ratio:.2f}x the dense model's."))
    return found


def next_commands(facts: Facts) -> list[tuple[str, str]]:
    """What to do now: (command, why)."""
    out = facts.output
    return [
        (f"moesaic finetune {out} {out}-tuned --minutes 15", "win quality back by a short training"),
        (f"moesaic convert {facts.model} three-quarters --active 0.75", "lose less: three quarters of each FFN run"),
        (f"moesaic generate {out} 'def quicksort(arr):'", "type with it"),
        (f"moesaic export {out} {out}.gguf --to gguf", "take it to llama.cpp"),
    ]


def show_demo(console: Console, facts: Facts) -> None:
    """Print the screen that the demo ends with, 80 columns wide."""
    width = min(WIDTH, console.width)
    console.print(Text(f"\n{facts.name}: dense, and as a Mixture-of-Experts", style="bold"), width=width)
    console.print(_numbers(facts), width=width)
    for number_, typed in enumerate(facts.typed):
        head = "Both go on from the same beginning:" if not number_ else "And from this one:"
        console.print(Text(f"\n{head}", style="bold"))
        console.print(Padding(Text(typed.prompt.rstrip("\n"), style="dim"), (0, 2)), width=width)
        panels = [
            Panel(Text(text.strip("\n") or "(nothing)"), title=title, title_align="left", width=width // 2)
            for title, text in (("dense", typed.dense), ("Mixture-of-Experts", typed.moe))
        ]
        console.print(Columns(panels, padding=0), width=width)
    console.print(Text("\nWhat this means", style="bold"))
    for good, sentence in verdicts(facts):
        console.print(Text(f" {'+' if good else '-'} {sentence}", style="green" if good else "yellow"), width=width)
    if facts.llama_cpp_missing:
        console.print(Text(f"   {facts.llama_cpp_missing}"), width=width)
    console.print(Text("\nNext", style="bold"))
    for command, why in next_commands(facts):
        console.print(Text(f"   # {why}", style="dim"), width=width)
        console.print(Text(f"   {command}"), width=width)
    console.print(Text(f"\nThe whole report: {facts.output}/report.html", style="bold"), width=width)


def _numbers(facts: Facts) -> Table:
    grid = Table(header_style="bold")
    for i, column in enumerate(("", "dense", "MoE", "MoE / dense", "")):
        grid.add_column(column, justify="left" if i in (0, 4) else "right", no_wrap=True)
    for label, dense, moe, ratio, word in number_rows(facts):
        style = {"better": "green", "faster": "green", "less": "green", "worse": "yellow", "slower": "yellow"}
        grid.add_row(label, dense, moe, ratio, Text(word, style=style.get(word, "")))
    return grid


def number_rows(facts: Facts) -> Sequence[tuple[str, str, str, str, str]]:
    """(what, dense, MoE, their ratio, a word for it): the table of the screen and of the page."""
    dense, active = facts.dense_parameters, facts.active_parameters
    rows = [
        ("parameters in memory", _millions(dense), _millions(facts.total_parameters), facts.total_parameters / dense),
        ("parameters a token runs", _millions(dense), _millions(active), active / dense),
        ("perplexity on unseen text", f"{facts.perplexity_dense:.2f}", f"{facts.perplexity:.2f}", facts.ratio),
    ]
    words = ["same" if abs(rows[0][3] - 1) < 0.01 else "more", "less", "worse" if facts.ratio > 1.01 else "same"]
    for speed in facts.speeds:
        label = f"{'writes' if speed.kind == 'decode' else 'reads'} in {speed.engine}, tokens/s"
        rows.append((label, _speed(speed.dense), _speed(speed.moe), speed.ratio))
        words.append(speed.word)
    return [(label, a, b, f"{ratio:.2f}x", word) for (label, a, b, ratio), word in zip(rows, words, strict=True)]


def _millions(count: int) -> str:
    return f"{count / 1e6:,.0f} M" if count >= 10_000_000 else f"{count / 1e6:.2f} M"


def _speed(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"
