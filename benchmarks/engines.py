"""Decode and prefill of dense against converted in llama.cpp and vLLM, medians of alternating runs.

    make test-engines    # sets the engines up in .venv-engines
    python benchmarks/engines.py demo out50 out25 --outtypes f16 q8_0 --out benchmarks/results/engines-demo.json

`limit` is what the weights read (decode) or multiplied with (prefill) allow; see docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

import moesaic
from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.sources import resolve
from moesaic.evaluation.cost import active_weights, body_weights
from moesaic.formats.architectures._decoder import head_dim
from moesaic.formats.converted import HEAD, Converted
from moesaic.formats.gguf.config import write_rope
from moesaic.formats.gguf.vocabulary import write_vocabulary
from moesaic.formats.gguf.writer import OUTER, OUTTYPES, RENAMED, kind_of
from moesaic.formats.loading import load_tokenizer
from moesaic.machine import machine, versions

ROOT = Path(__file__).parent.parent
FFN = {"post_attention_layernorm.weight": "ffn_norm.weight"} | {
    f"mlp.{n}_proj.weight": f"ffn_{n}.weight" for n in ("gate", "up", "down")
}


def dense_gguf(folder: Path, path: Path, outtype: str) -> None:
    """A dense Qwen2 as llama.cpp has it, of the same types as our exports."""
    config, checkpoint = AutoConfig.from_pretrained(folder), Checkpoint(folder)
    assert config.model_type == "qwen2", "the baseline is written for Qwen2 only"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = {"partial_rotary_factor": 1.0} | config.rope_parameters
    write_rope(writer, {"rope_parameters": rope}, head_dim(config))
    write_vocabulary(writer, folder, load_tokenizer(folder), config.vocab_size)
    for name in checkpoint.names():
        if name.startswith("model.layers."):
            _, _, index, inner = name.split(".", 3)
            theirs = f"blk.{index}." + (RENAMED | FFN)[inner]
        else:
            theirs = OUTER[name]
        tensor = checkpoint.read(name)
        kind = kind_of(theirs, tensor.shape, OUTTYPES[outtype])
        writer.add_tensor(
            theirs, np.ascontiguousarray(gguf.quants.quantize(tensor.float().numpy(), kind)), raw_dtype=kind
        )
    assert HEAD in checkpoint or config.tie_word_embeddings
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
                        dense_gguf(folder, partial, kind)
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
