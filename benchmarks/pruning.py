"""Pruning methods at equal size: perplexity with and without recovery.

    python benchmarks/pruning.py --model tiny-moe --experts 12 8 --out benchmarks/results/pruning-tiny-moe.json

The model keeps so many experts in each layer. Perplexity is that of `moesaic evaluate` (protocol `gptq`, windows of
`--window` tokens) on the bundled held-out text, calibration is the bundled calibration text. Methods that draw tokens
or experts run with each of `--seeds`. Resumable: a row that is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

import moesaic
from moesaic import PruneConfig
from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.sources import resolve
from moesaic.machine import machine, versions

METHODS = ("reap", "frequency", "router-norm", "merge", "random", "naee")
SEEDED = ("naee", "random")


def main() -> None:
    """Measure what is missing, a row at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--called", help="what the results call the model; by default as --model")
    parser.add_argument("--experts", type=int, nargs="+", required=True)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--recoveries", nargs="+", default=("none", "closed-form"))
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(given.out.read_text()) if given.out.is_file() else start(given)
    for method in given.methods:
        for keep in given.experts:
            for recovery in given.recoveries:
                for seed in given.seeds if method.partition(":")[0] in SEEDED else given.seeds[:1]:
                    key = {"method": method, "experts": keep, "recovery": recovery, "seed": seed}
                    if not any(key.items() <= row.items() for row in found["rows"]):
                        found["rows"].append(key | measure(given, key))
                        given.out.write_text(written(found))
                        print(json.dumps(found["rows"][-1]), flush=True)


def written(found: dict) -> str:
    """Write what was found as JSON, a row a line."""
    head = json.dumps({**found, "rows": []}, indent=1).removesuffix("[]\n}")
    return head + "[\n" + ",\n".join(map(json.dumps, found["rows"])) + "\n]}\n"


def start(given: argparse.Namespace) -> dict:
    """Measure the source, and say what all rows have in common."""
    folder = resolve(given.model)
    model, tokenizer = moesaic.load(folder, dtype=torch.float32)
    whole = moesaic.evaluate(model, tokenizer, window=given.window)
    return {
        "model": given.called or given.model, "fingerprint": Checkpoint(folder).fingerprint(),
        "calibration": "bundled calibration text", "calibration_tokens": given.tokens, "protocol": whole.protocol,
        "window": whole.window, "tokens": whole.tokens, "data_sha256": whole.data_sha256, "dtype": "float32",
        "perplexity": whole.perplexity, "versions": versions(), "machine": machine(), "threads": 1, "rows": [],
    }  # fmt: skip


def measure(given: argparse.Namespace, key: dict) -> dict:
    """Prune and evaluate."""
    config = PruneConfig(**key, tokens=given.tokens, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        result = moesaic.prune(given.model, Path(folder) / "pruned", config, force=True)
        model, tokenizer = moesaic.load(Path(folder) / "pruned", dtype=torch.float32)
        score = moesaic.evaluate(model, tokenizer, window=given.window)
    layers = result.layers
    return {
        "perplexity": score.perplexity, "parameters": result.total_parameters, "seconds": round(result.seconds, 1),
        "split_error": sum(layer.split_error for layer in layers) / len(layers),
        "error": sum(layer.error for layer in layers) / len(layers),
        "kept": [layer.kept for layer in layers],
    }  # fmt: skip


if __name__ == "__main__":
    main()
