"""Tables of simulated caches: hits by policy and capacity, and the time of a forward pass."""

from __future__ import annotations

from typing import Any

from measured import grid, measured, read

KNOWN = {"0": "", "layer": ", next layer known", "1": ", 1 token known", "4": ", 4 tokens known", "all": ", all known"}
WAYS = {"on_demand": "on demand", "pipelined": "pipelined", "ahead": "a layer ahead"}


def label(policy: str, depth: str) -> str:
    return f"`{policy}`{KNOWN[depth]}"


def cells(d: dict[str, Any], trace: str) -> dict[tuple[str, str], dict[float, dict[str, Any]]]:
    """Rows of one trace, by policy and depth, then capacity."""
    found: dict[tuple[str, str], dict[float, dict[str, Any]]] = {}
    for row in d["rows"]:
        if row["trace"] == trace:
            found.setdefault((row["policy"], row["depth"]), {})[row["capacity"]] = row
    return found


def hits(name: str) -> str:
    """Hits in % of each policy, by the share of experts that fits."""
    d = read(f"cache-{name}.json")
    found = cells(d, name)
    capacities = sorted({c for row in found.values() for c in row})
    rows = [
        [label(*key), *(f"{100 * row[c]['hit_ratio']:.1f}" if "hit_ratio" in row[c] else "-" for c in capacities)]
        for key, row in found.items()
    ]
    about = d["traces"][name]
    return (
        grid(["policy", *(f"{c:g} %" for c in capacities)], rows)
        + "\n\n"
        + measured(
            f"cache-{name}.json",
            f"python benchmarks/simulate_cache.py --trace routes.csv.gz --out benchmarks/results/cache-{name}.json",
            f"Trace: {about['requests']} requests, {about['tokens']:,} decoded tokens, one after the other, of the "
            f"bundled held-out text, sha256 `{about['sha256'][:16]}`: "
            f"`moesaic inspect {name} --trace routes.csv.gz --requests 24 --prompt 48 --new 100`",
            f"{about['layers']} layers of {about['experts']} experts; one token uses "
            f"{round(token_share(d, name), 1):g} % of them; the first use of each expert counts as a miss",
        )
    )


def token_share(d: dict[str, Any], name: str) -> float:
    """Share of all experts that one token uses, in %."""
    row = next(row for row in d["rows"] if row["trace"] == name and "hits" in row)
    about = d["traces"][name]
    return 100 * (row["hits"] + row["misses"]) / about["tokens"] / about["layers"] / about["experts"]


def shapes() -> str:
    """Hits and times of large shapes whose routes are drawn."""
    d = read("cache-shapes.json")
    s, rows = d["settings"], []
    for name, about in d["traces"].items():
        for key, row in cells(d, name).items():
            if key not in SHOWN:
                continue
            ms = row[20.0]["ms_per_pass"] if 20.0 in row else row[20]["ms_per_pass"]
            ratios = (f"{100 * row[c]['hit_ratio']:.1f}" if "hit_ratio" in row[c] else "-" for c in (5, 20, 50))
            rows.append([
                f"{name}, {about['expert_bytes'] / 1e6:.1f} MB an expert", label(*key), *ratios,
                *(f"{ms[way]:,.0f}" for way in WAYS),
            ])  # fmt: skip
    head = ["shape", "policy", "5 %", "20 %", "50 %", *(f"ms, {way}" for way in WAYS.values())]
    drawn = {about["drawn_layers"] for about in d["traces"].values()}
    about = next(iter(d["traces"].values()))
    return (
        grid(head, rows)
        + "\n\n"
        + measured(
            "cache-shapes.json",
            f"python benchmarks/simulate_cache.py --draw {' '.join(d['traces'])} --requests {about['requests']} "
            f"--tokens {about['tokens'] // about['requests']} --layers {max(drawn)} --bytes 0.5 "
            "--capacities 5 10 20 30 50 --out benchmarks/results/cache-shapes.json",
            f"Routes are drawn, {about['tokens']} tokens in {max(drawn)} layers; bytes and times are of all layers",
            f"4 bits a parameter; {s['bandwidth']:g} GB/s and {1e3 * s['latency']:g} ms a load from the slow tier, "
            f"{s['memory']:g} GB/s from the fast one; {100 * s['foreseen']:.0f} % of what misses is known a layer "
            f"ahead; ms a token where 20 % fit; seed {s['seed']}",
        )
    )


SHOWN = (
    ("lru", "0"), ("lru:per_layer=True", "0"), ("lfu", "0"), ("look-ahead", "0"), ("look-ahead", "4"), ("belady", "all")
)  # fmt: skip
