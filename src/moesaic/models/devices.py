"""The device and the dtype that a user asks for."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import InputError
from .checkpoint import Checkpoint


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is the GPU when there is one.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error


def choose_dtype(name: str, source: Path) -> torch.dtype:
    """The dtype to convert in; `auto` is the checkpoint's.

    Raises:
        InputError: not a floating-point dtype's name.
    """
    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    dtype = Checkpoint(source).dtype() if name == "auto" else getattr(torch, names.get(name, name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"--dtype {name} is not one of auto, bfloat16, float16, float32")
    return dtype
