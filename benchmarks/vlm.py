"""What is left of a vision-language model's answers when its language tower becomes a Mixture-of-Experts.

    python benchmarks/vlm.py --model tiny-vlm --out benchmarks/results/vlm-tiny [--active 0.75 0.5 0.25] \\
        [--tasks heldout.jsonl] [--calibration FILE ...] [--lines ours static ...] [--steps 300] [--seeds 0 1 2]

Lines, each at every share of the FFN: `ours` (auto, calibrated on pictures and text), `fine` (about 64 groups),
`text-only` (ours, calibrated on text alone), `static` (pruning with closed form, calibrated as ours), `image-weight-W`
(ours, with a picture's token worth W); and, tuned for `--steps` steps of `moe-llava` on equal data, `ours-tuned` and
`upcycled` (MoE-LLaVA's: whole FFNs copied, no share). Accuracy is the exact match of greedy answers to `--tasks`.
Any model of the hub that `moesaic convert` takes; a finished row is a file in `<out>/rows`, so it can be stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

import moesaic
from moesaic import ConvertConfig, FinetuneConfig
from moesaic.files import write_json
from moesaic.machine import machine, versions

PICTURES = Path(str(files("moesaic"))) / "data" / "pictures"
TEXT = "text-only"


def conversions(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The settings of each line, by its name; a share of the FFN is in all names but the upcycled one's."""
    found: dict[str, dict[str, Any]] = {}
    for active in arguments.active:
        share = f"{active:.0%}".removesuffix("%")
        ours = {"partition": "coactivation", "active": active}
        found |= {
            f"ours-{share}": ours,
            f"fine-{share}": ours | {"fine": True},
            f"text-only-{share}": ours | {"calibration": (str(arguments.text),)},
            f"static-{share}": {"partition": "static", "active": active},
        }
        found |= {f"image-weight-{w:g}-{share}": ours | {"image_weight": w} for w in arguments.image_weights}
        if arguments.steps:
            found[f"tuned-{share}"] = ours
    if arguments.steps:
        found["upcycled"] = {"partition": "upcycle"}
    wanted = arguments.lines
    return {name: how for name, how in found.items() if not wanted or name.startswith(tuple(wanted))}


def accuracy(arguments: argparse.Namespace, model: str | Path) -> dict[str, float]:
    """Share of right answers, and its standard error."""
    loaded = moesaic.load(model)
    processor = moesaic.load_processor(model)
    start = time.monotonic()
    result = moesaic.evaluate(loaded.model, processor, tasks=arguments.tasks, items=arguments.items)
    score = result.tasks["mean"]
    return {"acc": score.acc, "stderr": score.stderr, "n": score.n, "seconds": time.monotonic() - start}


def row_of(arguments: argparse.Namespace, name: str, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Convert, measure, tune where the line says so, measure again."""
    folder = arguments.out / "models" / f"{name}-{seed}"
    settings = {"calibration": tuple(arguments.calibration)} | settings
    config = ConvertConfig(tokens=arguments.tokens, seed=seed, **settings)
    result = moesaic.convert(arguments.model, folder, config, overwrite=True, force=True)
    assert result.pictures is not None
    row: dict[str, Any] = {
        "line": name, "seed": seed, "plan": result.plan, "expert_width": result.expert_width,
        "ffn_active": result.ffn_active, "memory_factor": result.memory_factor, "seconds": result.seconds,
        "active_parameters": result.active_parameters, "dense_parameters": result.dense_parameters,
        "total_parameters": result.total_parameters, "format": result.format,
        "perplexity": result.perplexity, "perplexity_dense": result.perplexity_dense,
        "pictures": result.pictures.to_dict(), "errors": [record.error_by_modality for record in result.layers],
        "converted": accuracy(arguments, folder),
    }  # fmt: skip
    if name.startswith(("tuned", "upcycled")):
        tuned = arguments.out / "models" / f"{name}-{seed}-tuned"
        training = FinetuneConfig(
            method="moe-llava", steps=arguments.steps, batch=arguments.batch, samples=arguments.samples, seed=seed,
            objective="lm", teacher=arguments.model, learning_rate=arguments.learning_rate,
        )  # fmt: skip
        found = moesaic.finetune(folder, tuned, training, overwrite=True)
        row["tuned"] = accuracy(arguments, tuned) | {"seconds": found.seconds, "perplexity": found.perplexity}
    return row


def summary(out: Path) -> list[dict[str, Any]]:
    """Means over seeds of what each line keeps, and how far it is below the dense model, in points."""
    rows = [json.loads(path.read_text()) for path in sorted((out / "rows").glob("*.json"))]
    dense = next(row for row in rows if row["line"] == "dense")["converted"]["acc"]
    table = []
    for name in dict.fromkeys(row["line"] for row in rows if row["line"] != "dense"):
        own = [row for row in rows if row["line"] == name]

        def mean(read: Any, own: list[dict[str, Any]] = own) -> float | None:
            values = [read(row) for row in own if read(row) is not None]
            return statistics.fmean(values) if values else None

        acc = [row["converted"]["acc"] for row in own]
        table.append(
            {
                "line": name, "seeds": len(own), "plan": own[0]["plan"], "ffn_active": own[0]["ffn_active"],
                "active_parameters": own[0]["active_parameters"], "memory_factor": own[0]["memory_factor"],
                "acc": statistics.fmean(acc), "deviation": statistics.stdev(acc) if len(acc) > 1 else None,
                "points_lost": 100 * (dense - statistics.fmean(acc)),
                "perplexity_ratio": mean(lambda row: row["perplexity"] / row["perplexity_dense"]),
                "tuned": mean(lambda row: row.get("tuned", {}).get("acc")),
            }
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, default=PICTURES / "heldout.jsonl", help="questions with one answer")
    parser.add_argument("--items", type=int, help="of each task, at most")
    parser.add_argument("--calibration", nargs="+", default=[], help="files with pictures and text; else the bundled")
    parser.add_argument("--text", type=Path, help="what text-only is calibrated on; else the bundled text")
    parser.add_argument("--active", nargs="+", type=float, default=[0.75, 0.5, 0.25])
    parser.add_argument("--image-weights", nargs="*", type=float, default=[])
    parser.add_argument("--lines", nargs="+", default=[], help="those whose names begin so")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--steps", type=int, default=0, help="of moe-llava; 0: no tuned lines")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--samples", type=int, default=2_000)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    (arguments.out / "rows").mkdir(parents=True, exist_ok=True)
    if arguments.text is None:
        arguments.text = PICTURES.parent / "calibration.jsonl"
    path = arguments.out / "rows" / "dense.json"
    if not path.is_file():
        write_json(path, {"line": "dense", "seed": 0, "converted": accuracy(arguments, arguments.model)})
    for seed, (name, settings) in itertools.product(arguments.seeds, conversions(arguments).items()):
        path = arguments.out / "rows" / f"{name}-{seed}.json"
        if not path.is_file():
            write_json(path, row_of(arguments, name, settings, seed))
            row = json.loads(path.read_text())
            print(name, seed, row["converted"], row.get("tuned"), flush=True)
    dense = json.loads((arguments.out / "rows" / "dense.json").read_text())["converted"]
    facts = {
        "model": arguments.model, "machine": machine(), "versions": versions(), "tokens": arguments.tokens,
        "tasks": arguments.tasks.name, "items": dense["n"], "dense": dense, "steps": arguments.steps,
        "batch": arguments.batch, "seeds": arguments.seeds,
    }  # fmt: skip
    write_json(arguments.out / "vlm.json", facts | {"summary": summary(arguments.out)})
    for line in summary(arguments.out):
        print(json.dumps(line))


if __name__ == "__main__":
    main()
