"""Decode and prefill of dense against converted in llama.cpp and vLLM, medians of alternating runs.

    make test-engines    # sets the engines up in .venv-engines
    python benchmarks/engines.py demo out50 out25 --outtypes f16 q8_0 --out benchmarks/results/engines-demo.json

`limit` is what the weights read (decode) or multiplied with (prefill) allow; see docs/benchmark.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

import moesaic
from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.sources import resolve
from moesaic.evaluation.cost import active_weights, body_weights
from moesaic.formats.converted import Converted
from moesaic.formats.gguf.dense import write_dense_gguf
from moesaic.machine import machine, versions

ROOT = Path(__file__).parent.parent


def limits(dense: str, converted: Path) -> dict[str, float]:
    """Dense weights over active ones: read in a decoding step, and multiplied with by a prompt token."""
    with torch.device("meta"):
        models = [
            AutoModelForCausalLM.from_config(config)
            for config in (AutoConfig.from_pretrained(resolve(dense)), Converted(converted).config)
        ]
    return {
        name: count(models[0]) / count(models[1])
        for name, count in (("decode", active_weights), ("prefill", body_weights))
    }


def worker(engine: str, request: dict) -> dict:
    """Seconds that the engine takes, measured in its own environment."""
    python = ROOT / ".venv-engines" / engine / "bin" / "python"
    script = ROOT / "benchmarks" / f"engines_{engine.replace('.', '_')}.py"
    with tempfile.NamedTemporaryFile("r") as answer:
        command = [str(python), str(script), json.dumps(request), answer.name]
        subprocess.run(command, check=True, capture_output=True)
        return json.loads(Path(answer.name).read_text())


def summarise(rates: dict[str, list[float]], limit: dict[str, float], dense: dict[str, list[float]]) -> dict:
    """Medians, ranges, and the speed-up over dense with the share of the limit that it reaches."""
    row = {}
    for what, values in rates.items():
        median = statistics.median(values)
        speedup = median / statistics.median(dense[what])
        row[what] = {
            "tokens_per_s": median, "range": [min(values), max(values)], "speedup": speedup,
            "limit": limit[what], "share_of_limit": speedup / limit[what],
        }  # fmt: skip
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("converted", nargs="+", type=Path)
    parser.add_argument("--engines", nargs="+", default=["llama.cpp", "vllm"])
    parser.add_argument("--outtypes", nargs="+", default=["f16", "q8_0"])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "moesaic-engines")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    a.scratch.mkdir(parents=True, exist_ok=True)
    facts = {folder: moesaic.inspect(folder) for folder in a.converted}
    result = {
        "dense": a.dense, "prompt": a.prompt, "new": a.new,
        "machine": machine(), "versions": versions(), "rows": [],
    }  # fmt: skip
    shapes = {"prompt": a.prompt, "new": a.new, "rounds": a.rounds}
    for engine in a.engines:
        for kind in a.outtypes if engine == "llama.cpp" else ["bfloat16"]:
            models = [str(resolve(a.dense)), *map(str, a.converted)]
            if engine == "llama.cpp":
                folders = [resolve(a.dense), *a.converted]
                files = [a.scratch / f"{Checkpoint(folder).fingerprint()[:16]}-{kind}.gguf" for folder in folders]
                for folder, path in zip(folders, files, strict=True):
                    if path.is_file():
                        continue
                    if folder == folders[0]:
                        partial = path.with_suffix(".partial")
                        write_dense_gguf(folder, partial, kind)
                        partial.replace(path)
                    else:
                        moesaic.export(folder, path, "gguf", outtype=kind)
                models = [str(path) for path in files]
            for threads in a.threads:
                found = worker(engine, shapes | {"models": models, "threads": threads})
                dense, *others = found["rates"]
                for folder, rates in zip(a.converted, others, strict=True):
                    row = {"engine": engine, "version": found["version"], "type": kind, "threads": threads}
                    row |= {"rounds": len(dense["decode"])}
                    row |= {name: facts[folder][name] for name in ("plan", "ffn_active")} | {"dense": dense}
                    result["rows"].append(row | summarise(rates, limits(a.dense, folder), dense))
                a.out.write_text(json.dumps(result, indent=2) + "\n")
    show(result["rows"])


def show(rows: list[dict]) -> None:
    """A table of speed-ups."""
    grid = Table(
        "engine", "type", "threads", "FFN active", "decode", "of limit", "prefill", "of limit", title="over dense"
    )
    for row in rows:
        cells = [
            f"{row[w][k]:{f}}"
            for w in ("decode", "prefill")
            for k, f in (("speedup", ".2f"), ("share_of_limit", ".0%"))
        ]
        grid.add_row(row["engine"], row["type"], str(row["threads"]), f"{row['ffn_active']:.0%}", *cells)
    Console().print(grid)


if __name__ == "__main__":
    main()
