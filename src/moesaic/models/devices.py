"""The device and the dtype that a user asks for, and the dtype that the device is fast in."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

import torch
from torch.nn.functional import linear

from ..checkpoint.reader import Checkpoint
from ..errors import InputError

FASTER = 1.25
"""How much faster float32 must be to be worth twice the memory."""


def choose_device(name: str) -> torch.device:
    """Choose the device of that name; `auto` is the GPU when there is one.

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
    """Choose the dtype of the weights; `auto` is the checkpoint's.

    Raises:
        InputError: not a floating-point dtype's name.
    """
    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    dtype = Checkpoint(source).dtype() if name == "auto" else getattr(torch, names.get(name, name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"--dtype {name} is not one of auto, bfloat16, float16, float32")
    return dtype


@cache
def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Choose the dtype to multiply weights of `dtype` in: float32 on a CPU that does so faster than in half precision.

    CPUs without bfloat16 units take many times as long for it, some with them twice as long; measured in some 100 ms.
    """
    if device.type != "cpu" or dtype.itemsize != 2:
        return dtype

    def seconds(dtype: torch.dtype) -> float:
        x_TD, weight_ID = torch.zeros(512, 1_024, dtype=dtype), torch.zeros(1_024, 1_024, dtype=dtype)
        linear(x_TD, weight_ID)
        start = time.perf_counter()
        linear(x_TD, weight_ID)
        return time.perf_counter() - start

    # in turn, so that what else the machine does meets both
    rounds = [(seconds(torch.float32), seconds(dtype)) for _ in range(5)]
    wide, half = map(min, zip(*rounds, strict=True))
    return torch.float32 if FASTER * wide < half else dtype
