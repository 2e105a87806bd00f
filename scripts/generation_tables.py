"""Tables of what converted models write, from `benchmarks/results/generation-*`."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

from measured import RESULTS, grid, measured, read

MEASURES = {
    "pass_at_1": "pass@1", "exact_match": "exact match", "agreement": "agreement", "loss": "loss, nats",
    "common_prefix": "tokens in common",
}  # fmt: skip
SHARES = ("pass_at_1", "exact_match", "agreement")


def generation() -> str:
    """A table for each set of exercises of each folder: a line for each label, the mean of its seeds."""
    files = sorted(path.relative_to(RESULTS).as_posix() for path in RESULTS.glob("generation-*/generation.json"))
    parts = [part for file in files for part in of_file(file)]
    return "\n\n".join(parts) or "Nothing has been measured yet."


def of_file(file: str) -> list[str]:
    """The tables of a folder, and how it was measured."""
    d = read(file)
    sets = list(dict.fromkeys(name for row in d["rows"] for name in row["generation"]))
    tables = [
        f"`{d['setting']['reference'] or d['rows'][0]['label']}`, {name}:\n\n" + table(d["rows"], name) for name in sets
    ]
    return [*tables, source(file, d)] if sets else []


def table(rows: list[dict[str, Any]], name: str) -> str:
    """One set: labels, shapes, and what was measured of each."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: -row["ffn_active"]):
        if name in row["generation"]:
            found.setdefault(row["label"], []).append(row)
    scores = {label: [row["generation"][name] for row in own] for label, own in found.items()}
    there = [key for key in MEASURES if any(key in score for own in scores.values() for score in own)]
    lines = [
        [
            f"`{label}`",
            own[0]["plan"] or "dense",
            f"{own[0]['ffn_active']:.0%}",
            *(cell(scores[label], key) for key in there),
        ]
        for label, own in found.items()
    ]
    return grid(["model", "plan", "FFN active", *(MEASURES[key] for key in there)], lines)


def cell(scores: list[dict[str, Any]], key: str) -> str:
    """Mean over seeds with their deviation, or of one the standard error over items."""
    values = [score[key] for score in scores if score.get(key) is not None]
    if not values:
        return ""
    error = scores[0].get("agreement_stderr" if key == "agreement" else "stderr") if key in SHARES else None
    error = stdev(values) if len(values) > 1 else error
    shown = f"{mean(values):.1%}" if key in SHARES else f"{mean(values):.2f}"
    return (
        shown if error is None else f"{shown} ± {100 * error if key in SHARES else error:.{1 if key in SHARES else 2}f}"
    )


def source(file: str, d: dict[str, Any]) -> str:
    """Where the numbers come from."""
    s, rows = d["setting"], d["rows"]
    scores = {name: score for row in rows for name, score in row["generation"].items()}
    hashes = "; ".join(
        f"{name}: the first {score['n']:,}, sha256 `{score['data_sha256']}`" for name, score in scores.items()
    )
    flags = [
        *(f"--{kind} {name}" for kind, name in s["files"].items()),
        *([f"--reference {s['reference']} --reference-tokens {s['reference_tokens']}"] if s["reference"] else []),
        *([f"--items {s['items']}"] if s["items"] else []),
        *(f"--{key.replace('_', '-')} {s[key]}" for key in ("max_new_tokens", "batch", "max_tokens", "threads")),
    ]
    models = " ".join(dict.fromkeys(row["label"] for row in rows))
    ended = [score["ended"] for row in rows for score in row["generation"].values() if score.get("ended") is not None]
    least = (
        f"; of {s['max_new_tokens']} tokens at most, in which at least {min(ended):.0%} came to an end" if ended else ""
    )
    return measured(
        file,
        f"python benchmarks/generation.py {models} {' '.join(flags)} --out benchmarks/results/{file.split('/')[0]}",
        f"Protocol: {s['protocol']}{least}",
        f"Exercises: {hashes}",
        "Weights calculated in: " + ", ".join(dict.fromkeys(row["dtype"] for row in rows)),
        "± is the deviation over seeds, or of one seed the standard error of drawing exercises",
    )  # fmt: skip
