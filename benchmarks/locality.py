"""What pulling tokens to the experts of the token before costs and wins (`finetune --locality`, LocMoE's loss).

    python benchmarks/locality.py --model tiny --plan S2A4E16 --out benchmarks/results/locality-tiny.json

The model is converted once a seed and tuned for `--steps` steps with each of `--localities`, 0 being the control.
Measured on the bundled held-out text: perplexity over the dense model's, the share of tokens that keep their experts,
and how many uses of experts an LRU cache finds in memory while requests decode (`moesaic inspect --trace`).
Resumable: a row that is there is not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path

import torch

import moesaic
from moesaic import ConvertConfig, FinetuneConfig
from moesaic.machine import machine, versions

POLICY = "lru"


def main() -> None:
    """Measure what is missing, a row at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--plan", required=True)
    parser.add_argument("--localities", type=float, nargs="+", default=(0, 0.01, 0.03, 0.1, 0.3, 1))
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--method", default="full")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(given.out.read_text()) if given.out.is_file() else start(given)
    with tempfile.TemporaryDirectory() as folder:
        for seed, locality in itertools.product(given.seeds, given.localities):
            key = {"seed": seed, "locality": locality}
            if not any(key.items() <= row.items() for row in found["rows"]):
                found["rows"].append(key | measure(given, Path(folder), seed, locality))
                head = json.dumps({**found, "rows": []}, indent=1).removesuffix("[]\n}")
                given.out.write_text(head + "[\n" + ",\n".join(map(json.dumps, found["rows"])) + "\n]}\n")
                print(json.dumps(found["rows"][-1]), flush=True)


def start(given: argparse.Namespace) -> dict[str, object]:
    """Write down what all rows share."""
    asked = {name: getattr(given, name) for name in ("model", "plan", "tokens", "method", "steps", "batch", "window")}
    return asked | {"policy": POLICY, "threads": 1, "versions": versions(), "machine": machine(), "rows": []}


def measure(given: argparse.Namespace, folder: Path, seed: int, locality: float) -> dict[str, object]:
    """Tune the seed's conversion with a locality, and look at what came."""
    converted, tuned = folder / f"{seed}", folder / "tuned"
    if not converted.is_dir():
        config = ConvertConfig(plan=given.plan, partition="coactivation", tokens=given.tokens, seed=seed)
        moesaic.convert(given.model, converted, config)
    training = FinetuneConfig(
        method=given.method, steps=given.steps, batch=given.batch, window=given.window, seed=seed, locality=locality
    )
    result = moesaic.finetune(converted, tuned, training, overwrite=True)
    model, tokenizer = moesaic.load(tuned)
    traced = moesaic.inspect_routes(model, tokenizer, folder / "routes.csv", requests=12, prompt=32, new=96)
    before, after = result.load.before, result.load.after
    return {
        "perplexity_dense": result.perplexity_dense, "perplexity_before": result.perplexity_before,
        "perplexity": result.perplexity, "kept_before": before.kept_experts, "kept": after.kept_experts,
        "variation": after.coefficient_of_variation, "improved": result.improved, "tokens": result.tokens,
        "seconds": result.seconds, "hits": {f"{c.share:g}": c.hit_ratio[POLICY] for c in traced.caches},
    }  # fmt: skip


if __name__ == "__main__":
    main()
