"""Load any model that moesaic accepts or makes, ready to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..errors import InputError
from .checkpoint import Checkpoint
from .converted import Converted, is_native
from .sources import resolve


def load(
    model: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "auto"
) -> tuple[PreTrainedModel, Any]:
    """(model in eval mode, tokenizer) of a folder, hub id, .gguf file or built-in name, dense or converted.

    A native form that `moesaic export` wrote is read back into the working form, bit by bit what it was written from.

    Raises:
        InputError: no such model, or a folder that is damaged.
    """
    folder = resolve(str(model))
    checkpoint = Checkpoint(folder)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded: Any
    try:
        if is_native(checkpoint):
            loaded = Converted(folder).load(dtype or checkpoint.dtype())
        else:
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or checkpoint.dtype())
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"transformers cannot load '{folder}': {str(error).splitlines()[0]}") from error
    return loaded.to(device).eval(), load_tokenizer(folder)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder.

    Raises:
        InputError: there is none, or transformers cannot read it.
    """
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"no usable tokenizer in '{folder}' ({reason}); put the model's tokenizer files there"
        ) from error
