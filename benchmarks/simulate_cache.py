"""Cache policies on route traces: hit ratio, bytes and predicted time for each policy, capacity and look-ahead.

    moesaic inspect tiny-moe --trace routes.csv.gz --requests 24 --prompt 48 --new 100
    python benchmarks/simulate_cache.py --trace routes.csv.gz --out benchmarks/results/cache-tiny-moe.json
    python benchmarks/simulate_cache.py --draw qwen3-30b qwen3-235b llama-70b --out benchmarks/results/cache-shapes.json

`--trace` takes files of `moesaic inspect --trace` and of BigMoeOnEdge's `--route-trace`. `--draw` takes shapes of large
models: their routes are drawn so that they repeat as measured ones do (`moesaic.store.synthetic`), in `--layers` layers
at most, as a hit ratio depends on the share of experts that fits and not on how many layers there are; bytes and times
are those of all layers. With `--at-once` more than 1 requests decode together, arriving at random (Poisson).

A depth is what the policy knows of the future: 0, `layer` (the next layer step), or so many tokens (forward passes), as
a model that routes ahead of its layers knows them of its queue. Times are `moesaic.store.timing`'s for one link and one
processor: experts and dense layers take their bytes over `--memory`, loads `--latency` and their bytes over
`--bandwidth`. On demand: all wait for the last load. Pipelined: experts run as they come. Ahead: loads start a layer
early for the `--foreseen` share of what misses. Resumable: a row that is there is not simulated again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

from moesaic import StoreOptions, machine, registry
from moesaic.errors import InputError
from moesaic.store.policies.base import CacheSize
from moesaic.store.routes import DECODE, Pass, layer_steps
from moesaic.store.synthetic import Routes
from moesaic.store.timing import Link, StepTimes, misses_of, time_of
from moesaic.store.traces import read_trace
from moesaic.store.traffic import poisson, together

GIGA = 1e9


@dataclass(frozen=True)
class Shape:
    """What of a model the time depends on."""

    layers: int
    experts: int
    used: int
    expert_parameters: int
    dense: float
    """Parameters that every token runs, beside routed experts."""


SHAPES = {
    "mixtral-8x7b": Shape(32, 8, 2, 3 * 4096 * 14336, 1.6e9),
    "qwen3-30b": Shape(48, 128, 8, 3 * 2048 * 768, 1.5e9),
    "gpt-oss-120b": Shape(36, 128, 4, 3 * 2880 * 2880, 2.1e9),
    "qwen3-235b": Shape(94, 128, 8, 3 * 4096 * 1536, 7.8e9),
    "llama-70b": Shape(80, 64, 16, 3 * 8192 * 448, 14.2e9),  # converted to S0A16E64
}
POLICIES = ("random", "lru", "lru:per_layer=True", "lfu", "static:learn=1024")
DEPTHS = ("0", "layer", "1", "4")
CAPACITIES = (5, 10, 15, 20, 30, 50, 70)
LINES = {
    "lru, 0": ("LRU", "#9a9aa2", "-"), "lru:per_layer=True, 0": ("LRU per layer", "#6b6b75", "--"),
    "lfu, 0": ("LFU", "#c9a227", "-"), "look-ahead, 0": ("look-ahead, nothing known", "#61a5c2", "-"),
    "look-ahead, 4": ("look-ahead, 4 tokens known", "#01497c", "-"), "belady, all": ("Belady", "#1b1b1f", ":"),
}  # fmt: skip
"""Of the chart, by policy and depth."""


@dataclass(frozen=True)
class Workload:
    """One trace, and what the times are made of."""

    name: str
    steps: list
    layers: int
    """In the trace."""
    experts: int
    expert_bytes: int
    all_layers: int
    """Of the model."""
    dense_bytes: float
    about: dict


def main() -> None:
    """Simulate what is missing, a row at a time, then print the tables and draw the chart."""
    given = options()
    found = json.loads(given.out.read_text()) if given.out.is_file() else {"rows": [], "traces": {}}
    settings = {
        key: getattr(given, key)
        for key in ("bandwidth", "latency", "memory", "foreseen", "at_once", "rate", "seed", "in_flight")
    }
    if found.setdefault("settings", settings) != settings:
        raise SystemExit(f"{given.out} is of other settings: {found['settings']}; give another --out")
    found |= {"versions": machine.versions(), "machine": machine.machine()}
    for load in workloads(given):
        found["traces"][load.name] = load.about
        for policy, depth in combinations(given):
            for capacity in given.capacities:
                key = {"trace": load.name, "policy": policy, "depth": depth, "capacity": capacity}
                if not any(key.items() <= row.items() for row in found["rows"]):
                    found["rows"].append(key | simulate(load, policy, depth, capacity, given))
                    given.out.write_text(written(found))
        print(table(found["rows"], load.name, given.capacities), flush=True)
    if given.plot:
        draw(found["rows"], list(found["traces"]), given.plot)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, nargs="+", default=[])
    parser.add_argument("--draw", nargs="+", choices=SHAPES, default=[])
    parser.add_argument("--policies", nargs="+", default=POLICIES, help="beside look-ahead and belady")
    parser.add_argument("--depths", nargs="+", default=DEPTHS, help="of look-ahead: 0, layer, or tokens")
    parser.add_argument("--capacities", type=float, nargs="+", default=CAPACITIES, help="%% of all experts")
    parser.add_argument("--requests", type=int, default=8, help="that are drawn")
    parser.add_argument("--tokens", type=int, default=64, help="of each drawn request")
    parser.add_argument("--layers", type=int, default=8, help="that are drawn, at most")
    parser.add_argument("--at-once", type=int, default=1, help="requests that decode together")
    parser.add_argument("--rate", type=float, default=0.1, help="requests that arrive in a forward pass")
    parser.add_argument("--bandwidth", type=float, default=3.0, help="GB/s from the slow tier")
    parser.add_argument("--latency", type=float, default=1e-4, help="seconds of each load")
    parser.add_argument("--memory", type=float, default=20.0, help="GB/s of the fast tier")
    parser.add_argument("--bytes", type=float, default=2.0, help="a parameter of drawn shapes; 0.5 is 4 bits")
    parser.add_argument("--foreseen", type=float, default=0.9, help="share of the misses known a layer early")
    parser.add_argument(
        "--in-flight",
        type=int,
        default=StoreOptions.readers,
        help="missing experts that load at once, as the store's do",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help=".png of the hit ratios")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def workloads(given: argparse.Namespace) -> list[Workload]:
    """Read and draw the traces."""
    found = []
    for path in given.trace:
        trace = read_trace(path)
        requests = [[p for p in passes if p.phase == DECODE] for passes in trace.passes()]
        about = {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "requests": len(requests), "decoded": True,
            "tokens": sum(map(len, requests)), "layers": trace.num_layers, "experts": trace.num_experts,
        }  # fmt: skip
        size = trace.expert_bytes or 0
        found.append(Workload(
            trace.model or path.name, batched(requests, given), trace.num_layers, trace.num_experts, size,
            trace.num_layers, 0.0, about | {"expert_bytes": size},
        ))  # fmt: skip
    for name in given.draw:
        shape = SHAPES[name]
        drawn = Routes(
            num_layers=min(given.layers, shape.layers), num_experts=shape.experts, experts_per_token=shape.used,
            seed=given.seed,
        )  # fmt: skip
        requests = [drawn.request(given.tokens, number) for number in range(given.requests)]
        size = int(shape.expert_parameters * given.bytes)
        about = {
            "drawn": True, "requests": given.requests, "tokens": given.requests * given.tokens, "expert_bytes": size,
            "layers": shape.layers, "drawn_layers": drawn.num_layers, "experts": shape.experts, "used": shape.used,
        }  # fmt: skip
        found.append(Workload(
            name, batched(requests, given), drawn.num_layers, shape.experts, size, shape.layers,
            shape.dense * given.bytes, about,
        ))  # fmt: skip
    return found


def batched(requests: list[list[Pass]], given: argparse.Namespace) -> list:
    """Join requests: one after the other, or together as they arrive."""
    if given.at_once == 1:
        return layer_steps(each for request in requests for each in request)
    return layer_steps(together(requests, given.at_once, poisson(len(requests), given.rate, given.seed)))


def combinations(given: argparse.Namespace) -> list[tuple[str, str]]:
    """Pair policies with depths: the others know nothing, Belady all."""
    return [*((p, "0") for p in given.policies), *(("look-ahead", d) for d in given.depths), ("belady", "all")]


def simulate(load: Workload, policy: str, depth: str, capacity: float, given: argparse.Namespace) -> dict:
    """Replay one trace; a policy that cannot work with so little room gives no numbers."""
    size = CacheSize(max(1, round(capacity / 100 * load.layers * load.experts)), load.layers, load.experts)
    steps = {"all": 0, "layer": 1}.get(depth) if not depth.isdigit() else int(depth) * load.layers
    try:
        misses = misses_of(load.steps, registry.build("cache", policy), size, steps or 0, given.in_flight)
    except InputError as error:
        return {"impossible": str(error)}
    link = Link(given.bandwidth * GIGA, given.latency)
    times = StepTimes(
        load=link.seconds(load.expert_bytes), expert=load.expert_bytes / given.memory / GIGA,
        layer=load.dense_bytes / load.all_layers / given.memory / GIGA, pipelined=False,
    )  # fmt: skip
    ways = {
        "on_demand": times, "pipelined": replace(times, pipelined=True, in_flight=given.in_flight),
        "ahead": replace(times, pipelined=True, in_flight=given.in_flight, ahead=1, foreseen=given.foreseen),
    }  # fmt: skip
    timed = {way: time_of(load.steps, misses, each) for way, each in ways.items()}
    first, whole = timed["on_demand"], load.all_layers / load.layers
    return {
        "slots": size.capacity, "hits": first.hits, "misses": first.misses, "hit_ratio": round(first.hit_ratio, 5),
        "bytes_per_pass": round(first.misses * load.expert_bytes * whole / first.passes),
        "ms_per_pass": {way: round(1e3 * t.seconds_per_pass * whole, 3) for way, t in timed.items()},
    }  # fmt: skip


def written(found: dict) -> str:
    """Write what was found as JSON, a row a line."""
    head = json.dumps({**found, "rows": []}, indent=1)
    return head.replace('"rows": []', '"rows": [\n' + ",\n".join(map(json.dumps, found["rows"])) + "\n]") + "\n"


def table(rows: list[dict], trace: str, capacities: list[float]) -> str:
    """Show hit ratios in %, and the time of a forward pass in the middle, within 80 columns."""
    middle = sorted(capacities)[len(capacities) // 2]
    lines = [f"{trace}: hits in % by share of experts that fit; at {middle:g} % ms a pass"]
    head = "".join(f"{f'{c:g}%':>6}" for c in capacities)
    lines.append(f"{'policy':<19}{head}{'demand':>7}{'pipe':>6}{'ahead':>6}")
    cells = {(r["policy"], r["depth"], r["capacity"]): r for r in rows if r["trace"] == trace}
    for policy, depth in dict.fromkeys((p, d) for p, d, _ in cells):
        found = [cells.get((policy, depth, c), {}) for c in capacities]
        hits = "".join(f"{100 * r['hit_ratio']:6.1f}" if "hit_ratio" in r else f"{'-':>6}" for r in found)
        ms = cells.get((policy, depth, middle), {}).get("ms_per_pass", {})
        times = "".join(f"{short(ms.get(way)):>{w}}" for way, w in (("on_demand", 7), ("pipelined", 6), ("ahead", 6)))
        name = policy.split(":")[0] + ("/layer" if "per_layer" in policy else "")
        lines.append(f"{name + (f' {depth}' if name == 'look-ahead' else ''):<19}{hits}{times}")
    return "\n".join(lines) + "\n"


def short(value: float | None) -> str:
    """Write a time in four characters or so."""
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def draw(rows: list[dict], traces: list[str], path: Path) -> None:
    """Draw hit ratio against capacity, a panel for each trace."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 3.6 * len(traces), 4.2))
    for axes, trace in zip(figure.subplots(1, len(traces), sharey=True, squeeze=False)[0], traces, strict=True):
        for line, (label, color, style) in LINES.items():
            policy, depth = line.rsplit(", ", 1)
            found = sorted(
                (r["capacity"], 100 * r["hit_ratio"]) for r in rows
                if (r["trace"], r["policy"], r["depth"]) == (trace, policy, depth) and "hit_ratio" in r
            )  # fmt: skip
            axes.plot(*zip(*found, strict=True), style, color=color, label=label, marker="o", markersize=3)
        axes.set(xlabel="experts that fit (%)", title=trace, xlim=(0, None), ylim=(0, 100))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6ea")
    figure.axes[0].set_ylabel("hits (%)")
    figure.axes[-1].legend(frameon=False, loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
