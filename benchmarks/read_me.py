"""One router ahead of the model against a router in each layer: quality after conversion and tuning, and its cost.

    python benchmarks/read_me.py --model tiny --out benchmarks/results/read-me-tiny [--text wiki.test.raw] \\
        [--domains a.jsonl b.jsonl ...] [--active 0.5] [--groups 1 4 0] [--steps 200] [--seeds 0 1 2]

Lines: `dense`; `layer-wise` (coactivation and its linear router); `paths-linear` (our one cut for all layers under a
router in each layer); `read-me` (domains as the paper has them: copied, no recovery, its own teacher);
`read-me-recovered` (the same in closed form); `ahead-G` (paths under one router for G groups of layers; 0: one a
layer) and `ahead-G-importance` (with our teacher); `ahead-coactivation` (a cut of its own in each layer, a decision for
each). The domains are calibration files, six bundled ones by default. `oracle` is a line's best single path: the
experts of largest true norm, summed over all layers, the same in each. Each line is then tuned for `--steps` steps on
equal tokens: `read-me` where the router is ahead, `full` where it is not.
Resumable: a finished row is a file in `<out>/rows`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

import moesaic
from moesaic import ConvertConfig, FinetuneConfig
from moesaic.calibration.text import bundled, read_documents
from moesaic.calibration.windows import token_windows
from moesaic.evaluation.inspect import prompt_tokens
from moesaic.files import write_json
from moesaic.machine import machine, versions
from moesaic.models.moe_block import Routing, find_blocks, routed_by
from moesaic.moe.modeling import moe_blocks
from moesaic.training.data import Samples
from moesaic.training.expert_load import held_out_loss


def lines(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The conversions, by name."""
    active, teacher = arguments.active, f"steps={arguments.router_steps}"
    domains = len({document.domain for document in read_documents(arguments.domains)})
    paper = {"partition": "domains:copied=True", "active": active, "memory_factor": active * domains}
    found = {
        "layer-wise": {"partition": "coactivation", "active": active},
        "paths-linear": {"partition": "paths", "router": "linear", "active": active},
        "read-me": paper | {"router": f"pregate:signed=True,{teacher}", "recovery": "none"},
        "read-me-recovered": paper | {"router": f"pregate:signed=True,{teacher}"},
        "ahead-coactivation": {"partition": "coactivation", "router": f"pregate:groups=0,{teacher}", "active": active},
    }
    for groups in arguments.groups:
        found[f"ahead-{groups}"] = {
            "partition": "paths",
            "router": f"pregate:groups={groups},{teacher}",
            "active": active,
        }
    for groups in arguments.groups:
        router = f"pregate:groups={groups},importance=True,{teacher}"
        found[f"ahead-{groups}-importance"] = {"partition": "paths", "router": router, "active": active}
    return {name: settings for name, settings in found.items() if not arguments.lines or name in arguments.lines}


@torch.no_grad()
def quality(model: PreTrainedModel, tokens_NL: torch.Tensor) -> dict[str, float]:
    """Loss in nats a token, and the share of tokens that keep their experts."""
    samples = Samples(tokens_NL, torch.ones_like(tokens_NL, dtype=torch.bool))
    blocks = moe_blocks(model) if model.config.model_type == "moesaic" else []
    found = held_out_loss(model, blocks, samples, model.device, model.dtype)
    return {"loss": found.total.item() / samples.scored(), "kept_experts": found.kept}


@torch.no_grad()
def oracle(model: PreTrainedModel, tokens_NL: torch.Tensor) -> float:
    """Loss under the best single path: experts by their true norms over that of all, summed over the layers.

    The norms are those of the model's own pass; the path is at work in a second one.
    """
    blocks, total, count = find_blocks(model), 0.0, 0
    for tokens_1L in tokens_NL.split(1):
        norms: list[torch.Tensor] = []

        def see(x_TD: torch.Tensor, routing: Routing, norms: list[torch.Tensor] = norms) -> None:
            block = blocks[len(norms)]
            norm_TE = block.experts.output_norms(x_TD)
            norms.append(norm_TE / norm_TE.square().sum(1, keepdim=True).sqrt().clamp(min=1e-9))

        handles = [block.watch(see) for block in blocks]
        model(tokens_1L, use_cache=False)
        for handle in handles:
            handle.remove()
        best = torch.stack(norms).square().sum(0).topk(blocks[0].num_experts_per_tok, dim=1).indices
        fed = Routing(best, torch.ones_like(best, dtype=model.dtype))
        with routed_by(blocks, [fed] * len(blocks)):
            logits = model(tokens_1L, use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, tokens_1L[0, 1:], reduction="sum").item()
        count += len(logits)
    return total / count


@torch.no_grad()
def router_share(model: PreTrainedModel, prompt: torch.Tensor, new: int = 32) -> dict[str, float] | None:
    """Milliseconds of a decoded token, and of them the router ahead's."""
    network = getattr(model, "pregate", None)
    if network is None:
        return None
    spent: list[float] = []
    forward = network.forward

    def timed(*arguments: Any, **options: Any) -> torch.Tensor:
        start = time.perf_counter()
        found = forward(*arguments, **options)
        spent.append(time.perf_counter() - start)
        return found

    cache, whole, token = DynamicCache(config=model.config), [], prompt
    network.forward = timed
    try:
        for _ in range(new):
            start = time.perf_counter()
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            whole.append(time.perf_counter() - start)
    finally:
        del network.forward
    own, all_of_it = (1_000 * statistics.median(part[2:]) for part in (spent, whole))
    return {"token_ms": all_of_it, "router_ms": own, "share": own / all_of_it}


def converted_row(arguments: argparse.Namespace, name: str, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Convert, measure, tune on equal tokens, measure again."""
    folder = arguments.out / "models" / f"{name}-{seed}"
    config = ConvertConfig(
        calibration=tuple(map(str, arguments.domains)), tokens=arguments.tokens, seed=seed, **settings
    )
    result = moesaic.convert(arguments.model, folder, config, overwrite=True, force=True)
    model, tokenizer = moesaic.load(folder)
    tokens_NL = token_windows(held_out(arguments), tokenizer, arguments.held_out, arguments.window)
    row: dict[str, Any] = {
        "line": name, "seed": seed, "plan": result.plan, "expert_width": result.expert_width,
        "ffn_active": result.ffn_active, "memory_factor": result.memory_factor, "seconds": result.seconds,
        "total_parameters": result.total_parameters, "router": result.router.to_dict() if result.router else None,
        "converted": quality(model, tokens_NL), "oracle": oracle(model, tokens_NL),
        "time": router_share(model, prompt_tokens(tokenizer, min(256, arguments.window))),
    }  # fmt: skip
    if arguments.steps:
        ahead = getattr(model, "pregate", None) is not None
        method = f"read-me:rounds={arguments.rounds}" if ahead else "full:"
        tuning = FinetuneConfig(
            method=method.removesuffix(":"), steps=arguments.steps, window=arguments.window, batch=arguments.batch,
            seed=seed, teacher=arguments.model, learning_rate=arguments.learning_rate, device="auto",
        )  # fmt: skip
        tuned = moesaic.finetune(folder, arguments.out / "models" / f"{name}-{seed}-tuned", tuning, overwrite=True)
        model, _ = moesaic.load(arguments.out / "models" / f"{name}-{seed}-tuned")
        row["tuned"] = quality(model, tokens_NL) | {"tokens": tuned.tokens, "seconds": tuned.seconds}
        row["oracle_tuned"] = oracle(model, tokens_NL)
    return row


def held_out(arguments: argparse.Namespace) -> Any:
    """The text that is measured on."""
    return read_documents([str(arguments.text)]) if arguments.text else bundled("heldout")


def dense_row(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the dense model."""
    model, tokenizer = moesaic.load(arguments.model)
    tokens_NL = token_windows(held_out(arguments), tokenizer, arguments.held_out, arguments.window)
    return {"line": "dense", "seed": 0, "converted": quality(model, tokens_NL)}


def summary(out: Path) -> list[dict[str, Any]]:
    """Ratios of perplexity to the dense model's, means over seeds."""
    rows = [json.loads(path.read_text()) for path in sorted((out / "rows").glob("*.json"))]
    dense = next(row for row in rows if row["line"] == "dense")["converted"]["loss"]
    table = []
    for name in dict.fromkeys(row["line"] for row in rows if row["line"] != "dense"):
        found = [row for row in rows if row["line"] == name]

        def ratio(read: Any, found: list[dict[str, Any]] = found) -> float | None:
            losses = [read(row) for row in found if read(row) is not None]
            return statistics.fmean(2.718281828459045 ** (loss - dense) for loss in losses) if losses else None

        table.append(
            {
                "line": name, "seeds": len(found), "plan": found[0]["plan"], "memory_factor": found[0]["memory_factor"],
                "converted": ratio(lambda row: row["converted"]["loss"]),
                "tuned": ratio(lambda row: row.get("tuned", {}).get("loss")),
                "oracle": ratio(lambda row: row["oracle"]), "oracle_tuned": ratio(lambda row: row.get("oracle_tuned")),
                "kept_experts": statistics.fmean(row["converted"]["kept_experts"] for row in found),
                "router_share": found[0]["time"] and statistics.fmean(row["time"]["share"] for row in found),
            }
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="raw text to measure on; the bundled held-out text otherwise")
    parser.add_argument("--domains", nargs="+", default=[], help="calibration files, one a domain")
    parser.add_argument("--active", type=float, default=0.5)
    parser.add_argument("--groups", nargs="+", type=int, default=[1, 4, 0])
    parser.add_argument("--lines", nargs="+", default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--held-out", type=int, default=16_384)
    parser.add_argument("--router-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=0, help="of tuning; 0: none")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    (arguments.out / "rows").mkdir(parents=True, exist_ok=True)
    path = arguments.out / "rows" / "dense.json"
    if not path.is_file():
        write_json(path, dense_row(arguments))
    for seed, (name, settings) in itertools.product(arguments.seeds, lines(arguments).items()):
        path = arguments.out / "rows" / f"{name}-{seed}.json"
        if not path.is_file():
            write_json(path, converted_row(arguments, name, settings, seed))
            row = json.loads(path.read_text())
            print(name, seed, row["converted"], row.get("tuned"), row["oracle"], flush=True)
    facts = {
        "model": arguments.model, "machine": machine(), "versions": versions(), "threads": torch.get_num_threads(),
        "tokens": arguments.tokens, "window": arguments.window, "steps": arguments.steps, "batch": arguments.batch,
    }  # fmt: skip
    write_json(arguments.out / "read_me.json", facts | {"summary": summary(arguments.out)})
    for line in summary(arguments.out):
        print(json.dumps(line))


if __name__ == "__main__":
    main()
