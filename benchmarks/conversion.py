"""Time and memory of conversion, stage by stage; and the balanced assignment against scipy's on CMoE's square cost.

    python benchmarks/conversion.py demo --active 0.25 --tokens 32768 --calibration c4.jsonl    # or any model
    python benchmarks/conversion.py llama-7b --layers 4     # random weights of Llama-2-7B's shape
    python benchmarks/conversion.py assignment              # POT against linear_sum_assignment (minutes)

Each prints JSON and, with `--out FOLDER`, writes it to `FOLDER/conversion-<name>.json`. On a GPU the same, with
`--device cuda`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from scipy.optimize import linear_sum_assignment
from transformers import AutoTokenizer, LlamaConfig

from moesaic import ConvertConfig, convert
from moesaic.checkpoint.builtin import tiny_folder
from moesaic.machine import machine, versions
from moesaic.partition._assignment import balanced_assignment
from moesaic.partition.cmoe import l1_distance


def conversion(model: str, config: ConvertConfig, keep: Path | None = None) -> dict[str, Any]:
    """Metrics of one conversion with the median seconds a layer of each stage; the result is kept where asked."""
    with tempfile.TemporaryDirectory() as scratch:
        result = convert(model, keep or Path(scratch) / "out", config, force=True)
    stages = {
        stage: round(statistics.median(record.stage_seconds[stage] for record in result.layers), 3)
        for stage in result.layers[0].stage_seconds
    }
    kept = (
        "plan",
        "expert_width",
        "ffn_active",
        "compute_dtype",
        "perplexity_dense",
        "perplexity",
        "seconds",
        "peak_rss_bytes",
    )
    return {
        **{name: getattr(result, name) for name in kept},
        "layers": len(result.layers),
        "median_seconds_a_layer": round(statistics.median(record.seconds for record in result.layers), 2),
        "median_stage_seconds": stages,
        "config": config.model_dump(mode="json"),
    }


def write_random_llama(folder: Path, layers: int) -> int:
    """A checkpoint of Llama-2-7B's shape with random bf16 weights, a shard a layer; the bytes of one layer."""
    config = LlamaConfig(num_hidden_layers=layers, dtype="bfloat16")
    hidden, width = config.hidden_size, config.intermediate_size
    generator = torch.Generator().manual_seed(0)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(0, columns**-0.5, generator=generator)

    weight_map = {}
    for index in range(layers + 1):
        prefix, file = f"model.layers.{index}.", f"model-{index:05d}.safetensors"
        if index == layers:
            tensors = {
                "model.embed_tokens.weight": weight(config.vocab_size, hidden),
                "lm_head.weight": weight(config.vocab_size, hidden),
                "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            }
        else:
            tensors = {f"{prefix}self_attn.{p}_proj.weight": weight(hidden, hidden) for p in "qkvo"}
            tensors |= {f"{prefix}mlp.{p}_proj.weight": weight(width, hidden) for p in ("gate", "up")}
            tensors[f"{prefix}mlp.down_proj.weight"] = weight(hidden, width)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        del tensors
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder()).save_pretrained(folder)
    return (folder / "model-00000.safetensors").stat().st_size


def llama_7b(layers: int, config: ConvertConfig, keep: Path | None = None) -> dict[str, Any]:
    """Conversion of a random-weight Llama-2-7B, or its first layers: the cost does not depend on the weights."""
    with tempfile.TemporaryDirectory() as scratch:
        layer_bytes = write_random_llama(Path(scratch), layers)
        result = conversion(scratch, config, keep)
    embeddings = 2 * 2 * 32_000 * 4_096
    activations = (config.tokens + 2 * config.held_out_tokens) * 4_096 * 2
    result["layer_bytes"] = layer_bytes
    result["three_layers_embeddings_activations_bytes"] = 3 * layer_bytes + embeddings + activations
    return result


def assignment(neurons: int = 9_632, experts: int = 14, tokens: int = 4_096, top_k: int = 10) -> dict[str, Any]:
    """Seconds of the exact balanced assignment by POT and by scipy on the repeated square cost, and both optima.

    Shape and cost are CMoE's for Llama-2-7B with S2E16: L1 distances of binary activation columns to centroids.
    """
    rng = np.random.default_rng(0)
    # neurons differ in how often they fire, as real ones do
    rate = rng.pareto(1.5, neurons)
    columns = torch.zeros(neurons, tokens)
    for token in range(tokens):
        columns[rng.choice(neurons, top_k, replace=False, p=rate / rate.sum()), token] = 1
    centers = columns[columns.sum(1).topk(experts).indices]
    cost = l1_distance(columns, centers).double()
    start = time.perf_counter()
    chosen = balanced_assignment(cost)
    ours = time.perf_counter() - start
    start = time.perf_counter()
    square = np.repeat(cost.numpy(), neurons // experts, axis=1)
    rows, matched = linear_sum_assignment(square)
    theirs = time.perf_counter() - start
    optimum, reference = cost.gather(1, chosen[:, None]).sum().item(), square[rows, matched].sum().item()
    return {
        "neurons": neurons,
        "experts": experts,
        "seconds": ours,
        "linear_sum_assignment_seconds": theirs,
        "speedup": theirs / ours,
        "optimum": optimum,
        "linear_sum_assignment_optimum": reference,
        "same_optimum": abs(optimum - reference) <= 1e-9 * abs(reference),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a model, llama-7b or assignment")
    parser.add_argument("--active", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--partition", default="specialists")
    parser.add_argument("--calibration", nargs="*", default=[])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--layers", type=int, default=32, help="of llama-7b")
    parser.add_argument("--keep", type=Path, help="where the converted model is left")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    config = ConvertConfig(
        active=a.active, tokens=a.tokens, partition=a.partition, calibration=tuple(a.calibration), device=a.device
    )
    if a.name == "assignment":
        result = assignment()
    elif a.name == "llama-7b":
        result = llama_7b(a.layers, config, a.keep)
    else:
        result = conversion(a.name, config, a.keep)
    if "config" in result:  # of the texts their names, wherever they lie
        result["config"]["calibration"] = [Path(source).name for source in a.calibration]
    text = json.dumps(result | {"machine": machine(), "versions": versions()}, indent=2)
    print(text)
    if a.out:
        a.out.mkdir(parents=True, exist_ok=True)
        layers = f"-{a.layers}-layers" if a.name == "llama-7b" else ""
        active = "" if a.name == "assignment" else f"-{a.active:.0%}".rstrip("%")
        (a.out / f"conversion-{a.name}{layers}{active}.json").write_text(text + "\n")
