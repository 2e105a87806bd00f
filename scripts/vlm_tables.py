"""Tables of converted vision-language models, from `benchmarks/results/vlm-*`."""

from __future__ import annotations

from measured import grid, measured, read

LABELS = {
    "ours": "**ours**",
    "image-weight-1": "ours, a picture's token counts as one of text",
    "fine-1": "the same, about 64 groups",
    "text-only": "ours, calibrated on text alone",
    "static-1": "static pruning, our recovery, as one of text",
}


def vlm(name: str) -> str:
    """Points of accuracy lost by line and share of the FFN, and what text loses."""
    file = f"vlm-{name}/vlm.json"
    d = read(file)
    found = {row["line"]: row for row in d["summary"]}
    shares = sorted({int(line.rpartition("-")[2]) for line in found if line[-1].isdigit()}, reverse=True)
    lines = []
    for line, label in LABELS.items():
        own = [found.get(f"{line}-{share}") for share in shares]
        if any(own):
            lost = [f"{row['points_lost']:.1f}" if row else "" for row in own]
            text = [f"{row['perplexity_ratio']:.3f}" if row else "" for row in own]
            lines.append([label, *lost, *text])
    head = [
        "points lost, and text's ratio",
        *(f"{share} %" for share in shares),
        *(f"text, {share} %" for share in shares),
    ]
    dense, seeds = d["dense"], min(row["seeds"] for line, row in found.items() if line.startswith(tuple(LABELS)))
    return (
        grid(head, lines)
        + "\n\n"
        + measured(
            file, command(d, name),
            f"Accuracy is exact match of greedy answers, {dense['n']:,} questions of `{d['tasks']}`; the dense model "
            f"has {dense['acc']:.1%} (standard error {dense['stderr']:.1%})",
            f"{d['tokens']:,} calibration tokens, half of pictures and half of text but where it says otherwise; mean "
            f"of {seeds} seed{'s' * (seeds > 1)}; text's ratio is perplexity over the dense model's on held-out text",
        )
    )  # fmt: skip


QUARTER = {
    "fine-25": "**ours**, about 64 groups", "ours-25": "**ours**", "static-25": "static pruning, our recovery",
    "image-weight-0.1-25": "ours, `--image-weight 0.1`", "image-weight-0.5-25": "ours, `--image-weight 0.5`",
}  # fmt: skip
"""Lines at a quarter of the FFN, and what readers call them."""


def quarter(name: str) -> str:
    """Points of accuracy lost at a quarter of the FFN with more calibration tokens."""
    file = f"vlm-{name}/vlm.json"
    d = read(file)
    found = {row["line"]: row for row in d["summary"]}
    lines = []
    for line, label in QUARTER.items():
        if row := found.get(line):
            spread = f" ± {100 * row['deviation']:.1f}" if row["deviation"] is not None else ""
            ratio = f"{row['perplexity_ratio']:.3f}"
            lines.append([label, row["plan"], f"{row['points_lost']:.1f}{spread}", ratio, str(row["seeds"])])
    return (
        grid(["25 % of each FFN", "plan", "points lost", "text's ratio", "seeds"], lines)
        + "\n\n"
        + measured(
            file,
            f"python benchmarks/vlm.py --model {d['model']} --out benchmarks/results/vlm-{name} --tokens {d['tokens']} "
            "--active 0.25 --lines ours fine static image-weight --image-weights 0.1 0.5 --seeds 0 1 2",
            f"{d['tokens']:,} calibration tokens; the dense model has {d['dense']['acc']:.1%} of "
            f"{d['dense']['n']:,} questions",
        )
    )


def tuned(name: str) -> str:
    """Accuracy before and after equal steps of `moe-llava`, by what runs for a token."""
    file = f"vlm-{name}/vlm.json"
    d = read(file)
    lines = []
    for row in d["summary"]:
        if row["tuned"] is None:
            continue
        label = "MoE-LLaVA: `upcycle`, whole FFNs" if row["line"] == "upcycled" else "ours, carved"
        lines.append([
            label, row["plan"], f"{row['ffn_active']:.2f} x", f"{row['active_parameters'] / 1e6:.2f} M",
            f"{row['memory_factor']:g} x", f"{row['acc']:.1%}", f"{row['tuned']:.1%}",
        ])  # fmt: skip
    head = ["start", "plan", "FFN active", "active parameters", "memory", "before", f"after {d['steps']} steps"]
    return (
        grid(head, lines)
        + "\n\n"
        + measured(
            file, command(d, name),
            f"`finetune --method moe-llava` on the bundled pictures and text, {d['steps']} steps of {d['batch']} "
            f"sequences; the dense model has {d['dense']['acc']:.1%}",
        )
    )  # fmt: skip


def command(d: dict[str, object], name: str) -> str:
    """What was typed."""
    seeds = " ".join(map(str, d["seeds"]))  # pyrefly: ignore[bad-argument-type]
    return (
        f"python benchmarks/vlm.py --model {d['model']} --out benchmarks/results/vlm-{name} --tokens {d['tokens']} "
        f"--steps {d['steps']} --seeds {seeds} --image-weights 1"
    )
