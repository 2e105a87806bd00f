"""What a converted model says of itself: the results stored beside its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..calibration.text import bundled
from ..checkpoint.facts import saved_result, saved_settings
from ..checkpoint.sources import resolve
from ..errors import InputError
from ..formats.converted import Converted
from ..formats.fields import text_json
from ..given import check, path
from ..results import Inspection

MOE_FIELDS = (
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size", "router",
    "selection",
)  # fmt: skip


def inspect(folder: str | Path) -> Inspection:
    """Read configuration, metrics and per-layer statistics of a converted model.

    Raises:
        InputError: not a folder, or GGUF, that `convert` made.
    """
    named = path(folder)
    folder = resolve(str(named)) if named.is_file() else named
    saved = saved_settings(folder)
    converted = Converted(folder)
    checkpoint = converted.checkpoint
    return Inspection(
        folder=str(named),
        model=saved["model"],
        architecture=checkpoint.architecture(),
        bytes=checkpoint.size(),
        moe={name: found for name, found in text_json(converted.fields).items() if name in MOE_FIELDS},
        config=saved["config"],
        metrics=saved_result(folder),
    )


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, length: int, batch: int = 1) -> Tensor:
    """Cut `batch` different prompts from the bundled held-out text, int64 [batch, length].

    Raises:
        InputError: the text has fewer tokens, or a number that is none.
    """
    check(prompt=length, batch=batch)
    text = "\n\n".join(document.text for document in bundled("heldout"))
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    if len(ids) < length + batch:
        raise InputError(
            f"{batch} prompts of --prompt {length} are more than the {len(ids):,} tokens of the bundled text hold; "
            f"give {max(2, len(ids) - batch)} at most"
        )
    first = torch.linspace(0, len(ids) - length, batch).long()
    return ids[first[:, None] + torch.arange(length)]
