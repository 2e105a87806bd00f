"""Tables of the expert store and of serving, from `benchmarks/results/store-*` and `serving-*`."""

from __future__ import annotations

from statistics import mean
from typing import Any

from measured import grid, measured, read

Row = dict[str, Any]


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def name_of(d: Row) -> str:
    """A model's name as one would type it."""
    return "MODEL" if "," in d["model"] else str(d["model"])


def rows_of(file: str) -> list[Row]:
    found: list[Row] = read(file)["rows"]
    return found


def policies(name: str) -> str:
    """Hits and milliseconds a token, on demand and with the next layer read early."""
    file = f"store-{name}/policies.json"
    d, found = read(file), rows_of(file)
    shares = sorted({row["share"] for row in found if "share" in row})
    names = list(dict.fromkeys(row["policy"] for row in found if "prefetch" in row))
    lines = []
    for policy in names:
        for early in (False, True):
            cells = [f"`{policy}`" + (", next layer early" if early else "")]
            for share in shares:
                row = next(
                    r for r in found if (r["policy"], r.get("share"), r.get("prefetch")) == (policy, share, early)
                )
                cells.append(f"{percent(row['hit_ratio'])} %, {1e3 * row['seconds_per_token']:.0f} ms")
            lines.append(cells)
    best = ["`belady`, all known"]
    best += [
        f"{percent(r['hit_ratio'])} %"
        for share in shares
        for r in found
        if (r["policy"], r.get("share")) == ("belady", share)
    ]
    whole = {row["policy"]: row["seconds_per_token"] for row in found if "share" not in row}
    exact = [abs(r["hit_ratio"] - r["replayed_hit_ratio"]) for r in found if r.get("prefetch") is False]
    times = [r["predicted_seconds"] / r["seconds_per_token"] - 1 for r in found if r.get("prefetch") is False]
    saved = [
        1 - early["seconds_per_token"] / r["seconds_per_token"]
        for r in found
        for early in found
        if r.get("prefetch") is False
        and early.get("prefetch")
        and (r["policy"], r["share"]) == (early["policy"], early["share"])
    ]
    return (
        grid(["policy", *(f"{share:.0%} fit" for share in shares)], [*lines, best])
        + "\n\n"
        + measured(
            file,
            f"python benchmarks/expert_store.py policies --model {name_of(d)} --prompts instruct.jsonl "
            f"--requests {d['requests']} --new {d['new']} --bandwidth {d['bandwidth']:g} --out "
            f"benchmarks/results/store-{name}",
            f"Milliseconds a token, prompts included, one request at a time, one thread; all in memory "
            f"{1e3 * whole['all in memory']:.0f} ms, by the store with all there "
            f"{1e3 * whole['store, all in memory']:.0f} ms",
            f"Experts come at {d['bandwidth'] / 1e6:.0f} MB/s and {1e3 * d['latency_seconds']:g} ms each; "
            "texts are those of "
            f"the model in memory in {sum(r['same_text'] for r in found if 'same_text' in r)} of "
            f"{sum('same_text' in r for r in found)} rows",
            f"Hits on demand against the simulator's: {100 * max(exact):.2f} points apart at most; times "
            f"{100 * min(times):+.0f} to {100 * max(times):+.0f} %",
            f"Reading a layer early saves {100 * min(saved):.0f} to {100 * max(saved):.0f} % of a token's time "
            f"(mean {100 * mean(saved):.0f} %)",
            f"Prompts: sha256 `{d['prompts_sha256'][:16]}`",
        )
    )


def queue(name: str) -> str:
    """Hits of a model that is routed ahead, with requests waiting."""
    file = f"store-{name}/queue.json"
    d, lines = read(file), []
    for row in rows_of(file):
        lines.append([
            str(row["requests"]), f"{row['share']:.0%}",
            *(percent(row[key]) for key in ("random", "lru", "lru:per_layer=True", "look-ahead", "belady")),
            f"{row['gap_closed']:.0%}",
        ])  # fmt: skip
    head = ["requests", "fit", "`random`", "`lru`", "`lru:per_layer=True`", "`look-ahead`", "`belady`", "gap closed"]
    apart = max(abs(r["look-ahead"] - r["measured_look_ahead"]) for r in rows_of(file))
    return (
        grid(head, lines)
        + "\n\n"
        + measured(
            file,
            "python benchmarks/expert_store.py queue --model MODEL --prompts instruct.jsonl --out "
            f"benchmarks/results/store-{name}",
            f"Model: {d['model']}",
            f"Requests decode in turn, {d['new']} tokens each, after prompts of 64 tokens; the routes of all "
            "are known. "
            "Gap closed: of the way from `lru:per_layer=True` to `belady`",
            f"The store itself had `look-ahead`'s hits within {100 * apart:.1f} points of these, which are replayed",
        )
    )


def bias(name: str) -> str:
    """Misses saved and perplexity lost by preferring what is in memory."""
    file = f"store-{name}/bias.json"
    d, found = read(file), rows_of(file)
    shares, biases = (sorted({row[key] for row in found}) for key in ("share", "bias"))
    at = {(row["share"], row["bias"]): row for row in found}
    lines = []
    for lift in biases:
        cells = [f"{lift:g}"]
        for share in shares:
            row, plain = at[share, lift], at[share, 0.0]
            cells.append(f"{100 * (row['misses'] / plain['misses'] - 1):+.0f} %")
            cells.append(f"{100 * (row['perplexity'] / plain['perplexity'] - 1):+.1f} %")
        lines.append(cells)
    head = ["`--cache-bias`", *(part for s in shares for part in (f"misses, {s:.0%} fit", f"perplexity, {s:.0%} fit"))]
    return (
        grid(head, lines)
        + "\n\n"
        + measured(
            file,
            f"python benchmarks/expert_store.py bias --model {name_of(d)} --text c4.jsonl --out "
            f"benchmarks/results/store-{name}",
            f"{d['tokens']:,} tokens of web text (sha256 `{d['text_sha256'][:16]}`), read one at a time in "
            "windows of 256, "
            "`lru`, nothing read early",
        )
    )


def memory(name: str) -> str:
    """Resident set and time to the first token."""
    file = f"store-{name}/memory.json"
    d, lines = read(file), []
    for row in rows_of(file):
        grown = row["rss"] - row["rss_before"]
        wanted = row["weights_in_memory"] + row["expert_memory"]
        lines.append([
            row["expert_memory_option"], f"{row['expert_memory'] / 1e6:.0f}", f"{wanted / 1e6:.0f}",
            f"{grown / 1e6:.0f}",
            f"{row['load_seconds'] + row['first_token_seconds']:.1f} s", f"{row['tokens_per_s']:.1f}",
        ])  # fmt: skip
    head = [
        "`--expert-memory`",
        "experts, MB",
        "with the rest, MB",
        "resident set grew, MB",
        "first token after",
        "tokens/s",
    ]
    return (
        grid(head, lines)
        + "\n\n"
        + measured(
            file,
            f"python benchmarks/expert_store.py memory --model {name_of(d)} --out benchmarks/results/store-{name}",
            "Each in a process of its own; the resident set is compared with that after importing moesaic; 33 tokens; "
            "first token: from the call of `load`; files are in the page cache",
        )
    )


def limited() -> str:
    """Tokens a second in a container, beside llama.cpp."""
    file = "store-limited.json"
    d, found = read(file), rows_of(file)
    limits = list(dict.fromkeys(row["limit_mb"] for row in found))
    engines = list(dict.fromkeys(row["engine"] for row in found))
    lines = []
    for engine in engines:
        cells = [engine]
        for limit in limits:
            row = next((r for r in found if (r["engine"], r["limit_mb"]) == (engine, limit)), None)
            cells.append("" if row is None else f"{row['decode']:.1f}" if "decode" in row else "fails")
        lines.append(cells)
    head = ["decode, tokens/s", *(f"{limit} MB" if limit else "no limit" for limit in limits)]
    return (
        grid(head, lines)
        + "\n\n"
        + measured(
            file,
            "python benchmarks/limited_memory.py --model MODEL --gguf MODEL.gguf --limits "
            f"{' '.join(map(str, limits))} --llama-cpp .venv-engines/llama.cpp/bin/python --out "
            f"benchmarks/results/{file}",
            f"Model: {d['model']}; {d['checkpoint_bytes'] / 1e6:.0f} MB, as GGUF (f16) {d['gguf_bytes'] / 1e6:.0f} MB; "
            f"{d['threads']} thread",
            "The limit is a control group's, page cache included; caches are dropped before each run; "
            "*fails*: killed, or "
            "not done in ten minutes",
        )
    )


def schedulers(name: str) -> str:
    """Latency and distinct experts by scheduler and load."""
    file = f"serving-{name}/schedulers.json"
    d, found = read(file), rows_of(file)
    loads = sorted({row["load"] for row in found if not isinstance(row["load"], str)})
    names = list(dict.fromkeys(row["scheduler"] for row in found))
    lines = []
    for load in loads:
        for scheduler in names:
            rows = [row for row in found if (row["scheduler"], row["load"]) == (scheduler, load)]
            if rows:
                keys = ("mean_latency", "p95_latency")
                lines.append([
                    f"{load:g}", f"`{scheduler}`", *(f"{1e3 * mean(row[key] for row in rows):.0f}" for key in keys),
                    f"{max(row['largest_over_median'] for row in rows):.1f}",
                    f"{mean(row['distinct_experts'] for row in rows):.2f}",
                    percent(mean(row["hit_ratio"] for row in rows)), f"{mean(row['tokens_per_s'] for row in rows):.1f}",
                ])  # fmt: skip
    head = ["load", "scheduler", "ms a token", "p95", "worst / median", "distinct experts", "hits, %", "tokens/s"]
    seeds = sorted({row["seed"] for row in found})
    return (
        grid(head, lines)
        + "\n\n"
        + measured(
            file,
            "python benchmarks/serving.py schedulers --model MODEL --prompts instruct.jsonl --domains "
            "domains --requests "
            f"{d['requests']} --new {d['new']} --max-batch-tokens {d['max_batch_tokens']} --bandwidth "
            f"{d['bandwidth']:g} "
            f"--out benchmarks/results/serving-{name}",
            f"Model: {d['model']}; {d['requests']} requests of {d['new']} tokens, seeds {seeds}; batches of "
            f"{d['max_batch_tokens']} tokens; {d['expert_memory']} of the experts fit, {d['bandwidth'] / 1e6:.0f} MB/s",
            "Load: arrivals a second over what the server answers when all come at once; distinct experts: "
            "in a batch and layer",
        )
    )


def load(name: str) -> str:
    """Many clients at once."""
    file = f"serving-{name}/load.json"
    d, lines = read(file), []
    for row in rows_of(file):
        lines.append([
            f"`{row['scheduler']}`", str(row["requests"]), str(row["lost"]), str(row["same_text"]),
            f"{row['tokens_per_s']:.0f}", f"{row['refused_at_twice_as_many']} (429)",
            f"{row['same_text_after']} of 8", str(row["places_held_by_clients_gone"]),
        ])  # fmt: skip
    head = [
        "scheduler",
        "at once",
        "lost",
        "same text",
        "tokens/s",
        "refused of twice as many",
        "right after it",
        "places held by clients gone",
    ]
    return (
        grid(head, lines)
        + "\n\n"
        + measured(
            file,
            f"python benchmarks/serving.py load --model {name_of(d)} --prompts instruct.jsonl --out "
            f"benchmarks/results/serving-{name}",
            f"Answers of {d['new']} tokens in float32, with {d['expert_memory']} of the experts in memory; a "
            "queue as long as "
            "the requests at once, then twice as many; 16 clients that leave after the first piece",
        )
    )
