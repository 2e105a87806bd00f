"""How fast an engine runs experts of a width: decode and prefill of shapes over dense, with random weights.

    python benchmarks/engine_shapes.py demo --llama-cpp .venv-engines/llama.cpp/bin/python \
        --out benchmarks/results/engine-shapes-demo.json
    python benchmarks/engine_shapes.py --table       # what `--for` chooses by: src/moesaic/data/engine_shapes.json

Weights decide quality, bytes decide speed: every shape is the dense model, its FFNs cut as they are (in transformers
random ones) behind random gates. Dense and all shapes of a budget take turns; speed-ups are medians of the rounds' own
ratios. `limit` is dense weights over active ones. What is in FILE already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import torch
from transformers import AutoConfig

import moesaic
from moesaic.checkpoint.sources import resolve
from moesaic.comparison.llama_cpp import take_turns
from moesaic.comparison.speed import shaped
from moesaic.evaluation.benchmark import decode_speed
from moesaic.evaluation.cost import active_weights, body_weights
from moesaic.evaluation.inspect import prompt_tokens
from moesaic.formats.base import block_config
from moesaic.formats.gguf.config import write_config
from moesaic.formats.gguf.dense import write_dense_gguf
from moesaic.formats.gguf.vocabulary import write_vocabulary
from moesaic.formats.gguf_support import gguf_format
from moesaic.machine import machine, versions
from moesaic.models.tokenizer import load_tokenizer
from moesaic.moe.modeling import moesaic_config
from moesaic.plan import nearest_plan

ROOT = Path(__file__).parent.parent
WIDTHS = {"demo": (1_216, 608, 128, 64), "demo-1.5b": (2_240, 640, 128, 64)}
SHARES = (0.5, 0.25)
TABLE = ROOT / "src" / "moesaic" / "data" / "engine_shapes.json"
F32 = gguf.GGMLQuantizationType.F32
RESULTS = ROOT / "benchmarks" / "results"


def plans(model: str, size: int, share: float) -> list[moesaic.Plan]:
    """A plan of each width near a share, half of it shared."""
    found = [nearest_plan(share, size, size // width) for width in WIDTHS[model] if size % width == 0]
    return [plan for plan in found if plan.shared and plan.num_experts > plan.num_experts_per_tok]


def gguf_files(model: str, found: list[moesaic.Plan], kind: str, scratch: Path) -> list[Path]:
    """Dense, then each plan, as GGUF; made once and kept."""
    files = [scratch / f"{model}-{name}-{kind}.gguf" for name in ("dense", *map(str, found))]
    for plan, file in zip([None, *found], files, strict=True):
        if not file.is_file():
            making = file.with_suffix(".making")
            if plan is None:
                write_dense_gguf(resolve(model), making, kind)
            else:
                cut(files[0], model, plan, kind, making)
            making.replace(file)
    return files


def cut(dense: Path, model: str, plan: moesaic.Plan, kind: str, path: Path) -> None:
    """Cut a dense GGUF's FFNs into experts as they are, blocks and all, behind random gates."""
    folder, reader = resolve(model), gguf.GGUFReader(dense)
    whole = moesaic_config(AutoConfig.from_pretrained(folder), plan)
    config = block_config(whole)
    format = gguf_format(config, has_bias=True)
    source = SimpleNamespace(config=config, checkpoint=SimpleNamespace(folder=folder))
    writer = gguf.GGUFWriter(path, format.gguf_architecture)
    write_config(writer, format, source, kind)  # pyrefly: ignore[bad-argument-type]
    writer.kv_data[0] = vocabulary(model).kv_data[0] | writer.kv_data[0]
    generator, shared = np.random.default_rng(0), plan.shared_width

    def put(name: str, data: np.ndarray, raw: gguf.GGMLQuantizationType) -> None:
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=raw)

    names = {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        name, data, raw = tensor.name, tensor.data, tensor.tensor_type
        part = name.rpartition(".")[0].rpartition(".")[2]
        if part in ("ffn_gate", "ffn_up"):  # [F, bytes of D]
            put(name.replace(part, f"{part}_shexp"), data[:shared], raw)
            put(name.replace(part, f"{part}_exps"), data[shared:].reshape(plan.num_experts, plan.width, -1), raw)
        elif part == "ffn_down":  # [D, bytes of F]
            edge = shared * data.shape[1] // config.intermediate_size
            routed = data[:, edge:].reshape(len(data), plan.num_experts, -1).swapaxes(0, 1)
            put(name.replace(part, f"{part}_shexp"), data[:, :edge], raw)
            put(name.replace(part, f"{part}_exps"), routed, raw)
            layer, gates = name.removesuffix("ffn_down.weight"), (plan.num_experts, config.hidden_size)
            put(layer + "ffn_gate_inp.weight", generator.normal(0, 0.02, gates).astype(np.float32), F32)
            put(layer + "exp_probs_b.bias", np.zeros(plan.num_experts, np.float32), F32)
        else:
            put(name.replace("ffn_norm", "post_attention_norm"), data, raw)
            if name == "token_embd.weight" and "output.weight" not in names:
                put("output.weight", data, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@cache
def vocabulary(model: str) -> gguf.GGUFWriter:
    """The keys of the tokenizer, made once."""
    writer, folder = gguf.GGUFWriter(None, "llama"), resolve(model)
    write_vocabulary(writer, folder, load_tokenizer(folder), AutoConfig.from_pretrained(folder).vocab_size)
    return writer


def limits(model: str, found: list[moesaic.Plan]) -> dict[str, dict[str, float]]:
    """Dense weights over active ones: read in a decoding step, and multiplied with by a prompt's token."""
    dense, _ = moesaic.load(model)
    rows = {}
    for plan in found:
        made = shaped(dense, plan)
        rows[str(plan)] = {
            "decode": active_weights(dense) / active_weights(made), "prefill": body_weights(dense) / body_weights(made)
        }  # fmt: skip
    return rows


def in_llama_cpp(a: argparse.Namespace, found: list[moesaic.Plan], kind: str, threads: int) -> list[dict]:
    """A row for each plan."""
    files = gguf_files(a.model, found, kind, a.scratch)
    tokens = [random.Random(0).randrange(1_000, 50_000) for _ in range(a.prompt)]
    turns = take_turns(files, tokens, a.llama_cpp, new=a.new, rounds=a.rounds, threads=threads, clock=a.clock)
    return [
        {"version": turns.version, "bytes": file.stat().st_size}
        | {what: turns.rate(number, 0, what).to_dict() for what in ("decode", "prefill")}
        for number, file in enumerate(files[1:], 1)
    ]


def in_transformers(a: argparse.Namespace, found: list[moesaic.Plan], threads: int) -> list[dict]:
    """A row for each plan, of our own experts' implementation."""
    torch.set_num_threads(threads)
    dense, tokenizer = moesaic.load(a.model)
    tokens_1L = prompt_tokens(tokenizer, 64)
    if a.clock == "cpu":
        time.perf_counter = time.process_time  # what decoding is timed by
    rows = []
    for plan in found:
        speed = decode_speed(shaped(dense, plan), dense, tokens_1L, new=a.new, rounds=a.rounds)
        rows.append({
            "version": f"transformers {versions()['transformers']}, torch {versions()['torch']}",
            "decode": {
                name: getattr(speed, name) for name in ("tokens_per_s", "dense_tokens_per_s", "speedup")
            },
        })  # fmt: skip
    return rows


def measure(a: argparse.Namespace) -> None:
    """Measure what is not in the file yet, and write after each batch."""
    size = moesaic.plans(a.model).intermediate_size
    known = json.loads(a.out.read_text()) if a.out.is_file() else {"rows": []}
    rows = known["rows"]
    for kind, threads, share in [(k, t, s) for k in a.types for t in a.threads for s in a.shares]:
        engine = "transformers" if kind == "bfloat16" else "llama.cpp"
        found = plans(a.model, size, share)
        if any((r["engine"], r["type"], r["threads"], r["share"]) == (engine, kind, threads, share) for r in rows):
            continue
        before = os.getloadavg()[0]
        made = in_transformers(a, found, threads) if engine == "transformers" else in_llama_cpp(a, found, kind, threads)
        bounds = limits(a.model, found)
        for plan, row in zip(found, made, strict=True):
            for what in ("decode", "prefill"):
                if what in row:
                    limit = bounds[str(plan)][what]
                    row[what] |= {"limit": limit, "share_of_limit": row[what]["speedup"] / limit}
            facts = {"engine": engine, "type": kind, "threads": threads, "share": share, "plan": str(plan)}
            facts |= {"width": plan.width, "ffn_active": plan.ffn_active(size), "load_before": before, "clock": a.clock}
            rows.append(facts | row)
        result = {"model": a.model, "prompt": a.prompt, "new": a.new, "rounds": a.rounds, "machine": machine()}
        a.out.write_text(json.dumps(result | {"versions": versions(), "rows": rows}, indent=2) + "\n")
        print(kind, threads, share, [(r["width"], round(r["decode"]["speedup"], 2)) for r in rows[-len(found) :]])


def table() -> dict:
    """What `--for` chooses by: shares of the limit by engine, type and width, and llama.cpp's types over f16.

    Means over threads and budgets; of types over all models that were measured in f16 too, in the same run.
    """
    files = [RESULTS / "engines-demo.json", *sorted(RESULTS.glob("engine-shapes-*.json"))]
    files += sorted(RESULTS.glob("quantised-*.json"))
    rows = [
        {"threads": 1, "type": row.get("outtype")} | row | {"file": file.name}
        for file in files for row in json.loads(file.read_text())["rows"]
        if row.get("engine") != "vllm"
    ]  # fmt: skip
    frontier = RESULTS / "quality-demo" / "frontier.json"
    files.append(frontier)
    shaped_rows = [row for row in rows if "width" in row] + [
        {"engine": "transformers", "type": s["dtype"], "width": s["expert_width"]}
        | {"decode": {"share_of_limit": s["speedup"] / s["limit"]}}
        for s in json.loads(frontier.read_text())["speeds"]
        if "A0" not in s["plan"]
    ]
    widths = []
    for engine, kind, width in dict.fromkeys((r["engine"], r["type"], r["width"]) for r in shaped_rows):
        these = [r for r in shaped_rows if (r["engine"], r["type"], r["width"]) == (engine, kind, width)]
        entry = {"engine": engine, "type": kind, "width": width}
        for what in ("decode", "prefill"):
            shares = [r[what]["share_of_limit"] for r in these if what in r]
            entry |= {what: round(statistics.mean(shares), 3)} if shares else {}
        widths.append(entry)
    in_f16 = {(r["file"], r["plan"], r["threads"]): r for r in rows if r["type"] == "f16"}
    types = []
    for kind in dict.fromkeys(r["type"] for r in rows if r["type"] != "bfloat16"):
        pairs = [(r, in_f16.get((r["file"], r["plan"], r["threads"]))) for r in rows if r["type"] == kind]
        faster = [r["decode"]["tokens_per_s"] / f["decode"]["tokens_per_s"] for r, f in pairs if f]
        worse = [r["perplexity"] / f["perplexity"] for r, f in pairs if f and "perplexity" in r]
        if faster and worse:
            entry = {"speed": round(statistics.mean(faster), 3), "perplexity": round(statistics.mean(worse), 4)}
            types.append({"type": kind} | entry)
    return {"from": [str(file.relative_to(RESULTS)) for file in files], "widths": widths, "types": types}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=sorted(WIDTHS))
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0", "q4_0", "bfloat16"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--llama-cpp", type=Path, help="a Python that has xllamacpp")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "moesaic-shapes")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true", help="write the package's table of what is in results")
    a = parser.parse_args()
    if a.table:
        TABLE.write_text(json.dumps(table(), indent=1) + "\n")
        return
    a.scratch.mkdir(parents=True, exist_ok=True)
    measure(a)


if __name__ == "__main__":
    main()
