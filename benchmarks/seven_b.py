"""A 7B or 8B model in one go: converted, trained for an hour, and measured beside what was published.

    python benchmarks/seven_b.py Qwen/Qwen2.5-7B --calibration c4.jsonl --data book.jsonl github.jsonl ... \\
        --text wiki.test.raw --tasks pack_200.jsonl --out benchmarks/results/seven-b-qwen
    python benchmarks/seven_b.py tiny --calibration c4.jsonl --text wiki.test.raw --tasks pack_200.jsonl \\
        --tokens 4096 --minutes 0.5 --max-tokens 4096 --items 2 --out seven-b-tiny      # the same at a small shape

For each share of the FFN: the default conversion and, taught by the dense model, `--minutes` of light training on the
calibration text and `--data`. Measured: WikiText-2 (`gptq`, windows of 2,048) and zero-shot tasks. Neither the scored
text nor its training split is calibrated or trained on, which is not so of all published rows. On a GPU `--tokens
1048576` calibrates on sixteen times as many tokens. Resumable: a row that is in `<out>/rows` is not measured again, a
conversion or training that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

import moesaic
from moesaic import ConvertConfig, FinetuneConfig
from moesaic.calibration.text import read_documents, text_hash
from moesaic.files import write_json
from moesaic.machine import machine, versions

WINDOW = 2_048
PUBLISHED: tuple[dict[str, Any], ...] = (
    {"method": "FLAP", "model": "Llama-2-7B", "ffn_active": 0.75, "training": "none", "ratio": 7.06 / 5.472,
     "source": "re-run by github.com/Tkino117/cmoe-improve, 2026-09; context 2,048"},
    {"method": "FLAP", "model": "Llama-2-7B", "ffn_active": 0.5, "training": "none", "ratio": 11.76 / 5.472,
     "source": "the same"},
    {"method": "CMoE", "model": "Llama-2-7B", "ffn_active": 0.75, "training": "none", "ratio": 7.32 / 5.27,
     "source": "arXiv 2502.04416, tables 3 and 10"},
    {"method": "CMoE", "model": "Llama-2-7B", "ffn_active": 0.5, "training": "none", "ratio": 16.4 / 5.472,
     "source": "re-run by github.com/Tkino117/cmoe-improve, 2026-09"},
    {"method": "CMoE", "model": "Llama-2-7B", "ffn_active": 0.75, "training": "4 M tokens",
     "ratio": 5.78 / 5.27, "source": "arXiv 2502.04416, table 10; trained on WikiText-2's training split"},
    {"method": "CMoE", "model": "Llama-2-7B", "ffn_active": 0.5, "training": "4 M tokens",
     "ratio": 7.71 / 5.27, "source": "the same"},
    {"method": "CMoE", "model": "Llama-2-7B", "ffn_active": 0.25, "training": "4 M tokens",
     "ratio": 12.73 / 5.27, "source": "the same"},
    {"method": "DOT-MoE", "model": "Llama-2-7B", "ffn_active": 0.25, "training": "0.46 B tokens",
     "ratio": 7.99 / 5.12, "source": "arXiv 2606.01666; 24 GPU hours; dense perplexity at a context of 4,096 assumed"},
    {"method": "ExpertWeaver", "model": "Llama-3-8B", "ffn_active": 0.75, "training": "none", "accuracy": 0.604,
     "accuracy_dense": 0.728, "source": "arXiv 2602.15521; mean of MMLU, HellaSwag, ARC-e, ARC-c, PIQA"},
    {"method": "ExpertWeaver", "model": "Qwen2.5-7B", "ffn_active": 0.75, "training": "none", "accuracy": 0.670,
     "accuracy_dense": 0.752, "source": "the same"},
    {"method": "CMoE", "model": "Llama-3-8B", "ffn_active": 0.75, "training": "none", "accuracy": 0.572,
     "accuracy_dense": 0.728, "source": "arXiv 2602.15521, on its own tasks"},
)  # fmt: skip
"""What papers report; ratio: WikiText-2 perplexity over the dense model's own. Contexts and texts differ."""


def measure(model: str | Path, given: argparse.Namespace) -> dict[str, Any]:
    """Measure perplexity, and the tasks where they are given."""
    loaded = moesaic.load(model)
    result = moesaic.evaluate(
        *loaded, text=given.text, window=WINDOW, max_tokens=given.max_tokens, tasks=given.tasks, items=given.items
    )
    tasks = {name: score.to_dict() for name, score in result.tasks.items()}
    accuracy = tasks["mean"]["acc"] if tasks else None
    found = {"perplexity": result.perplexity, "protocol": result.protocol, "dtype": result.dtype}
    return found | {"accuracy": accuracy, "tasks": tasks}


def row(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Make a row unless it is there."""
    if not path.is_file():
        start = time.monotonic()
        made = make() | {"machine": machine(), "versions": versions()}
        write_json(path, made | {"seconds": round(time.monotonic() - start)})
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def said(label: str) -> Callable[..., None]:
    """Print how far a part of the work is."""
    return lambda done, count, note="": print(f"{time.strftime('%H:%M')} {label}: {done}/{count} {note}", flush=True)


def at(active: float, given: argparse.Namespace, data: list[str]) -> list[dict[str, Any]]:
    """Convert at one share of the FFN, train, and measure both."""
    percent = f"{active:.0%}".rstrip("%")
    made, tuned = given.work / f"active-{percent}", given.work / f"active-{percent}-trained"
    config = ConvertConfig(active=active, calibration=(str(given.calibration),), tokens=given.tokens, seed=given.seed)
    training = FinetuneConfig(
        teacher=given.model, data=tuple(data), minutes=given.minutes, window=given.window, seed=given.seed
    )

    def converted() -> dict[str, Any]:
        if not (made / "metrics.json").is_file():
            moesaic.convert(given.model, made, config, force=True, progress=said(made.name))
        done = moesaic.inspect(made).metrics
        shape = {"plan": done.plan, "partition": done.partition, "ffn_active": done.ffn_active}
        return shape | {"training": None, "convert_seconds": done.seconds} | measure(made, given)

    def trained() -> dict[str, Any]:
        if not (tuned / "metrics.json").is_file():
            moesaic.finetune(made, tuned, training, progress=said(tuned.name))
        done = moesaic.inspect(tuned).metrics.finetune
        assert done is not None
        facts = {"minutes": given.minutes, "tokens": done.tokens, "steps": done.steps, "improved": done.improved}
        return first | {"training": facts} | measure(tuned, given)

    rows = given.out / "rows"
    first = row(rows / f"{percent}.json", converted)
    if not made.is_dir() and not (rows / f"{percent}-trained.json").is_file():
        raise SystemExit(f"{made}, which is to be trained, is gone; delete {rows / f'{percent}.json'} to make it again")
    kept = (rows / f"{percent}-trained.json").is_file()
    second = row(rows / f"{percent}-trained.json", trained)
    if not (given.keep or kept):  # of an earlier run they are its own
        for folder in (made, tuned):
            shutil.rmtree(folder, ignore_errors=True)
    return [first, second]


def table(dense: dict[str, Any], ours: list[dict[str, Any]]) -> Table:
    """Set ours beside what was published, by the share of the FFN that runs."""
    columns = ("FFN active", Column("method", no_wrap=True), "training", "model", "perplexity", "accuracy")
    shown = Table(*columns, title="over the dense model's")
    lines: list[dict[str, Any]] = []
    for r in ours:
        accuracies = {"accuracy": r["accuracy"], "accuracy_dense": dense["accuracy"]} if dense["accuracy"] else {}
        training = f"{r['training']['tokens']:,} tokens" if r["training"] else "none"
        ratio = r["perplexity"] / dense["perplexity"]
        own = {"method": f"moesaic, {r['plan']}", "model": "this one", "ffn_active": r["ffn_active"]}
        lines.append(own | {"training": training, "ratio": ratio} | accuracies)
    for r in sorted([*lines, *PUBLISHED], key=lambda r: -round(r["ffn_active"], 2)):
        accuracy = f"{r['accuracy'] / r['accuracy_dense']:.2f}" if "accuracy" in r else ""
        perplexity = f"{r['ratio']:.2f}" if r.get("ratio") else ""
        shown.add_row(f"{r['ffn_active']:.0%}", r["method"], r["training"], r["model"], perplexity, accuracy)
    return shown


def main(given: argparse.Namespace) -> None:
    """Make every row that is not there."""
    for folder in (given.out / "rows", given.work):
        folder.mkdir(parents=True, exist_ok=True)
    data = [str(given.calibration), *map(str, given.data)]
    setting = {
        "model": given.model, "tokens": given.tokens, "minutes": given.minutes, "window": given.window,
        "max_tokens": given.max_tokens, "items": given.items, "text": given.text.name, "seed": given.seed,
        "calibration": given.calibration.name, "tasks": given.tasks and given.tasks.name,
        "data": [path.name for path in given.data],
        "data_sha256": text_hash(read_documents(data)),
    }  # fmt: skip
    kept = given.out / "rows" / "setting.json"
    if kept.is_file() and json.loads(kept.read_text()) != setting:
        raise SystemExit(f"{kept} says that rows were measured otherwise; give another --out, or its settings")
    write_json(kept, setting)
    dense = row(given.out / "rows" / "dense.json", lambda: measure(given.model, given))
    ours = [found for active in given.active for found in at(active, given, data)]
    write_json(given.out / "seven_b.json", {"setting": setting, "dense": dense, "rows": ours, "published": PUBLISHED})
    Console().print(table(dense, ours))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id or folder, e.g. Qwen/Qwen2.5-7B, meta-llama/Meta-Llama-3-8B")
    parser.add_argument("--calibration", type=Path, required=True, help="web text, .jsonl")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="more text to train on")
    parser.add_argument("--text", type=Path, required=True, help="WikiText-2's raw test split")
    parser.add_argument("--tasks", type=Path, help="zero-shot items")
    parser.add_argument("--items", type=int, help="of each task, the first [default: all]")
    parser.add_argument("--active", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--tokens", type=int, default=65_536, help="of calibration")
    parser.add_argument("--minutes", type=float, default=60, help="of light training")
    parser.add_argument("--window", type=int, default=512, help="tokens of a training sequence")
    parser.add_argument("--max-tokens", type=int, help="of the scored text [default: all]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="keep the converted models in --work")
    parser.add_argument("--work", type=Path, default=Path("seven-b-work"), help="for models on the way")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/seven-b"))
    main(parser.parse_args())
