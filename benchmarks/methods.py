"""Perplexity of every method at equal cost on one model, in one table: what README shows.

    python benchmarks/methods.py demo --active 0.25 0.5 --out benchmarks/results

Resumable: a finished row is kept in `methods-<model>.json` and not measured again; other settings start anew.
Perplexity is on the bundled held-out text; with `--text wiki.test.raw` also `gptq` on that file (first `--max-tokens`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import moesaic
from moesaic.evaluation.machine import machine, versions
from moesaic.evaluation.perplexity import perplexity

METHODS = [
    ("coactivation", "closed-form"),
    ("static", "closed-form"),
    ("cmoe", "none"),
    ("static", "none"),
    ("specialists", "closed-form"),
]


def measure(model: str, active: float, partition: str, recovery: str, text: Path | None, tokens: int) -> dict[str, Any]:
    """One conversion and its perplexities."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        config = moesaic.ConvertConfig(active=active, partition=partition, recovery=recovery)
        metrics = moesaic.convert(model, out, config, force=True)
        row = {
            "active": active, "partition": partition, "recovery": recovery, "plan": metrics["plan"],
            "ffn_active": metrics["ffn_active"], "memory_factor": metrics["memory_factor"],
            "perplexity": metrics["perplexity"], "perplexity_dense": metrics["perplexity_dense"],
            "ratio": metrics["perplexity"] / metrics["perplexity_dense"], "protocol": metrics["perplexity_protocol"],
            "seconds": metrics["seconds"],
        }  # fmt: skip
        if text:
            loaded, tokenizer = moesaic.load(out)
            row["text"] = perplexity(loaded, tokenizer, text=text, max_tokens=tokens)
    return row


def main(model: str, shares: list[float], out: Path, text: Path | None, tokens: int) -> None:
    path = out / f"methods-{model}.json"
    setting = {"model": model, "text": text.name if text else None, "max_tokens": tokens, "versions": versions()}
    found = json.loads(path.read_text()) if path.is_file() else {}
    rows = found.get("rows", []) if found.get("setting") == setting else []
    dense = found.get("dense") if rows else None
    if text and dense is None:
        dense = perplexity(*moesaic.load(model), text=text, max_tokens=tokens)
    for active in shares:
        for partition, recovery in METHODS:
            if any((r["active"], r["partition"], r["recovery"]) == (active, partition, recovery) for r in rows):
                continue
            rows.append(measure(model, active, partition, recovery, text, tokens))
            result = {"setting": setting, "machine": machine(), "dense": dense, "rows": rows}
            out.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=2) + "\n")
            print(f"{active:.0%} {partition:13}{recovery:12} x {rows[-1]['ratio']:.3f}", flush=True)
            if text and dense:
                print(f"     {text.name} x {rows[-1]['text']['perplexity'] / dense['perplexity']:.3f}", flush=True)

    if rows:
        plot(rows, model, path.with_suffix(".png"))


def plot(rows: list[dict[str, Any]], model: str, path: Path) -> None:
    """Bars of the perplexity ratio, one group for each share of the FFN that is active."""
    shares = sorted({row["active"] for row in rows})
    figure = Figure(figsize=(8, 3.4))
    for axes, share in zip(figure.subplots(1, len(shares), squeeze=False)[0], shares, strict=True):
        group = sorted((row for row in rows if row["active"] == share), key=lambda row: -row["ratio"])
        names = [f"{r['partition']}{' + closed form' if r['recovery'] == 'closed-form' else ''}" for r in group]
        routed = [r["recovery"] == "closed-form" and r["partition"] != "static" for r in group]
        bars = axes.barh(names, [r["ratio"] for r in group], color=["#2a6f97" if x else "#b8b8bd" for x in routed])
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.set(title=f"{share:.0%} of each FFN active", xlabel=f"perplexity / dense, {model} (lower is better)")
        axes.set_xlim(0, 1.15 * max(r["ratio"] for r in group))
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--active", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--text", type=Path)
    parser.add_argument("--max-tokens", type=int, default=40_960)
    a = parser.parse_args()
    main(a.model, a.active, a.out, a.text, a.max_tokens)
