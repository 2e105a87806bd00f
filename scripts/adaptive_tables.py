"""Tables of results of adaptive numbers of experts."""

from __future__ import annotations

from typing import Any

from measured import grid, measured, read

RULES = {
    "learned-threshold": "**`learned-threshold`**",
    "ada-k": "`ada-k`, PPO",
    "ada-k-distill": "`ada-k`, distilled",
    "top-p": "`top-p`",
    "threshold": "`threshold`",
    "entropy": "`entropy`",
    "relative": "`relative`",
    "skip": "`skip`",
    "layer-k": "`layer-k`",
}


def adaptive(model: str) -> str:
    """Perplexity of each rule over that of the model's own number, by budget; and over a fixed number at equal mean."""
    file = f"adaptive-{model}/adaptive.json"
    d = read(file)
    shares = sorted({row["share"] for row in d["summary"] if row["method"] != "fixed"})
    found = {(row["method"], row["share"]): row for row in d["summary"] if row["method"] != "fixed"}
    rows = []
    for method, label in RULES.items():
        if any((method, share) in found for share in shares):
            cells = [cell(found.get((method, share)), text) for text in ("web", "wikitext2") for share in shares]
            rows.append([label, *cells])
    for row in d["summary"]:
        if row["method"] == "fixed" and any(cells := fixed(row, shares)):
            rows.append([f"*`top-k`, {row['share']:.0%}*", *cells])
    head = ["", *(f"{name}, {share:.0%}" for name in ("web", "WikiText-2") for share in shares)]
    facts = [
        f"Protocol: perplexity `gptq`, windows of {d['window']:,}, {d['max_tokens']:,} tokens of each text at most; "
        "in brackets, over a fixed number of experts at the same mean (log-linear between whole numbers)",
        f"Learners: {d['minutes']:g} minutes of one core each; {d['threads']} thread",
        f"Web text to learn from: sha256 `{d['web_sha256']}`",
    ]
    facts.append(f"Model: {d['model']}")
    command = f"python benchmarks/adaptive.py --model {model} --web calibration.jsonl --text wiki.test.raw --out ..."
    return grid(head, rows) + "\n\n" + measured(file, command, *facts)


def share_or_none(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def cell(row: dict[str, Any] | None, text: str) -> str:
    if row is None:
        return ""
    spread = f" ± {row[text]['deviation']:.3f}" if row["seeds"] > 1 else ""
    return f"{row[text]['ratio']:.3f}{spread} ({row[text]['over_fixed']:.3f})"


def fixed(row: dict[str, Any], shares: list[float]) -> list[str]:
    """A fixed number stands in the column of the budget next to it."""
    nearest = min(shares, key=lambda share: abs(share - row["share"]))
    near = abs(nearest - row["share"]) < 0.1 and row["share"] < 1
    return [
        f"*{row[text]['ratio']:.3f}*" if near and share == nearest else ""
        for text in ("web", "wikitext2")
        for share in shares
    ]


def oracle(model: str) -> str:
    """How much of the gap between a fixed number and the best number for each token a rule closes."""
    file = f"adaptive-{model}/oracle.json"
    d = read(file)
    shares = sorted({row["share"] for row in d["rows"]}, reverse=True)
    found = {(row["method"], row["share"]): row for row in d["rows"]}
    rows = []
    for method, label in RULES.items():
        at = [(share, found[method, share]) for share in shares if (method, share) in found]
        rows += [
            [
                label, f"{share:.0%}", f"{r['experts_per_token']:.2f}", f"{r['loss']:.3f}", f"{r['fixed_loss']:.3f}",
                f"{r['oracle_loss_together']:.3f} to {r['oracle_loss']:.3f}", share_or_none(r["gap_closed"]),
            ]
            for share, r in at
        ]  # fmt: skip
    head = ["", "budget", "experts a token", "loss", "fixed number", "oracle", "gap closed"]
    first = d["rows"][0]
    facts = [
        f"Losses in nats a token, of {first['tokens']:,} tokens of held-out web text in windows of {first['window']}; "
        "the fixed number is interpolated to the rule's mean; the oracle has that mean at most, chosen by next tokens: "
        "its choices at work in one run, and each token's loss from the run of its number",
        f"Model: {d['called']}; seed {first['seed']}; learners {first['minutes']:g} minutes of one core",
    ]
    command = f"python benchmarks/adaptive.py --oracle --model {model} --web calibration.jsonl --text wiki.test.raw"
    return grid(head, rows) + "\n\n" + measured(file, command, *facts)


def adaptive_speed() -> str:
    """Decode speed over the model's own number of experts, beside what the bytes allow."""
    file = "adaptive-speed.json"
    d = read(file)
    rows = [
        [
            r["model"], f"`{r['rule']}`", f"{r['experts_touched']:.1f}", f"{r['speedup']:.2f} x", f"{r['limit']:.2f} x",
            f"{r['share_of_limit']:.0%}",
        ]
        for r in d["rows"]
    ]  # fmt: skip
    head = ["model", "rule", "experts a token", "decode", "limit by bytes", "of it"]
    facts = [
        f"Greedy decoding of {d['new']} tokens after a prompt of {d['prompt']}, {d['rounds']} alternating rounds, "
        f"medians; {d['threads']} threads"
    ]
    return grid(head, rows) + "\n\n" + measured(file, "moesaic benchmark MODEL --select RULE", *facts)
