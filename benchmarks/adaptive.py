"""How many experts run: learnt and calibrated rules at equal budgets, on any Mixture-of-Experts.

    python benchmarks/adaptive.py --model tiny-moe --web c4.jsonl --text wiki.test.raw --tasks pack_200.jsonl \\
        --out benchmarks/results/adaptive-tiny-moe [--methods ...] [--shares .5 .67 .75] [--seeds 0 1 2] [--minutes 3]

A model is a hub id (allenai/OLMoE-1B-7B-0924, Qwen/Qwen1.5-MoE-A2.7B, ibm-granite/granite-3.1-1b-a400m-base), a
folder, converted or not, or built in; it runs on a GPU where there is one. Rules are calibrated, and policies trained,
on four fifths of the web text; perplexity is measured on the rest and on WikiText-2 (`gptq`). `fixed` runs the whole
numbers of experts around each budget; between two of them its perplexity is interpolated (log-linearly) at the mean
that a rule really ran. Resumable: a finished row is a file in `<out>/rows`. Minutes are the processor's. `--speed`
times decoding under each finished adapter of the first seed against the model's own number, on a quiet machine;
`--oracle` sets each beside the best number of experts for every token, found by trying all (small models).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import moesaic
from moesaic import AdaptConfig, StoreOptions
from moesaic.calibration.text import read_documents, text_hash
from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.sources import resolve
from moesaic.evaluation.benchmark import decode_speed
from moesaic.evaluation.inspect import prompt_tokens
from moesaic.files import write_json
from moesaic.formats.converted import without_weights
from moesaic.machine import machine, versions
from moesaic.moe.adaptive import moe_blocks_of
from moesaic.moe.counting import mean_experts
from moesaic.results import AdaptResult

LEARNED = {
    "ada-k": ("ada-k", "ppo"), "ada-k-distill": ("ada-k", "distill"),
    "learned-threshold": ("learned-threshold", "distill"),
}  # fmt: skip
RULES = ("threshold", "top-p", "relative", "skip", "entropy", "layer-k")
SHARES, SEEDS, WINDOW = (0.5, 0.67, 0.75), (0, 1, 2), 1_024


def split_web(source: Path, out: Path) -> tuple[Path, Path]:
    """(text to calibrate and train on, text held out): the first four fifths of the documents and the rest."""
    texts = [document.text for document in read_documents([str(source)])]
    first = len(texts) * 4 // 5
    train, held = out / "web-train.jsonl", out / "web-heldout.txt"
    train.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:first]))
    held.write_text("\n\n".join(texts[first:]))
    return train, held


def store(arguments: argparse.Namespace) -> StoreOptions | None:
    """Where experts are kept, if not all of them are loaded."""
    return StoreOptions(arguments.expert_memory) if arguments.expert_memory else None


def scores(arguments: argparse.Namespace, held: Path, **rule: Any) -> dict[str, Any]:
    """Perplexities, accuracies and experts a token of the model under a rule."""
    model, tokenizer = moesaic.load(arguments.model, store=store(arguments), **rule)
    found: dict[str, Any] = {}
    for name, text in (("web", held), ("wikitext2", arguments.text)):
        kept: list[moesaic.evaluate] = []

        def run(text: Path = text, kept: list = kept) -> None:
            kept.append(moesaic.evaluate(model, tokenizer, text=text, window=WINDOW, max_tokens=arguments.max_tokens))

        experts = mean_experts(model, run).by_layer
        found[name] = {
            "perplexity": kept[0].perplexity, "experts": statistics.fmean(experts), "tokens": kept[0].tokens,
            "data_sha256": kept[0].data_sha256,
        }  # fmt: skip
        found["experts_by_layer"] = experts
    if arguments.tasks:
        result = moesaic.evaluate(model, tokenizer, max_tokens=2_048, tasks=arguments.tasks, items=arguments.items)
        found["tasks"] = {name: score.to_dict() for name, score in result.tasks.items()}
    return found


def row_of(
    arguments: argparse.Namespace, method: str, share: float, seed: int, train: Path, held: Path
) -> dict[str, Any]:
    """Calibrate or train one rule to one budget and measure it."""
    started = time.time()
    adapter, result = adapted(arguments, method, share, seed, train)
    found = scores(arguments, held, adapter=adapter)
    return {
        "method": method,
        "share": share,
        "seed": seed,
        "adapt": result.to_dict(),
        "seconds": time.time() - started,
    } | found


def adapted(
    arguments: argparse.Namespace, method: str, share: float, seed: int, train: Path
) -> tuple[Path, AdaptResult]:
    """Calibrate or train one rule to one budget."""
    name, learner = LEARNED.get(method, (method, None))
    adapter = arguments.out / "adapters" / f"{method}-{share:g}-{seed}"
    minutes = arguments.minutes if method in LEARNED else None
    config = AdaptConfig(
        method=name, learner=learner, target_active=share, data=(str(train),), seed=seed, minutes=minutes,
        tokens=arguments.tokens, samples=arguments.samples, window=arguments.window, batch=arguments.batch,
    )  # fmt: skip
    result = moesaic.adapt(
        arguments.model, adapter, config, store=store(arguments), overwrite=True, clock=time.process_time
    )
    return adapter, result


def oracles(arguments: argparse.Namespace, train: Path, held: Path) -> None:
    """Set each rule of the first seed beside the best number of experts for every token."""
    path, seed = arguments.out / "oracle.json", arguments.seeds[0]
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []
    for share, method in itertools.product(arguments.shares, arguments.methods):
        asked = {
            "method": method, "share": share, "seed": seed, "tokens_asked": arguments.oracle_tokens,
            "minutes": arguments.minutes,
        }  # fmt: skip
        if any(asked.items() <= row.items() for row in rows):
            continue
        adapter = arguments.out / "adapters" / f"{method}-{share:g}-{seed}"
        if not adapter.is_dir():
            adapted(arguments, method, share, seed, train)
        model, tokenizer = moesaic.load(arguments.model, adapter=adapter, store=store(arguments))
        found = moesaic.inspect_oracle(model, tokenizer, text=held, tokens=arguments.oracle_tokens)
        rows.append(asked | {"machine": machine(), "versions": versions()} | found.to_dict())
        write_json(path, {"called": arguments.model, "rows": rows})
        closed = "none" if found.gap_closed is None else f"{found.gap_closed:.1%}"
        print(f"{method} {share:g}: {closed} of the gap to the oracle closed", flush=True)


def fixed_rows(arguments: argparse.Namespace, held: Path) -> None:
    """Measure the whole numbers of experts around each budget, and the model's own."""
    checkpoint = Checkpoint(resolve(arguments.model))
    default = max(block.num_experts_per_tok for block in moe_blocks_of(without_weights(checkpoint)))
    around = {f(share * default) for share in arguments.shares for f in (math.floor, math.ceil)}
    for count in sorted({max(1, count) for count in around} | {default}):
        path = arguments.out / "rows" / f"fixed-{count}.json"
        if not path.is_file():
            found = scores(arguments, held, **({} if count == default else {"select": f"top-k:k={count}"}))
            write_json(path, {"method": "fixed", "count": count, "default": default} | found)
            print(f"fixed {count}: web {found['web']['perplexity']:.3f}", flush=True)


def interpolated(fixed: list[dict[str, Any]], text: str, experts: float) -> float:
    """The perplexity of `fixed` at a mean number of experts, log-linear between whole ones."""
    points = sorted((row[text]["experts"], math.log(row[text]["perplexity"])) for row in fixed)
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= experts <= x1:
            return math.exp(y0 + (y1 - y0) * (experts - x0) / (x1 - x0))
    return math.exp(min(points, key=lambda p: abs(p[0] - experts))[1])


def machines(out: Path) -> str:
    """Name the machines of all rows; rows of before they were noted are of those that the summary had."""
    path = out / "adaptive.json"
    before = json.loads(path.read_text())["machine"].split("; ") if path.is_file() else []
    rows = [json.loads(row.read_text()) for row in sorted((out / "rows").glob("*.json"))]
    return "; ".join(dict.fromkeys(before + [row["machine"] for row in rows if "machine" in row]))


def summary(out: Path) -> list[dict[str, Any]]:
    """Means over seeds: perplexity over that of the model's own number, and over fixed k at the same mean."""
    rows = [json.loads(path.read_text()) for path in sorted((out / "rows").glob("*.json"))]
    fixed = [row for row in rows if row["method"] == "fixed"]
    whole = max(fixed, key=lambda row: row["count"])
    table = []
    adapted = [row for row in rows if row["method"] != "fixed"]
    for method, share in sorted({(row["method"], row["share"]) for row in adapted}):
        found = [row for row in adapted if (row["method"], row["share"]) == (method, share)]
        line: dict[str, Any] = {"method": method, "share": share, "seeds": len(found)}
        for text in ("web", "wikitext2"):
            ratios = [row[text]["perplexity"] / whole[text]["perplexity"] for row in found]
            over = [row[text]["perplexity"] / interpolated(fixed, text, row[text]["experts"]) for row in found]
            line[text] = {
                "ratio": statistics.fmean(ratios), "deviation": statistics.stdev(ratios) if len(ratios) > 1 else 0.0,
                "over_fixed": statistics.fmean(over),
                "experts": statistics.fmean(row[text]["experts"] / whole["default"] for row in found),
            }  # fmt: skip
        if "tasks" in whole and all("tasks" in row for row in found):
            line["tasks"] = statistics.fmean(row["tasks"]["mean"]["acc"] for row in found)
        line["minutes"] = statistics.fmean(row["adapt"]["seconds"] / 60 for row in found)
        table.append(line)
    for row in fixed:
        line = {"method": "fixed", "share": row["count"] / row["default"], "seeds": 1}
        for text in ("web", "wikitext2"):
            line[text] = {
                "ratio": row[text]["perplexity"] / whole[text]["perplexity"],
                "perplexity": row[text]["perplexity"],
            }
        if "tasks" in row:
            line["tasks"] = row["tasks"]["mean"]["acc"]
        table.append(line)
    return table


def speeds(arguments: argparse.Namespace) -> None:
    """Time decoding of every adapter and fixed number against the model's own number, in alternation."""
    base, tokenizer = moesaic.load(arguments.model, store=store(arguments))
    prompt = prompt_tokens(tokenizer, 256)
    rules: dict[str, dict[str, Any]] = {
        path.name: {"adapter": path} for path in sorted((arguments.out / "adapters").glob("*-0")) if path.is_dir()
    }
    default = max(block.num_experts_per_tok for block in moe_blocks_of(base))
    counts = sorted({max(1, round(share * default)) for share in arguments.shares})
    rules |= {f"fixed-{count}": {"select": f"top-k:k={count}"} for count in counts}
    path = arguments.out / "speed.json"
    found = (
        json.loads(path.read_text()) if path.is_file() else {"machine": machine(), "threads": torch.get_num_threads()}
    )
    for name, rule in rules.items():
        if name not in found:
            model, _ = moesaic.load(arguments.model, store=store(arguments), **rule)
            found[name] = decode_speed(model, base, prompt, new=48, rounds=7).to_dict()
            write_json(path, found)
            print(f"{name}: {found[name]['speedup']:.3f} of {found[name]['limit']:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--web", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tasks", type=Path)
    parser.add_argument("--items", type=int, default=50)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=[*RULES, *LEARNED])
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--samples", type=int, default=1_000)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=65_536)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--expert-memory", help="for a model that does not fit, such as 30%%; not with what learns by distilling"
    )
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--oracle", action="store_true")
    parser.add_argument("--oracle-tokens", type=int, default=1_024)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    (arguments.out / "rows").mkdir(parents=True, exist_ok=True)
    if arguments.speed:
        return speeds(arguments)
    with tempfile.TemporaryDirectory() as folder:
        train, held = split_web(arguments.web, Path(folder))
        if arguments.oracle:
            return oracles(arguments, train, held)
        fixed_rows(arguments, held)
        for seed, share, method in itertools.product(arguments.seeds, arguments.shares, arguments.methods):
            path = arguments.out / "rows" / f"{method}-{share:g}-{seed}.json"
            if path.is_file():
                continue
            row = row_of(arguments, method, share, seed, train, held) | {"machine": machine()}
            write_json(path, row)
            print(f"{path.stem}: web {row['web']['perplexity']:.3f} at {row['web']['experts']:.3f}", flush=True)
        facts = {
            "model": arguments.model, "machine": machines(arguments.out), "versions": versions(),
            "threads": torch.get_num_threads(), "minutes": arguments.minutes, "window": WINDOW,
            "protocol": "gptq", "max_tokens": arguments.max_tokens,
            "web_sha256": text_hash(read_documents([str(train)])),
        }  # fmt: skip
    write_json(arguments.out / "adaptive.json", facts | {"summary": summary(arguments.out)})


if __name__ == "__main__":
    main()
