"""Write a converted model as a stock architecture, a layer at a time, and see that stock transformers agrees."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ..checkpoint.reader import Checkpoint
from ..checkpoint.sources import resolve
from ..checkpoint.writer import CONFIG_FILE, OUTER, ResumableOutput, check_facts, check_output, check_space
from ..errors import InputError, StorageError, WorkError
from ..moe.modeling import MODEL_TYPE
from ..report.card import write_card
from .base import Format
from .converted import CONFIG_KEY, HEAD, Converted, choose_format
from .gguf.writer import write_gguf
from .loading import load_tokenizer
from .verify import check

PLOTS = ("layer_error.png", "activation_rates.png", "expert_load.png", "training.png")
COPIED = (CONFIG_FILE, "generation_config.json", "metrics.jsonl", *PLOTS)

Progress = Callable[[int, int, str], None]
"""Called with (finished layers, all layers, what is being done)."""


def export(
    model: str | Path,
    output: str | Path,
    to: str = "auto",
    *,
    outtype: str | None = None,
    resume: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a converted model in another form: one that engines load, or the working form again.

    A layer's tensors are in memory at a time; the check at the end loads both models in float32, one after the other,
    or as many of their layers as fit.

    Args:
        model: the folder of a converted model, in either form.
        output: the folder to make; it appears only when the check has passed.
        to: a form, `gguf` for llama.cpp, or `auto`: GGUF if `output` is so called, else the first native form that
            holds the model.
        outtype: how GGUF holds matrices: `f32`, `f16` (the default), `bf16`, `q8_0`, ... (`export/gguf.py`).
        resume: go on with an unfinished export of the same model.
        overwrite: replace `output` if it exists.
        progress: called with (finished layers, all layers, what is being done).

    Returns:
        `output, target, bytes` and what `check` found (`max_abs_logit_error`, ...); for GGUF see `write_gguf`.

    Raises:
        InputError: no converted model, an unknown form, or one that cannot express this model.
        WorkError: a layer is not held without loss or the check failed; nothing is left behind.
        StorageError: the disk is full; the same command goes on.
    """
    output, folder = Path(output), resolve(str(model))
    source = Converted(folder)
    if to == "gguf" or (to == "auto" and output.suffix == ".gguf"):
        return write_gguf(source, output, outtype or "f16", overwrite=overwrite, progress=progress)
    if outtype is not None:
        raise InputError(f"--outtype {outtype} is a type of GGUF; add --to gguf, or drop it: the dtype stays as it is")
    form, reason = choose_format(to, source.config, source.has_bias())
    if reason:
        raise InputError(f"no engine's architecture holds this model: {reason}")
    check_output(output, overwrite)
    check_facts(folder)
    load_tokenizer(folder)
    copied = form.copied_parameters(source.config)[0] * source.checkpoint.dtype().itemsize
    check_space(output, source.checkpoint.size() + copied)
    partial = ResumableOutput(output, {"model": source.checkpoint.fingerprint(), "form": form.name}, resume)
    try:
        found = rewrite(source, form, partial, str(output), progress or (lambda done, count, note: None))
    except StorageError:
        raise  # the finished layers wait for room
    except WorkError:
        shutil.rmtree(partial.folder)
        raise
    return {"output": str(output), "target": form.name, "bytes": Checkpoint(output).size(), **found}


def rewrite(source: Converted, form: Format, partial: ResumableOutput, called: str, report: Progress) -> dict[str, Any]:
    """Write `source` in another form, check it, give it its name, and return what the check found."""
    folder, count = source.checkpoint.folder, source.config.num_hidden_layers
    for index in range(len(partial.layers), count):
        report(index, count, "writing")
        tensors = form.layer_exactly(source.layer(index), source.config)
        partial.add_layer({source.prefix(index) + name: tensor for name, tensor in tensors.items()}, {}, {})
    write_embeddings_and_head(partial, form, source.config, source.outer(), source.fields)
    load_tokenizer(folder).save_pretrained(partial.folder)
    for name in COPIED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, partial.folder / name)
    report(count, count, "checking")
    found: dict[str, Any] = {}

    def last(made: Path) -> None:
        found.update(check(source, made))
        write_facts(made, json.loads((folder / "metrics.json").read_text()) | {"output": called}, form, found)

    partial.finish(last)
    return found


def write_embeddings_and_head(
    partial: ResumableOutput, form: Format, working: Any, outer: dict[str, Tensor], fields: dict[str, Any]
) -> None:
    """Write what is in no layer and `config.json`; `fields` is the working form's."""
    if form.name == MODEL_TYPE:
        written = fields
    else:
        written = form.config(working) | {CONFIG_KEY: fields}
        if working.tie_word_embeddings:  # some engines cannot tie
            outer = outer | {HEAD: outer["model.embed_tokens.weight"].clone()}
    partial.write(OUTER, outer)
    (partial.folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")


def write_facts(folder: Path, metrics: dict[str, Any], form: Format, found: dict[str, Any]) -> None:
    """Write `metrics.json` and the model card of a finished model that was checked."""
    metrics = {name: value for name, value in metrics.items() if name != "check"}
    metrics |= {"format": form.name, "engines": form.engines(Converted(folder).config)}
    metrics |= {"check": found} if form.name != MODEL_TYPE else {}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    write_card(metrics, yaml.safe_load((folder / CONFIG_FILE).read_text()), folder)
