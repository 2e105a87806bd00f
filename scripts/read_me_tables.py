"""Tables of models with one router ahead of them, from `benchmarks/results/read-me-*`."""

from __future__ import annotations

from statistics import fmean as mean

from measured import grid, measured, read

LABELS = {
    "layer-wise": "a router in each layer (`coactivation`)",
    "paths-linear": "the same, on one cut for all layers (`paths`)",
    "read-me": "Read-ME: `domains:copied=True`, no recovery",
    "read-me-recovered": "Read-ME, our recovery",
    "ahead-1": "**ours**: `paths`, one decision for all layers",
    "ahead-2": "ours, 2 groups of layers",
    "ahead-4": "ours, 4 groups of layers",
    "ahead-0": "ours, a decision for each layer",
    "ahead-coactivation": "a cut of its own in each layer, a decision for each",
}


def read_me(name: str) -> str:
    """Perplexity over dense after conversion and tuning, with what a single path could do and what it costs."""
    file = f"read-me-{name}/read_me.json"
    d = read(file)
    found = {row["line"]: row for row in d["summary"]}
    seeds = min(row["seeds"] for row in d["summary"])
    lines = []
    for line, label in LABELS.items():
        if (row := found.get(line)) is not None:
            lines.append([
                label, str(row["plan"]), f"{row['memory_factor']:g} x",
                *(shown(row[key]) for key in ("converted", "tuned", "oracle")),
                f"{row['kept_experts']:.0%}" if row["kept_experts"] is not None else "",
                f"{row['router_share']:.1%}" if row["router_share"] else "",
            ])  # fmt: skip
    head = [
        "",
        "plan",
        "memory",
        "converted",
        "tuned",
        "best single path",
        "keeps its experts",
        "router's share of time",
    ]
    return (
        grid(head, lines)
        + "\n\n"
        + measured(
            file,
            f"python benchmarks/read_me.py --model {d['model']} --out benchmarks/results/read-me-{name} "
            f"--tokens {d['tokens']} "
            f"--steps {d['steps']} --batch {d['batch']} --seeds {' '.join(map(str, range(seeds)))}",
            f"Perplexity over the dense model's on held-out text; {d['tokens']:,} calibration tokens, windows "
            f"of {d['window']}, "
            f"mean of {seeds} seed{'s' * (seeds > 1)}; half of each FFN active",
            "Best single path: the experts of largest true norm, summed over the layers, the same in each; "
            "no bound where "
            "recovery was fitted to other choices. Keeps its experts: tokens whose experts are those of the "
            "token before",
        )
    )


def locality(name: str) -> str:
    """What keeping a token's experts costs and wins."""
    file = f"locality-{name}.json"
    d = read(file)
    lines = []
    for value in sorted({row["locality"] for row in d["rows"]}):
        rows = [row for row in d["rows"] if row["locality"] == value]
        lines.append([
            f"{value:g}", f"{mean(r['perplexity'] / r['perplexity_dense'] for r in rows):.3f}",
            *(f"{mean(r[key] for r in rows):.0%}" for key in ("kept_before", "kept")),
            *(f"{mean(r['hits'][share] for r in rows):.0%}" for share in ("0.3", "0.5")),
        ])  # fmt: skip
    before = mean(row["perplexity_before"] / row["perplexity_dense"] for row in d["rows"])
    head = ["`--locality`", "perplexity over dense", "keep, before", "keep, after", "hits, 30% fit", "hits, 50% fit"]
    seeds = sorted({row["seed"] for row in d["rows"]})
    return (
        grid(head, lines)
        + "\n\n"
        + measured(
            file,
            f"python benchmarks/locality.py --model {d['model']} --plan {d['plan']} --steps {d['steps']} --batch "
            f"{d['batch']} --tokens {d['tokens']} --localities {' '.join(x[0] for x in lines)} --seeds "
            f"{' '.join(map(str, seeds))} --out benchmarks/results/{file}",
            f"{d['model']}, {d['plan']}, `coactivation`; {before:.3f} times dense before {d['steps']} steps of "
            f"`{d['method']}`; mean of {len(seeds)} seeds; keep: tokens whose experts are those of the token before; "
            f"hits: `{d['policy']}`, simulated, of requests that decode one after the other",
        )
    )


def shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
