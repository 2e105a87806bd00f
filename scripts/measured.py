"""What the tables of results share: reading, Markdown, and where a number comes from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    assert len(header) <= 8, header
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(row: dict[str, Any] | None) -> str:
    """Perplexity over the dense model's, with its standard deviation where there are several seeds."""
    if row is None:
        return ""
    spread = f" ± {row['perplexity_ratio_deviation']:.2f}".replace("0.", ".") if row["seeds"] > 1 else ""
    return number(row["perplexity_ratio"]) + spread


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} x"


def every(key: str, *places: Any) -> list[Any]:
    """All values of `key`, at any depth, each once."""
    found: list[Any] = []
    for place in places:
        if isinstance(place, dict):
            found += [place[key]] if place.get(key) else []
            found += every(key, *place.values())
        elif isinstance(place, list):
            found += every(key, *place)
    return [value for i, value in enumerate(found) if value not in found[:i]]


def measured(files: str | Sequence[str], command: str, *facts: str, part: str | None = None) -> str:
    """Where the numbers of `files`, or of one part of them, come from: folded under the table."""
    files = [files] if isinstance(files, str) else list(files)
    data = [read(file)[part] if part else read(file) for file in files]
    versions = ["; ".join(f"{name} {version}" for name, version in v.items()) for v in every("versions", *data)]
    hashes = [f"{Path(d['text']).name}, sha256 `{d['data_sha256']}`" for d in texts(data)]
    lines = [
        "Files: " + ", ".join(f"`benchmarks/results/{file}`" for file in files),
        *(["Scored text: " + "; ".join(hashes)] if hashes else []),
        *facts,
        "Machines: " + "; ".join(sorted(m for m in every("machine", *data) if isinstance(m, str))),
        "Versions: " + " · ".join(versions),
        f"Command: `{command}`",
    ]
    items = "\n".join(f"- {line}" for line in lines)
    return f'<details markdown="1"><summary>How this was measured</summary>\n\n{items}\n\n</details>'


def texts(places: Any) -> list[dict[str, Any]]:
    """Every record of a measured text, each text once."""
    if isinstance(places, list):
        found = [text for place in places for text in texts(place)]
    elif isinstance(places, dict):
        here = [places] if places.get("text") and places.get("data_sha256") else []
        found = here + [text for value in places.values() for text in texts(value)]
    else:
        return []
    return [t for i, t in enumerate(found) if t["data_sha256"] not in {f["data_sha256"] for f in found[:i]}]


def harness(file: str) -> str:
    """The facts and the command of a frontier's file."""
    d = read(file)
    s, rows, dense = d["setting"], d["rows"], d["dense"]
    seeds = sorted({row["seed"] for row in rows})
    flags = {
        "text": s["text"].split()[0],
        "calibration": " ".join(c.split()[0] for c in s["calibration"]),
        "tokens": s["tokens"],
        "max-tokens": s["max_tokens"],
        "tasks": s["tasks"].split()[0] if s.get("tasks") else None,
        "items": s.get("items"),
    }
    for flag, key in (("active", "active"), ("memory-factor", "memory_factor"), ("seeds", "seed")):
        flags[flag] = " ".join(f"{value:g}" for value in sorted({row[key] for row in rows}))
    flags["siblings"] = " ".join(sibling["model"] for sibling in d.get("siblings", [])) or None
    flags["methods"] = " ".join(dict.fromkeys(row["method"] for row in rows))
    given = " ".join(f"--{flag} {value}" for flag, value in flags.items() if value is not None)
    return measured(
        file,
        f"python benchmarks/quality.py {s['model']} {given} --out {(RESULTS / file).parent.parent.relative_to(ROOT)}",
        f"Protocol: perplexity `{dense['protocol']}`, windows of {dense['window']:,} tokens, the first "
        f"{dense['tokens']:,} tokens; dense {dense['perplexity']:.2f}",
        f"Calibration: {s['tokens']:,} tokens of " + ", ".join(f"{c} (first 16 digits)" for c in s["calibration"]),
        *([f"Zero-shot items: {s['tasks']} (first 16 digits), {s['items']} of each task"] if s.get("tasks") else []),
        "Seeds: "
        + ", ".join(map(str, seeds))
        + "; ± is their standard deviation, other cells are one seed" * (len(seeds) > 1),
    )
