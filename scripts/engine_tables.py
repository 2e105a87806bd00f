"""The tables of engines, for `result_tables.py`: conversions, experts by width, and quantisation."""

from __future__ import annotations

from measured import RESULTS, grid, measured, read, times


def engines() -> str:
    d = read("engines-demo.json")
    halves = {(r["engine"], r["type"], r["threads"]): {} for r in d["rows"]}
    for r in d["rows"]:
        halves[r["engine"], r["type"], r["threads"]][r["ffn_active"]] = r
    runs = [("decode", 0.5), ("decode", 0.25), ("prefill", 0.5), ("prefill", 0.25)]
    rows = [
        [
            {"vllm": "vLLM on CPU"}.get(engine, engine),
            f"{kind}, {threads}",
            *(times(found[share][run]["speedup"]) for run, share in runs),
        ]
        for (engine, kind, threads), found in halves.items()
    ]
    first = next(iter(halves.values()))
    rows.append(["*limit by bytes or FLOPs*", "", *(f"*{times(first[share][run]['limit'])}*" for run, share in runs)])
    shapes = ", ".join(f"{r['plan']} ({r['ffn_active']:.0%})" for r in first.values())
    head = ["engine", "type, threads", "decode, 50% active", "25%", f"prefill of {d['prompt']}, 50%", "25%"]
    return (
        grid(head, rows)
        + "\n\n"
        + measured(
            "engines-demo.json",
            "python benchmarks/engines.py demo out50 out25 --outtypes f16 q8_0 --out FILE",
            "Protocol: alternating runs of dense and converted, medians; "
            f"prompts of {d['prompt']} random tokens, {d['new']} new; shapes {shapes}, `specialists`",
            "Engines: " + ", ".join(dict.fromkeys(r["version"] for r in d["rows"])),
        )
    )


def by_width() -> str:
    """What engines reach of their limit, by width of experts."""
    files = sorted(file.name for file in RESULTS.glob("engine-shapes-*.json"))
    rows = []
    for d in (read(file) for file in files):
        for engine, kind, threads, share in dict.fromkeys(
            (r["engine"], r["type"], r["threads"], r["share"]) for r in d["rows"]
        ):
            these = [
                r for r in d["rows"]
                if (r["engine"], r["type"], r["threads"], r["share"]) == (engine, kind, threads, share)
            ]  # fmt: skip
            for r in these:
                cells = [
                    f"{times(r[what]['speedup'])}, {r[what]['share_of_limit']:.0%}" if what in r else ""
                    for what in ("decode", "prefill")
                ]
                label = f"{engine}, {kind}, {threads}"
                rows.append([f"`{d['model']}`", label, f"{r['ffn_active']:.0%}", r["plan"], str(r["width"]), *cells])
    d = read(files[0])
    loads = [r["load_before"] for r in d["rows"]]
    head = ["model", "engine, type, threads", "active", "plan", "neurons in a group", "decode", "prefill"]
    return (
        grid(head, rows)
        + "\n\n"
        + measured(
            files,
            "python benchmarks/engine_shapes.py demo --llama-cpp PYTHON --out FILE",
            "Protocol: speed-up over dense and share of its limit; dense and all shapes of a row's budget take turns, "
            f"medians of the rounds' own ratios; prompts of {d['prompt']} random tokens, {d['new']} new, {d['rounds']} "
            "rounds; random gates",
            f"Speeds are tokens a second of {'/'.join(sorted({r['clock'] for r in d['rows']}))} time; other work ran "
            f"beside it, the load before each batch was {min(loads):.1f} to {max(loads):.1f}",
            "Engines: " + ", ".join(dict.fromkeys(r["version"] for r in d["rows"])),
        )
    )


def quantised() -> str:
    """Dense, siblings and ours in llama.cpp's types."""
    files = sorted(file.name for file in RESULTS.glob("quantised-*.json"))
    rows = []
    for d in map(read, files):
        for r in d["rows"]:
            name = f"{r['plan']}, {r['ffn_active']:.0%} active" if r["kind"] == "converted" else f"`{r['model']}`"
            rows.append([
                name, r["outtype"], f"{r['bytes'] / 1e6:,.0f}", f"{r['perplexity']:.2f}",
                f"{r['perplexity_ratio']:.3f}",
                f"{r['decode']['tokens_per_s']:.1f}", times(r["decode"]["speedup"]), "yes" if r["on_front"] else "",
            ])  # fmt: skip
    head = ["model", "type", "MB", "perplexity", "over f16", "tokens/s", "over dense in the type", "unbeaten"]
    d = read(files[0])
    return (
        grid(head, rows)
        + "\n\n"
        + measured(
            files,
            "python benchmarks/quantised.py OUT --llama-cpp PYTHON --out FILE",
            f"Protocol: perplexity of the file read back, {d['protocol']}, {d['tokens']:,} tokens, window "
            f"{d['window']}; "
            f"decoding in turns, medians of {d['rounds']} rounds, prompt of {d['prompt']}, {d['new']} new, "
            f"{d['threads']} thread",
            f"Speeds are tokens a second of {d['clock']} time; other work ran beside it, the load before was "
            f"{d['load_before']:.1f}",
            f"Engine: {d['engine']}",
        )
    )
