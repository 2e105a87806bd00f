"""The tables of speed and of what converting costs, for `result_tables.py`."""

from __future__ import annotations

from itertools import chain
from typing import Any

from measured import RESULTS, grid, measured, read, times

STAGES = ("calibrate", "partition", "route", "self_test", "recover", "run_converted")


def shapes(model: str) -> str:
    """Decode speed of each shape, a column for each machine."""
    file = f"quality-{model}/frontier.json"
    speeds = read(file)["speeds"]
    machines = sorted({s["machine"] for s in speeds})
    keys = dict.fromkeys((s["plan"], s["expert_width"]) for s in speeds)
    rows = []
    for plan, width in keys:
        here = {s["machine"]: s for s in speeds if (s["plan"], s["expert_width"]) == (plan, width)}
        cells = [
            f"{here[m]['speedup']:.2f} ({here[m]['speedup_range'][0]:.2f} to {here[m]['speedup_range'][1]:.2f})"
            if m in here
            else ""
            for m in machines
        ]
        rows.append([plan, str(width), *cells, f"{next(iter(here.values()))['limit']:.2f}"])
    s = speeds[0]
    return (
        grid(["shape", "neurons in a group", *machines, "limit"], rows)
        + "\n\n"
        + measured(
            file,
            f"python benchmarks/quality.py {model} ... (the command of its quality table, without --no-speed)",
            f"Protocol: decode of one sequence, {s['dtype']}, {s['threads']} threads, prompt of {s['prompt']} tokens, "
            f"{s['new']} new; medians (and range) of {s['rounds']} alternating rounds; "
            "random weights of these shapes; no seed",
            part="speeds",
        )
    )


def models() -> str:
    """Whole models on two machines, against dense."""
    files = ["runtime-demo-1.5b.json", "runtime-demo-1.5b-intel.json"]
    rows = []
    for found in (read(file)["models"] for file in files):
        machine = next(iter(found.values()))["machine"].split(",")[0]
        runs = [("decode", b) for b in next(iter(found.values()))["decode"]] + [("prefill", "512")]
        for run, size in runs:
            label = f"decode, {size} at once" if run == "decode" else f"prefill of {size}"
            cells = [m[run].get(size) for m in found.values()]
            pairs = [[times(c["speedup"]), f"{c['share_of_limit']:.0%}"] if c else ["", ""] for c in cells]
            rows.append([machine, label, *chain(*pairs)])
    named = [f"{m['ffn_active']:.0%} active ({plan})" for plan, m in read(files[0])["models"].items()]
    head = ["machine", "work", *chain(*([name, "of the limit"] for name in named))]
    first = next(iter(read(files[0])["models"].values()))
    return (
        grid(head, rows)
        + "\n\n"
        + measured(
            files,
            "python benchmarks/runtime.py models demo-1.5b out25 out50 out75 --out benchmarks/results",
            f"Protocol: {first['protocol']}; {first['dtype']}, {first['threads']} threads; random prompts, seed 0",
        )
    )


def blocks() -> str:
    d = read("runtime-blocks-cpu.json")
    rows = [
        [
            f"`{r['shape']}`, {r['plan']}",
            str(r["tokens"]),
            f"{r['microseconds']['dense']:,.0f}",
            f"{r['microseconds']['moesaic']:,.0f}",
            times(r["speedup"]),
            f"{r['share_of_limit']:.0%}",
            times(r["over_cmoes_loop"]),
            f"{r['router_share']:.1%}",
        ]
        for r in d["rows"]
    ]
    head = [
        "block",
        "tokens",
        "dense, µs",
        "ours, µs",
        "speed-up",
        "of the limit",
        "over CMoE's loop",
        "router's share",
    ]
    return (
        grid(head, rows)
        + "\n\n"
        + measured(
            "runtime-blocks-cpu.json",
            "python benchmarks/runtime.py blocks --out benchmarks/results",
            f"Protocol: FFN blocks with random weights (seed 0), medians of {d['rounds']} alternating rounds, bfloat16",
        )
    )


def products() -> str:
    d = read("runtime-products-cpu.json")
    rows = [
        [
            str(r["rows"]),
            " x ".join(map(str, r["weight"])),
            f"{r['microseconds']:,.0f}",
            f"{r['gigabytes_per_s']:.1f}",
            f"{r['gigaflops_per_s']:.0f}",
        ]
        for r in d["rows"]
    ]
    return (
        grid(["rows", "weight", "µs", "GB/s", "GFLOP/s"], rows)
        + "\n\n"
        + measured(
            "runtime-products-cpu.json",
            "python benchmarks/runtime.py products --out benchmarks/results",
            f"Protocol: single products, bfloat16, medians of {d['rounds']} rounds",
        )
    )


def demo() -> str:
    d = read("demo.json")
    rows = [
        [
            "active parameters",
            f"{d['dense_parameters'] / 1e6:.0f} M",
            f"{d['active_parameters'] / 1e6:.0f} M",
            f"{d['active_parameters'] / d['dense_parameters']:.2f}",
            "",
        ],
        [
            "perplexity",
            f"{d['perplexity_dense']:.2f}",
            f"{d['perplexity']:.2f}",
            f"{d['perplexity'] / d['perplexity_dense']:.2f}",
            "",
        ],
    ]
    for label, run in (
        ("decode, one sequence, tokens/s", d["decode"]["1"]),
        ("prefill of 512, tokens/s", d["prefill"]["512"]),
    ):
        rows.append(
            [
                label,
                f"{run['dense_tokens_per_s']:,.1f}",
                f"{run['tokens_per_s']:,.1f}",
                f"{run['speedup']:.2f}",
                f"{run['limit']:.2f}",
            ]
        )
    p = d["perplexity_protocol"]
    head = [f"`{d['model']}`, {d['plan']} (`{d['partition']}`)", "dense", "MoE", "ratio", "limit"]
    return (
        grid(head, rows)
        + "\n\n"
        + measured(
            "demo.json",
            "make demo",
            f"Protocol: perplexity on {p['text']}, {p['tokens']:,} tokens in windows of {p['window']}; "
            f"speed: {d['protocol']}; seed 0",
            f"Conversion: {d['seconds']:.0f} s, {d['peak_rss_bytes'] / 1e9:.1f} GB",
        )
    )


def conversions() -> dict[str, dict[str, Any]]:
    files = sorted(path.name for path in RESULTS.glob("conversion-*.json") if "assignment" not in path.name)
    return {file: read(file) for file in files}


def conversion() -> str:
    found = conversions()
    rows, stages = [], []
    for file, d in found.items():
        name = "`" + file.removeprefix("conversion-").removesuffix(".json") + "`"
        rows.append(
            [
                name,
                d["plan"],
                f"{d['config']['tokens']:,}",
                f"{d['seconds']:,.0f}",
                f"{d['median_seconds_a_layer']:.1f}",
                f"{d['peak_rss_bytes'] / 1e9:.1f} GB",
                d["machine"].split(",")[0],
            ]
        )
        stages.append([name, *(f"{d['median_stage_seconds'][stage]:.1f}" for stage in STAGES)])
    head = ["conversion", "plan", "tokens", "seconds", "a layer", "peak memory", "machine"]
    return "\n\n".join(
        [
            grid(head, rows),
            "Median seconds a layer, by stage:",
            grid(["conversion", *(stage.replace("_", " ") for stage in STAGES)], stages),
            measured(
                list(found),
                "python benchmarks/conversion.py NAME --active 0.25 --tokens N --calibration c4.jsonl "
                "--out benchmarks/results",
                "Protocol: the whole command with its perplexities and load-back check, after downloads; seed 0",
            ),
        ]
    )


def assignment() -> str:
    d = read("conversion-assignment.json")
    rows = [
        ["POT, transport with one sink an expert (ours)", f"{d['seconds']:.2f}", f"{d['optimum']:,.0f}"],
        [
            "scipy, square assignment (CMoE's)",
            f"{d['linear_sum_assignment_seconds']:.1f}",
            f"{d['linear_sum_assignment_optimum']:,.0f}",
        ],
    ]
    return (
        grid([f"{d['neurons']:,} neurons to {d['experts']} experts", "seconds", "cost"], rows)
        + "\n\n"
        + measured(
            "conversion-assignment.json",
            "python benchmarks/conversion.py assignment --out benchmarks/results",
            "Seed 0",
        )
    )
