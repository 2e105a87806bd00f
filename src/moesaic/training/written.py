"""The format that a trained model is written in."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from .. import registry
from ..checkpoint.facts import METRICS_FILE
from ..errors import InputError, StorageError, WorkError
from ..files import read_json, write_json
from ..formats.base import block_config
from ..formats.choose import ChosenFormat, choose_format
from ..formats.export import export
from ..moe.modeling import MODEL_TYPE, moe_blocks
from .prepare import Finetuning


def written_format(run: Finetuning, trained: PreTrainedModel) -> ChosenFormat:
    """Choose the format to write, and say why it is not the one that the model came in, if it is not."""
    has_bias = any(bool(b.gate.e_score_correction_bias.any()) for b in moe_blocks(trained) if b.gate is not None)
    try:
        return choose_format(run.source.format, block_config(trained.config), has_bias, trained.config)
    except InputError as error:
        return ChosenFormat(registry.build("format", MODEL_TYPE), str(error))


def export_as(made: Path, output: Path, chosen: ChosenFormat, overwrite: bool) -> ChosenFormat:
    """Write a model in a format, or in moesaic's own where it fails there as a stock architecture; returns which.

    Training may take the router's scores so far that a stock router's weights are no longer 1.

    Raises:
        WorkError: it is to be written in moesaic's own format, and that failed.
        StorageError: the disk is full.
    """
    try:
        export(made, output, chosen.format, resume=False, overwrite=overwrite)
        return chosen
    except StorageError:
        raise
    except WorkError as error:
        if chosen.format.name == MODEL_TYPE:
            raise
        own = ChosenFormat(registry.build("format", MODEL_TYPE), str(error))
    metrics = read_json(made / METRICS_FILE)
    said = {"format": own.format.name, "format_reason": own.reason}
    write_json(made / METRICS_FILE, metrics | said | {"finetune": metrics["finetune"] | said})
    export(made, output, own.format, resume=False, overwrite=overwrite)
    return own
