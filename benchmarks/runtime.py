"""The experts' runtime: FFN blocks of real shapes against dense ones and other implementations, by number of tokens.

    python benchmarks/runtime.py blocks --out benchmarks/results            # random weights, no model needed
    python benchmarks/runtime.py blocks --device cuda --out ...             # the same on a GPU
    python benchmarks/runtime.py products --out ...                         # single products, by rows and by width
    python benchmarks/runtime.py models demo-1.5b out25 out50 --out ...     # whole models, with `moesaic benchmark`

Blocks: as many copies as no cache holds are run one after the other, as a model's layers are; rounds alternate between
implementations; medians. `limit` is the dense block's weights over those that the chosen experts have (bytes), or for
512 tokens the dense FLOPs over the active ones.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

import moesaic
from moesaic.evaluation.benchmark import benchmark
from moesaic.evaluation.cost import active_block_weights
from moesaic.evaluation.inspect import prompt_tokens
from moesaic.machine import machine, versions
from moesaic.moe.block import Experts, MoE
from moesaic.moe.kernels import experts_forward, lay_down_column_major

SHAPES = {"demo": (896, 4_864), "demo-1.5b": (1_536, 8_960), "llama-2-7b": (4_096, 11_008)}
"""(hidden size, FFN neurons)."""
PLANS = {
    "S1A1E8": (1, 1, 8), "S1A1E4": (1, 1, 4), "S2A2E8": (2, 2, 8), "S3A3E8": (3, 3, 8), "S2A2E16": (2, 2, 16),
    "S16A16E64": (16, 16, 64),
}  # fmt: skip
TOKENS = (1, 8, 32, 512)
CACHES_BYTES = 400e6
"""Weights that are run before any is run again."""


def cmoe_loop(self: Any, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """CMoE's own way (DeepSeek's reference): a loop over experts that have tokens, rows gathered and added back."""
    output_TD = torch.zeros_like(x_TD)
    counts = torch.bincount(index_TK.flatten(), minlength=self.num_experts).tolist()
    for expert in range(self.num_experts):
        if counts[expert] == 0:
            continue
        token, slot = torch.where(index_TK == expert)
        gate_ID, up_ID = self.gate_up_proj[expert].chunk(2)
        h_TI = silu(x_TD[token] @ gate_ID.T) * (x_TD[token] @ up_ID.T)
        output_TD[token] += (h_TI @ self.down_proj[expert].T) * weight_TK[token, slot, None]
    return output_TD


def triton_kernels(*args: Any) -> Tensor:
    """Ours, where Triton is."""
    from moesaic.moe.triton import triton_experts_forward

    return triton_experts_forward(*args)


WAYS: dict[str, Callable[..., Tensor]] = {
    "moesaic": experts_forward,
    "cmoe's loop": cmoe_loop,
    "grouped_mm": grouped_mm_experts_forward,
    "batched_mm": batched_mm_experts_forward,
    "eager": lambda self, *a: Experts.forward.__wrapped__(self, *a),
}


class Dense(nn.Module):
    """The FFN that was converted."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden, width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


def block(hidden: int, width: int, plan: tuple[int, int, int]) -> MoE:
    """A converted FFN of that shape."""
    shared, active, groups = plan
    config: Any = SimpleNamespace(
        hidden_size=hidden, num_experts=groups - shared, num_experts_per_tok=active, router="linear",
        moe_intermediate_size=width // groups, shared_expert_intermediate_size=shared * (width // groups),
        shared_expert_bias=False, selection="top-k", _experts_implementation="eager",
    )  # fmt: skip
    return MoE(config, nn.SiLU())


def many(make: Callable[[], nn.Module], device: str) -> list[nn.Module]:
    """Copies of a block with random bf16 weights, more than caches hold."""
    made: list[nn.Module] = []
    while not made or sum(p.numel() for m in made for p in m.parameters()) * 2 < CACHES_BYTES:
        with torch.device("meta"):
            module = make()
        module = module.to(torch.bfloat16).to_empty(device=device).requires_grad_(False)
        for parameter in module.parameters():
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
        made.append(module)
    return made


def seconds(blocks: Sequence[Callable[[Tensor], Tensor]], x_TD: Tensor, repeats: int) -> float:
    """Of one pass through one block."""
    start = now(x_TD)
    for _ in range(repeats):
        for module in blocks:
            module(x_TD)
    return (now(x_TD) - start) / repeats / len(blocks)


def now(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.inference_mode()
def measure_blocks(shape: str, plan: str, device: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each number of tokens."""
    hidden, width = SHAPES[shape]
    dense = many(lambda: Dense(hidden, width), device)
    converted: list[Any] = many(lambda: block(hidden, width, PLANS[plan]), device)
    loaded = copy.deepcopy(converted)
    for module in loaded if device == "cpu" else ():
        lay_down_column_major(module)  # as `moesaic.load` does
    rows = []
    for tokens in TOKENS:
        x_TD = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
        times: dict[str, list[float]] = {name: [] for name in ("dense", *WAYS, "triton", "router")}
        ways = {name: forward for name, forward in WAYS.items() if name != "batched_mm" or tokens <= 32}
        if device == "cuda":
            ways["triton"] = triton_kernels
        for number in range(rounds + 1):
            found = {"dense": seconds(dense, x_TD, 1)}
            for name, forward in ways.items():
                blocks = loaded if name == "moesaic" else converted
                for module in blocks:
                    module.experts.forward = forward.__get__(module.experts)
                found[name] = seconds(blocks, x_TD, 1)
            gates: Any = [lambda x, m=m: m.gate(x, m.experts) for m in converted]
            found["router"] = seconds(gates, x_TD, 1)
            if number:  # the first warms up
                for name, value in found.items():
                    times[name].append(value)
        medians = {name: statistics.median(values) for name, values in times.items() if values}
        touched = statistics.mean(len(m.gate(x_TD, m.experts)[0].unique()) for m in converted)
        whole = sum(p.numel() for p in dense[0].parameters())
        experts = touched if tokens < 512 else None
        limit = whole / active_block_weights(converted[0], experts)
        rows.append({
            "shape": shape, "plan": plan, "tokens": tokens, "experts_touched": touched,
            "microseconds": {name: round(1e6 * value, 1) for name, value in medians.items()},
            "spread": {name: round((max(v) - min(v)) / statistics.median(v), 3) for name, v in times.items() if v},
            "speedup": medians["dense"] / medians["moesaic"], "limit": limit,
            "share_of_limit": medians["dense"] / medians["moesaic"] / limit,
            "over_cmoes_loop": medians["cmoe's loop"] / medians["moesaic"],
            "router_share": medians["router"] / medians["moesaic"],
        })  # fmt: skip
    return rows


def blocks(a: argparse.Namespace) -> None:
    """Measure all shapes and plans; rows are written as they are found."""
    out = a.out / f"runtime-blocks-{a.device}.json"
    result: dict[str, Any] = {"machine": machine(), "versions": versions(), "rounds": a.rounds, "rows": []}
    for shape in a.shapes:
        for plan in a.plans:
            result["rows"] += measure_blocks(shape, plan, a.device, a.rounds)
            out.write_text(json.dumps(result, indent=2) + "\n")
    grid = Table("shape", "plan", "tokens", "dense µs", *WAYS, "speed-up", "of limit", "over CMoE's", "router")
    for row in result["rows"]:
        found = row["microseconds"]
        ways = [f"{found[name]:.0f}" if name in found else "-" for name in WAYS]
        grid.add_row(
            row["shape"], row["plan"], str(row["tokens"]), f"{found['dense']:.0f}", *ways, f"{row['speedup']:.2f}",
            f"{row['share_of_limit']:.0%}", f"{row['over_cmoes_loop']:.2f}", f"{row['router_share']:.1%}",
        )  # fmt: skip
    Console(width=150).print(grid)


@torch.inference_mode()
def products(a: argparse.Namespace) -> None:
    """`linear` of some rows with weights that no cache holds: what bounds the experts."""
    result: dict[str, Any] = {"machine": machine(), "versions": versions(), "rounds": a.rounds, "rows": []}
    cases = [(1, out, into) for out, into in ((128, 896), (608, 896), (2_240, 1_536), (8_960, 1_536))]
    cases += [(rows, 2_240, 1_536) for rows in (16, 32, 64, 73, 128, 256, 512)]
    for rows, out, into in cases:
        weights = [torch.zeros(out, into, dtype=torch.bfloat16, device=a.device) for _ in range(3)]
        weights *= max(1, int(CACHES_BYTES / (6 * out * into)))
        weights = [weight.clone() for weight in weights]
        x_TD = torch.zeros(rows, into, dtype=torch.bfloat16, device=a.device)
        took = [seconds([partial(linear, weight=weight) for weight in weights], x_TD, 1) for _ in range(a.rounds + 1)]
        median = statistics.median(took[1:])
        result["rows"].append({
            "rows": rows, "weight": [out, into], "microseconds": round(1e6 * median, 1),
            "gigabytes_per_s": round(2 * out * into / median / 1e9, 1),
            "gigaflops_per_s": round(2 * rows * out * into / median / 1e9, 1),
        })  # fmt: skip
    (a.out / f"runtime-products-{a.device}.json").write_text(json.dumps(result, indent=2) + "\n")
    Console().print_json(data=result["rows"])


def models(a: argparse.Namespace) -> None:
    """Whole models, each against the dense one in a process of its own order; resumable by folder."""
    out = a.out / f"runtime-{Path(a.dense).name}.json"
    result: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {"dense": a.dense, "models": {}}
    for folder in a.converted:
        loaded, tokenizer = moesaic.load(folder, device=a.device)
        dense, _ = moesaic.load(a.dense, device=a.device)
        facts = moesaic.inspect(folder).metrics
        found = benchmark(
            loaded, dense, prompt_tokens(tokenizer, 512, max(a.batch)), new=a.new, batches=a.batch, rounds=a.rounds
        )
        result["models"][facts.plan] = {"ffn_active": facts.ffn_active} | found.to_dict()
        out.write_text(json.dumps(result, indent=2) + "\n")
        del loaded, dense


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("blocks")
    verb.set_defaults(run=blocks)
    verb.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    verb.add_argument("--plans", nargs="+", default=list(PLANS), choices=PLANS)
    verb.add_argument("--rounds", type=int, default=7)
    single = verbs.add_parser("products")
    single.set_defaults(run=products)
    single.add_argument("--rounds", type=int, default=5)
    other = verbs.add_parser("models")
    other.set_defaults(run=models)
    other.add_argument("dense")
    other.add_argument("converted", nargs="+", type=Path)
    other.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    other.add_argument("--new", type=int, default=24)
    other.add_argument("--rounds", type=int, default=5)
    for part in (verb, single, other):
        part.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        part.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    a = parser.parse_args()
    a.run(a)
