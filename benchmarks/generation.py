"""What is left of what a dense model writes: functions that pass, right answers, and agreement with its greedy tokens.

    python benchmarks/generation.py demo out-50 out-75 --reference demo --humaneval HumanEval.jsonl.gz \\
        --gsm8k gsm8k.test.jsonl --text prompts.jsonl --items 164 --out benchmarks/results/generation-demo

Each model is a name, a hub id or a folder, dense or converted (`moesaic convert ... --seed 1` makes another seed's);
`LABEL=FOLDER` names its row, and rows of the same label are seeds of the same thing. Code that the models write is run
within limits (`docs/evaluation.md`). Exercises are those of `moesaic evaluate --generate`; without `--reference`
nothing is compared. Resumable: a row that is in `<out>/rows` is not measured again, nor is what the reference wrote.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import moesaic
from moesaic import InputError
from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.sources import resolve
from moesaic.evaluation.generation import continuations, read_request
from moesaic.files import write_json
from moesaic.machine import machine, versions

KINDS = ("humaneval", "mbpp", "gsm8k", "text")
WINDOW = 512


def files_of(given: argparse.Namespace) -> list[Path]:
    """All files of exercises."""
    return [file for kind in KINDS if (file := getattr(given, kind))]


def identity(model: str) -> dict[str, Any]:
    """What a model is: its fingerprint, and of a converted one shape, method and seed."""
    folder = resolve(model)
    found = {"fingerprint": Checkpoint(folder).fingerprint(), "ffn_active": 1.0, "plan": None, "seed": None}
    try:
        seen = moesaic.inspect(folder)
    except InputError:  # a dense one
        return found
    made = seen.metrics
    return found | {
        "plan": made.plan, "ffn_active": made.ffn_active, "partition": made.partition, "seed": seen.config.get("seed"),
        "converted_from": Path(seen.model).name, "calibration_tokens": seen.config.get("tokens"),
        "total_parameters": made.total_parameters, "active_parameters": made.active_parameters,
        "trained": made.finetune is not None, "perplexity_ratio": made.perplexity / made.perplexity_dense,
    }  # fmt: skip


def reference_tokens(given: argparse.Namespace) -> dict[str, list[list[int]]] | None:
    """What the reference writes, measured once and kept."""
    if given.reference is None:
        return None
    path = given.out / "rows" / "reference.json"
    if not path.is_file():
        loaded = moesaic.load(given.reference)
        request = read_request(
            files_of(given), given.items, allow_code_execution=True, reference=loaded, batch=given.batch,
            reference_tokens=given.reference_tokens,
        )  # fmt: skip
        write_json(path, {"written": continuations(request, *loaded)}, indent=None)
    return json.loads(path.read_text())["written"]


def row_of(given: argparse.Namespace, label: str, model: str, theirs: Any) -> dict[str, Any]:
    """Measure one model."""
    kept = given.out / "rows" / f"{label}.answers.jsonl" if given.keep else None
    start, loaded = time.monotonic(), moesaic.load(model)
    result = moesaic.evaluate(
        *loaded, window=WINDOW, max_tokens=given.max_tokens, generate=files_of(given), items=given.items,
        allow_code_execution=True, reference=theirs, reference_tokens=given.reference_tokens, batch=given.batch,
        max_new_tokens=given.max_new_tokens, answers=kept,
        progress=lambda done, count, note: print(f"\r{label}: {done} of {count}, {note}   ", end="", flush=True),
    )  # fmt: skip
    scores = {name: score.to_dict() for name, score in result.generation.items()}
    return {
        "label": label, "model": Path(model).name, **identity(model), "perplexity": result.perplexity,
        "generation": scores, "dtype": result.dtype, "seconds": round(time.monotonic() - start), "machine": machine(),
        "versions": versions(),
    }  # fmt: skip


def check_setting(given: argparse.Namespace) -> dict[str, Any]:
    """Say how all rows of a folder are measured; those that are there must have been measured alike."""
    setting = {
        "reference": Path(given.reference).name if given.reference else None, "items": given.items,
        "files": {kind: file.name for kind in KINDS if (file := getattr(given, kind))}, "window": WINDOW,
        "max_new_tokens": given.max_new_tokens, "reference_tokens": given.reference_tokens, "batch": given.batch,
        "max_tokens": given.max_tokens, "threads": torch.get_num_threads(),
        "protocol": "greedy; code continues its raw prompt, questions are asked by the chat template, if any",
    }  # fmt: skip
    path = given.out / "rows" / "setting.json"
    if path.is_file() and json.loads(path.read_text()) != setting:
        raise SystemExit(f"{path} says that rows were measured otherwise; give another --out, or its settings")
    write_json(path, setting)
    return setting


def main() -> None:
    """Measure what is missing, a model at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="[LABEL=]MODEL")
    parser.add_argument("--reference", help="the dense model that is agreed with")
    parser.add_argument("--humaneval", type=Path)
    parser.add_argument("--mbpp", type=Path)
    parser.add_argument("--gsm8k", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--items", type=int, help="of each file, the first [default: all]")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--reference-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=4_096, help="of bundled text, for the perplexity")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--keep", action="store_true", help="what the models wrote, in <out>/rows/*.answers.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if not files_of(given):
        parser.error("give a file of exercises: --humaneval, --mbpp, --gsm8k or --text")
    if given.threads:
        torch.set_num_threads(given.threads)
    (given.out / "rows").mkdir(parents=True, exist_ok=True)
    setting = check_setting(given)
    theirs = reference_tokens(given)
    for named in given.models:
        label, model = named.split("=", 1) if "=" in named else (Path(named).name, named)
        path = given.out / "rows" / f"{label}-{Checkpoint(resolve(model)).fingerprint()[:8]}.json"
        if not path.is_file():
            write_json(path, row_of(given, label, model, theirs))
            print(f"\r{path.read_text()}", flush=True)
    rows = [json.loads(path.read_text()) for path in sorted((given.out / "rows").glob("*.json"))]
    measured = [row for row in rows if "label" in row]
    write_json(given.out / "generation.json", {"setting": setting, "rows": measured})


if __name__ == "__main__":
    main()
