"""What a converted model says of itself: the facts stored beside its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ..calibration.text import bundled
from ..checkpoint.reader import Checkpoint
from ..errors import InputError
from ..formats.converted import moesaic_fields


def inspect(folder: Path) -> dict[str, Any]:
    """Configuration, metrics and per-layer statistics of a converted model.

    Raises:
        InputError: not a folder that `convert` made.
    """
    facts = _saved(folder)
    checkpoint = Checkpoint(folder)
    moe = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size", "router")
    return {
        "folder": str(folder),
        "model": facts["model"],
        "architecture": checkpoint.config["architectures"][0],
        "bytes": checkpoint.size(),
        "moe": {name: moesaic_fields(checkpoint)[name] for name in moe},
        "config": facts["config"],
        **json.loads((folder / "metrics.json").read_text()),
    }


def dense_origin(model: str, option: str = "--against") -> str:
    """The dense model that a converted one came from; `option` is how a user would name it.

    Raises:
        InputError: unknown, or a folder that only its maker knows.
    """
    origin = _saved(Path(model))["model"]
    if origin.endswith(("/", ".gguf")):
        raise InputError(f"'{model}' was converted from the local '{origin}'; name it with {option}")
    return origin


def _saved(folder: Path) -> dict[str, Any]:
    path = folder / "moesaic.yaml"
    if not path.is_file():
        raise InputError(f"'{folder}' holds no moesaic.yaml; expected a folder made by 'moesaic convert'")
    return yaml.safe_load(path.read_text())


def prompt_tokens(tokenizer: Any, length: int, batch: int = 1) -> Tensor:
    """`batch` different prompts from the bundled held-out text, int64 [batch, length].

    Raises:
        InputError: the text has fewer tokens.
    """
    text = "\n\n".join(document.text for document in bundled("heldout"))
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    if len(ids) < length + batch:
        raise InputError(f"--prompt {length} is more than the {len(ids)} tokens of the bundled text")
    first = torch.linspace(0, len(ids) - length, batch).long()
    return ids[first[:, None] + torch.arange(length)]
