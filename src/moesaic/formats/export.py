"""Write a converted model in another format, a layer at a time, and see that stock transformers agrees."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedConfig

from ..checkpoint.claim import check_apart, clear
from ..checkpoint.facts import METRICS_FILE, check_conversion_files, saved_settings
from ..checkpoint.reader import Checkpoint
from ..checkpoint.single_file import MADE
from ..checkpoint.sources import resolve
from ..checkpoint.writer import OUTSIDE_FILE, ResumableOutput, check_space, claim_output
from ..errors import InputError, StorageError, WorkError
from ..files import read_json, write_json
from ..given import path
from ..models.families import HEAD
from ..models.tokenizer import load_tokenizer
from ..moe.modeling import MODEL_TYPE
from ..progress import Progress, unheard
from ..report.card import CardFacts, write_card
from ..results import Check, ConversionResult, ExportResult, Json
from .base import Format
from .choose import choose_format, engines_of
from .companions import copy_companions
from .converted import Converted
from .fields import stock_config
from .gguf_support import gguf_format
from .verify import check


def export(
    model: str | Path,
    output: str | Path,
    format: object = "auto",
    *,
    outtype: str | None = None,
    resume: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Write a converted model in another format: one that engines load, or moesaic's own again.

    A layer's tensors are in memory at a time; the check at the end loads both models in float32, one after the other,
    or as many of their layers as fit.

    Args:
        model: the folder of a converted model, in either format.
        output: the folder to make; it appears only when the check has passed.
        format: a format or its name, `gguf` for llama.cpp, or `auto`: GGUF if `output` is so called, else the first
            stock architecture that holds the model.
        outtype: how GGUF holds matrices: `f32`, `f16` (the default), `bf16`, `q8_0`, ... (`formats/gguf/writer.py`).
        resume: go on with an unfinished export of the same model.
        overwrite: replace `output` if it exists.
        progress: called with (finished layers, all layers, what is being done).

    Raises:
        InputError: no converted model, an unknown format, or one that cannot express this model.
        WorkError: a layer is not held without loss or the check failed; nothing is left behind.
        StorageError: the disk is full; the same command goes on.
    """
    output = path(output)
    check_apart(model, output)
    folder = resolve(str(model))
    source = Converted(folder)
    if format == "gguf" or (format == "auto" and output.suffix.lower() == ".gguf"):
        from .gguf.writer import write_gguf  # needs moesaic[export]

        return write_gguf(source, output, outtype or "f16", overwrite=overwrite, progress=progress)
    if outtype is not None:
        raise InputError(
            f"--outtype {outtype} is a type of GGUF; add --format gguf, or drop it: the dtype stays as it is"
        )
    chosen, reason = choose_format(format, source.config, source.has_bias(), source.whole)
    if reason:
        raise InputError(f"no engine's architecture holds this model: {reason}")
    check_conversion_files(folder)
    load_tokenizer(folder)
    copied = chosen.copied_parameters(source.config).total * source.checkpoint.dtype().itemsize
    check_space(output, source.checkpoint.size() + copied)
    with claim_output(output, overwrite):
        partial = ResumableOutput(output, {"model": source.checkpoint.fingerprint(), "format": chosen.name}, resume)
        try:
            found = rewrite(source, chosen, partial, str(output), progress or unheard)
        except StorageError:
            raise  # the finished layers wait for room
        except (InputError, WorkError):  # what is wrong with the model stays so
            clear(partial.folder)
            raise
    return ExportResult(output=str(output), target=chosen.name, bytes=Checkpoint(output).size(), **found.to_dict())


def rewrite(source: Converted, format: Format, partial: ResumableOutput, called: str, report: Progress) -> Check:
    """Write `source` in another format, check it, give it its name, and return what the check found.

    Raises:
        WorkError: a layer is not held without loss, or the check failed.
        StorageError: the disk is full.
    """
    folder, count = source.checkpoint.folder, source.config.num_hidden_layers
    for index in range(len(partial.layers), count):
        report(index, count, "writing")
        tensors = format.layer_exactly(source.layer(index), source.config)
        partial.add_layer({source.prefix(index) + name: tensor for name, tensor in tensors.items()}, {}, {})
    write_embeddings_and_head(partial, format, source.whole, source.embeddings_and_head())
    load_tokenizer(folder).save_pretrained(partial.folder)
    copy_companions(folder, partial.folder)
    report(count, count, "checking")
    found: list[Check] = []

    def last(made: Path) -> None:
        found.append(check(source, made))
        write_metrics(made, read_json(folder / METRICS_FILE) | {"output": called}, format, found[0])

    partial.finish(last)
    return found[0]


def write_embeddings_and_head(
    partial: ResumableOutput, format: Format, whole: PreTrainedConfig, tensors: dict[str, Tensor]
) -> None:
    """Write what is in no layer, and `config.json`."""
    whole.save_pretrained(partial.folder)
    if format.name != MODEL_TYPE:
        if whole.tie_word_embeddings:  # some engines cannot tie
            embeddings = next(name for name in tensors if name.endswith("embed_tokens.weight"))
            tensors = tensors | {HEAD: tensors[embeddings].clone()}
        write_json(partial.folder / "config.json", stock_config(format, whole))
    partial.write(OUTSIDE_FILE, tensors)


def write_metrics(folder: Path, metrics: Json, format: Format, found: Check | None) -> None:
    """Write `metrics.json` and the model card of a finished model; `found` is the check of a stock architecture."""
    source = Converted(folder)
    gone = {"check"} if (folder / MADE).is_file() else {"check", "gguf"}
    metrics = {name: value for name, value in metrics.items() if name not in gone}
    metrics |= {"format": format.name, "engines": engines_of(format, source.whole)}
    if found and format.name != MODEL_TYPE:
        metrics["check"] = found.to_dict()
    write_json(folder / METRICS_FILE, metrics)
    try:
        gguf_format(source.config, source.has_bias())
        gguf = not source.takes_pictures
    except InputError:
        gguf = False
    # SGLang fuses one shared expert into the routed ones, and only one
    fused = format.name == "glm4_moe" and source.config.n_shared_experts != 1
    about = CardFacts(
        architecture=source.checkpoint.architecture(),
        selection=source.config.selection,
        takes_pictures=source.takes_pictures,
        gguf=gguf,
        flags={"sglang": " --disable-shared-experts-fusion"} if fused else {},
    )
    write_card(ConversionResult.from_dict(metrics, str(folder / METRICS_FILE)), saved_settings(folder), about, folder)
