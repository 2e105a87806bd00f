"""Light training on the same text for the same time: ours, CMoE's recipe, each from its own conversion, and dense.

    python benchmarks/recovery.py demo --web c4.jsonl --data book.jsonl ... instruct.jsonl --text wiki.test.raw \\
        --tasks pack_200.jsonl --plans S1A1E8 S2A2E8 --minutes 15 60 --out benchmarks/results/recovery-demo

Minutes are the processor's (one thread unless `--threads` says otherwise). A fifth of the web text, its last documents,
is neither calibrated nor trained on; perplexity is measured on it and on WikiText-2 (`gptq`, windows of 2,048).
Recipes: `cmoe` (CMoE's own, from its own conversion); ours by objective, `lm`, `distill`, `both`, all from one of ours,
also with other settings of `FinetuneConfig` (`both+method=full+learning_rate=3e-5`). Plan S8A0E8 is the control:
all neurons always run, so it is the dense model that is trained alike. `--steps` in place of `--minutes` compares
settings at equal tokens. `--siblings` measures smaller dense models of the family, and each row stands beside the line
through them, at equal active parameters. Resumable: a finished row is a file in `<out>/rows`, so that processes may
share the work by recipe; a training that was stopped goes on. Rows at 0 minutes, the conversions, are always there.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

import moesaic
from moesaic import ConvertConfig, FinetuneConfig
from moesaic.calibration.documents import Document
from moesaic.calibration.text import read_documents, text_hash
from moesaic.comparison.line import Dot, line_at
from moesaic.evaluation.cost import active_weights
from moesaic.evaluation.perplexity import perplexity
from moesaic.evaluation.tasks import evaluate_tasks, read_tasks
from moesaic.machine import machine, versions

CMOE = Path(__file__).parent.parent / "recipes" / "cmoe.yaml"
WINDOW, SAMPLES = 512, 2_000
CONTROL = "S8A0E8"
SIBLING = "sibling-"
TITLES = {"wikitext2": "WikiText-2, test split", "web": "web text kept apart (C4)"}


def converter(recipe: str) -> str:
    """Whose conversion a recipe starts from."""
    return "cmoe" if recipe == "cmoe" else "ours"


def conversion(maker: str, plan: str, calibration: Path, tokens: int) -> ConvertConfig:
    """How a model is made: ours specialists where they can (one active), CMoE's as published."""
    if plan == CONTROL:
        return ConvertConfig(plan=plan, recovery="none", calibration=(str(calibration),), tokens=2_048, device="cpu")
    method = {"cmoe": "cmoe", "ours": "specialists" if "A1E" in plan else "coactivation"}[maker]
    recovery = "none" if maker == "cmoe" else "closed-form"
    return ConvertConfig(
        plan=plan, partition=method, recovery=recovery, calibration=(str(calibration),), tokens=tokens, device="cpu"
    )


class Budget(NamedTuple):
    """How long one training goes on, by one of both."""

    minutes: float | None = None
    steps: int | None = None

    def __str__(self) -> str:
        return f"{self.minutes:g}" if self.steps is None else f"{self.steps}-steps"


def training(recipe: str, data: Sequence[str], budget: Budget) -> FinetuneConfig:
    """How it is trained: ours as `moesaic finetune` does, CMoE's by its recipe in sequences of 512."""
    common = {"data": tuple(data), "device": "cpu"} | budget._asdict()
    if recipe == "cmoe":
        return FinetuneConfig.read(CMOE, common | {"window": WINDOW, "samples": SAMPLES})
    objective, *options = recipe.split("+")
    settings = {name: yaml.safe_load(value) for name, _, value in (option.partition("=") for option in options)}
    return FinetuneConfig(**common | {"objective": objective} | settings)


def split_web(source: Path, out: Path) -> tuple[Path, Path]:
    """(text to train on, text held out): the first four fifths of the documents and the rest."""
    documents = [document.text for document in read_documents([str(source)])]
    first = len(documents) * 4 // 5
    train, held = out / "web-train.jsonl", out / "web-heldout.txt"
    write(train, "".join(json.dumps({"text": text}) + "\n" for text in documents[:first]))
    write(held, "\n\n".join(documents[first:]))
    return train, held


def check_apart(data: Sequence[str], held: Path) -> list[Document]:
    """The documents to train on, none of which is in the held-out text."""
    documents, text = read_documents(data), held.read_text()
    for document in documents:
        if document.text[:500].strip() in text:
            raise SystemExit(f"a document of {document.domain} is in the held-out web text; leave that file out")
    return documents


def measure(folder: str | Path, texts: dict[str, Path], a: argparse.Namespace) -> dict[str, Any]:
    """Parameters that a token runs, perplexity on each text, and the mean of the tasks."""
    model, tokenizer = moesaic.load(folder)
    found: dict[str, Any] = {"active_parameters": round(active_weights(model))}
    for name, path in texts.items():
        found[name] = perplexity(model, tokenizer, text=path, max_tokens=a.max_tokens)._asdict()
    if a.tasks:
        scores = evaluate_tasks(model, tokenizer, read_tasks(a.tasks, a.items))
        found["tasks"] = {name: score.to_dict() for name, score in scores.items()}
    return found


def row(path: Path, make: Callable[[], dict[str, Any]]) -> None:
    """Make a row unless it is there."""
    if not path.is_file():
        print(f"{time.strftime('%H:%M')} {path.stem}", flush=True)
        write(path, json.dumps(make(), indent=2) + "\n")


def write(path: Path, text: str) -> None:
    """Write a file that is whole or absent: another process may be reading it."""
    writing = path.with_name(f".{path.name}.{os.getpid()}")
    writing.write_text(text)
    writing.replace(path)


def merge(out: Path, setting: dict[str, Any]) -> None:
    """Write all rows so far, with ratios to dense, and draw them."""
    rows = {path.stem: json.loads(path.read_text()) for path in sorted((out / "rows").glob("*.json"))}
    dense = rows["dense"]
    siblings = [found for name, found in rows.items() if name.startswith(SIBLING)]
    for found in rows.values():
        found["ratio"] = {name: found[name]["perplexity"] / dense[name]["perplexity"] for name in TITLES}
        if siblings and "plan" in found:
            found["over_line"] = {name: over_line(found, dense, siblings, name) for name in TITLES}
    (out / "recovery.json").write_text(json.dumps({"setting": setting, "rows": rows}, indent=2) + "\n")
    timed = [r for r in rows.values() if r.get("minutes")]
    if not timed:
        return
    lines = sorted({(r["plan"], r["recipe"]) for r in timed})
    colours = {recipe: f"C{i}" for i, recipe in enumerate(sorted({recipe for _, recipe in lines}))}
    styles = dict(zip(sorted({plan for plan, _ in lines}), ("o-", "s--", "^:"), strict=False))
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), TITLES, strict=True):
        for plan, recipe in lines:
            ends = [(0, rows[f"{plan}-{converter(recipe)}-0"])]
            ends += [(r["minutes"], r) for r in timed if (r["plan"], r["recipe"]) == (plan, recipe)]
            line = sorted((minutes, r["ratio"][name]) for minutes, r in ends)
            label = "CMoE's recipe" if recipe == "cmoe" else f"ours, {recipe}"
            axes.plot(*zip(*line, strict=True), styles[plan], color=colours[recipe], label=f"{plan}, {label}")
        axes.axhline(1, color="#1b1b1f", linewidth=0.8, linestyle=":")
        axes.set(xlabel="minutes of one core", ylabel="perplexity over dense", yscale="log", title=TITLES[name])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
    figure.savefig(out / "recovery.png", dpi=130)


def over_line(found: dict[str, Any], dense: dict[str, Any], siblings: list[dict[str, Any]], text: str) -> float:
    """Perplexity over that of the line through the dense model and its siblings, at equal active parameters."""
    cheaper = lambda row: dense["active_parameters"] / row["active_parameters"]  # noqa: E731
    dots = [Dot(cheaper(one), one[text]["perplexity"]) for one in siblings]
    line = line_at(dots, dense[text]["perplexity"], cheaper(found))
    if line is None:
        raise SystemExit("no sibling is smaller than the model; leave --siblings out")
    return found[text]["perplexity"] / line.perplexity


def trained(
    a: argparse.Namespace, recipe: str, plan: str, budget: Budget, start: Path, data: list[str]
) -> dict[str, Any]:
    """Train a converted model and measure what comes of it."""
    made = a.work / f"{plan}-{recipe}-{budget}"
    config = training(recipe, data, budget)
    if not (made / "metrics.json").is_file():
        moesaic.finetune(
            start, made, config, clock=time.process_time,
            # minutes are the teacher's too
            teacher_cache=a.work / "teacher" if budget.steps and config.objective != "lm" else None,
            progress=lambda done, count, note: print(f"{time.strftime('%H:%M')} {done} % {note}", flush=True),
        )  # fmt: skip
    facts = json.loads((made / "metrics.json").read_text())["finetune"] | {"output": made.name}
    return {"recipe": recipe, "plan": plan} | budget._asdict() | {"finetune": facts} | measure(made, a.texts, a)


def main(a: argparse.Namespace) -> None:
    """Every row that is asked for and not there."""
    torch.set_num_threads(a.threads)
    budgets = [Budget(steps=steps) for steps in a.steps] or [Budget(minutes) for minutes in a.minutes]
    for recipe in a.recipes:
        training(recipe, [], budgets[0])  # wrong names are seen before any work
    for folder in (a.out / "rows", a.work):
        folder.mkdir(parents=True, exist_ok=True)
    web, held = split_web(a.web, a.work)
    data = [str(web), *map(str, a.data)]
    documents = check_apart(data, held)
    a.texts = {"wikitext2": a.text, "web": held}
    rows = a.out / "rows"
    for name, model in {"dense": a.model, **{f"{SIBLING}{Path(one).name}": one for one in a.siblings}}.items():
        row(rows / f"{name}.json", lambda m=model: measure(m, a.texts, a))
    for plan in a.plans:
        for recipe in a.recipes:
            maker = converter(recipe)
            start = a.work / f"{plan}-{maker}"
            if not start.is_dir():
                moesaic.convert(a.model, start, conversion(maker, plan, web, a.tokens), force=True)
            name = {"conversion": maker, "plan": plan, "minutes": 0}
            row(rows / f"{plan}-{maker}-0.json", lambda s=start, n=name: n | measure(s, a.texts, a))
            for budget in budgets:
                row(
                    rows / f"{plan}-{recipe}-{budget}.json",
                    lambda r=recipe, p=plan, b=budget, s=start: trained(a, r, p, b, s, data),
                )
    files = {"web": a.web.name, "data": [path.name for path in a.data], "text": a.text.name}
    setting = {"model": a.model, "files": files, "data_sha256": text_hash(documents), "threads": a.threads}
    setting |= {"max_tokens": a.max_tokens, "items_per_task": a.items, "calibration_tokens": a.tokens}
    merge(a.out, setting | {"machine": machine(), "versions": versions()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--web", type=Path, required=True, help="web text, .jsonl")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="more text to train on")
    parser.add_argument("--text", type=Path, required=True, help="WikiText-2's raw test split")
    parser.add_argument("--siblings", nargs="*", default=[], help="smaller dense models of the family")
    parser.add_argument("--tasks", type=Path, help="zero-shot items")
    parser.add_argument("--items", type=int, default=200, help="of each task")
    parser.add_argument("--plans", nargs="+", default=["S1A1E8", "S2A2E8"])
    parser.add_argument("--recipes", nargs="+", default=["both", "cmoe"], help="see above")
    parser.add_argument("--minutes", type=float, nargs="+", default=[15, 60])
    parser.add_argument("--steps", type=int, nargs="+", default=[], help="of each training, in place of minutes")
    parser.add_argument("--tokens", type=int, default=32_768, help="of calibration")
    parser.add_argument("--max-tokens", type=int, default=40_960, help="of each perplexity")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("recovery-work"), help="for models on the way")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recovery"))
    main(parser.parse_args())
