"""Write every table of results in README.md and docs/results from benchmarks/results, each between two markers.

    python scripts/result_tables.py            # writes what stands between `<!-- table: NAME -->` and `<!-- end -->`
    python scripts/result_tables.py --check    # writes nothing and exits with 1 where a page is stale

The prose around the tables is written by hand. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

import adaptive_tables
import cache_tables
import engine_tables
import generation_tables
import read_me_tables
import sibling_tables
import speed_tables
import store_tables
import training_tables
import vlm_tables
from measured import RESULTS, ROOT, grid, harness, measured, ratio, read

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "results").glob("*.md"))]
MARKED = re.compile(r"(<!-- table: ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
BUDGETS = (0.25, 0.5, 0.75)
OURS, FINE = ("coactivation", "specialists"), "coactivation-fine"
LABELS = {
    "coactivation": "**ours**, `coactivation`",
    "coactivation-fine": "**ours**, `coactivation`, 64 groups",
    "coactivation-128": "**ours**, `coactivation`, 128 groups",
    "specialists": "**ours**, `specialists`",
    "specialists-centroid": "ours, `specialists` by nearest centroid",
    "static+closed-form": "static pruning, our recovery",
    "static-weighted+closed-form": "the same, weighted saliency",
    "flap": "static pruning (FLAP)",
    "cmoe": "CMoE",
    "cmoe-code": "CMoE, as its code has it",
    "moefication": "MoEfication, 64 groups",
    "moefication-coarse": "MoEfication, eight groups",
    "expertweaver": "ExpertWeaver, 64 groups",
    "expertweaver-coarse": "ExpertWeaver, eight groups",
    "llama-moe": "LLaMA-MoE (random groups)",
    "depth+closed-form": "fewer layers (ShortGPT), our recovery",
    "depth": "fewer layers (ShortGPT)",
    "depth-contiguous+closed-form": "a run of layers fewer, our recovery",
    "depth-contiguous": "a run of layers fewer (Gromov et al.)",
    "cats+closed-form": "CATS, our recovery",
    "cats": "CATS",
    "cats-top-k": "*bound at batch 1: CATS, each token's largest*",
    "teal": "*bound at batch 1: TEAL on FFNs*",
    "wina": "*bound at batch 1: WINA on FFNs*",
    "neurons": "*bound: each token its own best neurons*",
}


def by_method(summary: list[dict[str, Any]]) -> dict[tuple[str, float], dict[float, dict[str, Any]]]:
    """Rows by method and memory, then by budget, in the order of LABELS."""
    keys = sorted({(r["method"], r["memory_factor"]) for r in summary}, key=lambda k: (list(LABELS).index(k[0]), k[1]))
    return {key: {r["active"]: r for r in summary if (r["method"], r["memory_factor"]) == key} for key in keys}


def quality(model: str, folder: str = "") -> str:
    file = f"{folder}quality-{model}/frontier.json"
    rows = []
    for (method, _), found in by_method(read(file)["summary"]).items():
        memory = sorted({r["memory"] for r in found.values() if r["memory"]})
        size = "" if not memory else " to ".join(f"{m:.3g}" for m in sorted({memory[0], memory[-1]})) + " x"
        shapes = ", ".join(dict.fromkeys(found[b]["plan"] for b in BUDGETS if b in found and found[b]["plan"]))
        rows.append([LABELS[method], size, shapes, *(ratio(found.get(budget)) for budget in BUDGETS)])
    head = ["method", "memory of the FFNs", "shapes", *(f"{budget:.0%} active" for budget in BUDGETS)]
    return grid(head, rows) + "\n\n" + harness(file)


def readme() -> str:
    """Lines for README: the better of our two cuts, the fine one, static pruning twice, CMoE; quality, then speed."""
    d = read("quality-demo/frontier.json")
    table = by_method(d["summary"])
    ours = {
        b: min((table[m, 1.0][b] for m in OURS if b in table[m, 1.0]), key=lambda r: r["perplexity_ratio"])
        for b in BUDGETS
    }
    lines = [
        ("**moesaic**, the better of its two cuts", ours),
        ("**moesaic**, 64 small groups (`--fine`)", table[FINE, 1.0]),
        *((LABELS[method], table[method, 1.0]) for method in ("static+closed-form", "flap", "cmoe")),
    ]
    head = ["", *(f"perplexity, {b:.0%} active" for b in BUDGETS), *(f"decode, {b:.0%}" for b in BUDGETS)]
    return grid(
        head,
        [
            [
                label,
                *(ratio(r.get(b)) for b in BUDGETS),
                *(on_machines(d, r[b]["plan"]) if b in r else "" for b in BUDGETS),
            ]
            for label, r in lines
        ],
    )


def on_machines(frontier: dict[str, Any], plan: str) -> str:
    """The speed of a shape of memory 1, from the slowest to the quickest machine."""
    widths = {row["expert_width"] for row in frontier["rows"] if row["plan"] == plan and row["memory_factor"] == 1}
    found = [s["speedup"] for s in frontier["speeds"] if s["plan"] == plan and s["expert_width"] in widths]
    return " to ".join(dict.fromkeys(f"{speed:.2f}" for speed in (min(found), max(found)))) + " x"


def zero_shot(folder: str) -> str:
    """Mean accuracy of both models by method and budget."""
    files = [f"{folder}/quality-{model}/frontier.json" for model in ("demo", "gemma-270m")]
    files = [file for file in files if (RESULTS / file).is_file()]
    data = [read(file) for file in files]
    tables = [{key[0]: rows for key, rows in by_method(d["summary"]).items()} for d in data]
    cell = lambda r: f"{r['tasks_mean']:.3f} ± {r['tasks_stderr']:.3f}".replace("0.", ".") if r else ""  # noqa: E731
    budgets = [b for b in BUDGETS if any(r["active"] == b for d in data for r in d["summary"])]
    dense = [f"{d['dense']['tasks']['mean']['acc']:.3f}".replace("0.", ".") for d in data]
    rows = [["*dense*", *(f"*{value}*" for value in dense for _ in budgets)]]
    rows += [
        [LABELS[method], *(cell(t.get(method, {}).get(b)) for t in tables for b in budgets)]
        for method in LABELS
        if any(method in t for t in tables)
    ]
    head = ["method", *(f"`{d['setting']['model']}`, {b:.0%}" for d in data for b in budgets)]
    return grid(head, rows) + "\n\n" + "\n\n".join(harness(file) for file in files)


def calibration() -> str:
    """The same conversion from fewer and from more tokens."""
    files = {
        "demo": ("quality-demo-16k", "quality-demo"),
        "gemma-270m": ("quality-gemma-270m", "quality-gemma-270m-262k"),
        "demo-1.5b": ("quality-demo-1.5b-16k", "quality-demo-1.5b"),
    }
    rows, tokens = [], (16_384, 65_536, 262_144)
    for model, pair in files.items():
        found = {read(f"{f}/frontier.json")["setting"]["tokens"]: read(f"{f}/frontier.json")["summary"] for f in pair}
        key = lambda r: (r["method"], r["active"], r["memory_factor"])  # noqa: E731
        tables = {t: {key(r): r for r in summary} for t, summary in found.items()}
        for method, active, memory in sorted(set.intersection(*(set(t) for t in tables.values()))):
            same = {t: table[method, active, memory] for t, table in tables.items()}
            size = f"{next(iter(same.values()))['memory']:g} x"
            rows.append([f"`{model}`", LABELS[method], size, f"{active:.0%}", *(ratio(same.get(t)) for t in tokens)])
    head = ["model", "method", "memory", "FFN active", *(f"{t:,} tokens" for t in tokens)]
    extra = ["quality-demo-16k", "quality-demo-1.5b-16k", "quality-gemma-270m-262k"]
    return grid(head, rows) + "\n\n" + "\n\n".join(harness(f"{name}/frontier.json") for name in extra)


def first_tokens() -> str:
    one = lambda name: ratio(read(f"{name}/frontier.json")["summary"][0])  # noqa: E731
    full = next(
        r
        for r in read("quality-demo-1.5b/frontier.json")["summary"]
        if (r["method"], r["active"], r["memory_factor"]) == ("specialists-centroid", 0.25, 1.0)
    )
    rows = [
        ["16,384", one("quality-demo-1.5b-16k-no-first"), one("quality-demo-1.5b-16k")],
        ["65,536", one("quality-demo-1.5b-no-first"), ratio(full)],
    ]
    sources = [
        harness(f"{name}/frontier.json") for name in ("quality-demo-1.5b-16k-no-first", "quality-demo-1.5b-no-first")
    ]
    head = ["calibration tokens", "without first tokens", "with first tokens"]
    return grid(head, rows) + "\n\n" + "\n\n".join(sources)


def pruning(model: str) -> str:
    """Pruning methods at equal size, with and without recovery."""
    file = f"pruning-{model}.json"
    d, rows, cells = read(file), [], {}
    for row in d["rows"]:
        key = (row["method"], row["experts"], row["recovery"])
        cells.setdefault(key, []).append(row["perplexity"] / d["perplexity"])
    keeps, recoveries = sorted({key[1] for key in cells}, reverse=True), ("none", "closed-form")
    for method in dict.fromkeys(key[0] for key in cells):
        found = [cells.get((method, keep, recovery)) for keep in keeps for recovery in recoveries]
        shown = [f"{mean(c):.3f}" + (f" ±{stdev(c):.3f}" if len(c) > 1 else "") if c else "" for c in found]
        rows.append([f"`{method}`", *shown])
    head = ["method", *(f"{keep} experts{', recovered' * (r != 'none')}" for keep in keeps for r in recoveries)]
    counts = " ".join(map(str, keeps))
    return (
        grid(head, rows)
        + "\n\n"
        + measured(
            file,
            f"python benchmarks/pruning.py --model {model} --experts {counts} --out benchmarks/results/{file}",
            f"Protocol: perplexity over the source's, which is {d['perplexity']:.2f}; `{d['protocol']}` on the bundled "
            f"held-out text, windows of {d['window']}, {d['tokens']:,} tokens, data sha256 `{d['data_sha256'][:16]}`, "
            f"{d['dtype']}",
            f"Calibration: {d['calibration_tokens']:,} tokens of the {d['calibration']}; ± is the deviation over seeds "
            f"0, 1 and 2 where a method draws anything, else seed 0; {d['threads']} thread",
        )
    )


TABLES: dict[str, Callable[[], str]] = {
    "readme": readme,
    "quality-demo": lambda: quality("demo"),
    "quality-gemma-270m": lambda: quality("gemma-270m"),
    "baselines-demo": lambda: quality("demo", "baselines/"),
    "quality-demo-1.5b": lambda: quality("demo-1.5b"),
    "siblings-demo-1.5b": lambda: sibling_tables.siblings("demo-1.5b", LABELS),
    "zero-shot": lambda: zero_shot("tasks"),
    "zero-shot-65k": lambda: zero_shot("tasks-65k"),
    "calibration-tokens": calibration,
    "first-tokens": first_tokens,
    "engines": engine_tables.engines,
    "engines-by-width": engine_tables.by_width,
    "quantised": engine_tables.quantised,
    "training": training_tables.training,
    "training-settings": training_tables.settings,
    "training-siblings": lambda: training_tables.beside_siblings("demo-1.5b"),
    "adaptive-tiny-moe": lambda: adaptive_tables.adaptive("tiny-moe"),
    "adaptive-oracle": lambda: adaptive_tables.oracle("tiny-moe"),
    "adaptive-speed": adaptive_tables.adaptive_speed,
    "adaptive-demo": lambda: adaptive_tables.adaptive("demo"),
    "adaptive-gemma-270m": lambda: adaptive_tables.adaptive("gemma-270m"),
    "shapes-demo": lambda: speed_tables.shapes("demo"),
    "shapes-gemma-270m": lambda: speed_tables.shapes("gemma-270m"),
    "models": speed_tables.models,
    "blocks": speed_tables.blocks,
    "products": speed_tables.products,
    "demo": speed_tables.demo,
    "conversion": speed_tables.conversion,
    "assignment": speed_tables.assignment,
    "pruning-tiny-moe": lambda: pruning("tiny-moe"),
    "cache-tiny-moe": lambda: cache_tables.hits("tiny-moe"),
    "cache-shapes": cache_tables.shapes,
    "store-policies-tiny-moe": lambda: store_tables.policies("tiny-moe"),
    "store-policies-demo": lambda: store_tables.policies("demo"),
    "store-policies-demo-wide": lambda: store_tables.policies("demo-wide"),
    "store-queue": lambda: store_tables.queue("gemma-ahead"),
    "store-queue-domains": lambda: store_tables.queue("domains"),
    "store-bias": lambda: store_tables.bias("tiny-moe"),
    "store-memory": lambda: store_tables.memory("demo"),
    "store-limited": store_tables.limited,
    "serving-schedulers": lambda: store_tables.schedulers("domains"),
    "serving-load": lambda: store_tables.load("tiny-moe"),
    "locality-tiny": lambda: read_me_tables.locality("tiny"),
    "read-me-tiny": lambda: read_me_tables.read_me("tiny"),
    "generation": generation_tables.generation,
    "vlm-tiny": lambda: vlm_tables.vlm("tiny"),
    "vlm-tiny-32k": lambda: vlm_tables.quarter("tiny-32k"),
    "vlm-tiny-tuned": lambda: vlm_tables.tuned("tiny"),
}


def rewritten(text: str) -> str:
    """A page with its tables made anew."""
    return MARKED.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)


def main(check: bool) -> int:
    stale = [page for page in PAGES if rewritten(page.read_text()) != page.read_text()]
    for page in stale:
        print(f"{page.relative_to(ROOT)} {'is stale: python scripts/result_tables.py' if check else 'rewritten'}")
        if not check:
            page.write_text(rewritten(page.read_text()))
    return int(check and bool(stale))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page is stale")
    sys.exit(main(parser.parse_args().check))
