"""The device and the dtype that a user asks for, and the dtype that the device is fast in."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

import torch
from torch.nn.functional import linear

from ..checkpoint.reader import Checkpoint
from ..checkpoint.writer import partial_folder, read_state
from ..errors import InputError, first_line

CHOICES = ("bfloat16", "float16", "float32", "float64")
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in CHOICES}
DTYPES |= {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Those that models can calculate in, by name."""
COMPUTE_DTYPE = "compute dtype"
"""Of what unfinished work must agree in."""
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
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # meta has no values
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(
            f"--device {name} cannot be used here: {first_line(error)}; choose from: {', '.join(devices())}"
        ) from error
    if device.type == "cpu" and device.index:  # accelerate calls it cpu:0
        raise InputError(f"--device {name} has a number, and there is one cpu; choose from: {', '.join(devices())}")
    return device


def devices() -> list[str]:
    """List the names of devices that a user can choose here."""
    found = ["auto", "cpu"]
    if torch.cuda.is_available():
        found += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return found + ["mps"] * torch.backends.mps.is_available()


def choose_dtype(name: str, source: Path) -> torch.dtype:
    """Choose the dtype of the weights; `auto` is the checkpoint's.

    Raises:
        InputError: none of `DTYPES`, or a checkpoint of another.
    """
    check_dtype(name)
    dtype = Checkpoint(source).dtype() if name == "auto" else DTYPES[name]
    if dtype not in DTYPES.values():
        raise InputError(f"the weights of '{source}' are of {dtype}; choose one with --dtype: {', '.join(CHOICES)}")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as configurations do, e.g. `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def check_dtype(name: str) -> None:
    """Check that a dtype is one to calculate in.

    Raises:
        InputError: it is not.
    """
    if name != "auto" and name not in DTYPES:
        raise InputError(f"--dtype {name} is not one of auto, {', '.join(CHOICES)}")


def begun_dtype(output: Path) -> torch.dtype | None:
    """Read the dtype that unfinished work on OUT calculates in; another day's timing might choose another one."""
    state = read_state(partial_folder(output))
    found = getattr(torch, state.fingerprint.get(COMPUTE_DTYPE, ""), None) if state else None
    return found if isinstance(found, torch.dtype) else None


@cache
def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Choose the dtype to multiply weights of `dtype` in: float32 on a CPU that does so faster than in half precision.

    CPUs without bfloat16 units take many times as long for it, some with them twice as long; measured in some 100 ms.
    """
    if device.type != "cpu" or dtype.itemsize != 2:
        return dtype

    def seconds(dtype: torch.dtype) -> float:
        x_TD, weight_ID = torch.zeros(512, 512, dtype=dtype), torch.zeros(512, 512, dtype=dtype)
        start = time.perf_counter()
        linear(x_TD, weight_ID)
        return time.perf_counter() - start

    # in turn, so that what else the machine does meets both
    rounds = [(seconds(torch.float32), seconds(dtype)) for _ in range(5)]
    wide, half = map(min, zip(*rounds, strict=True))
    return torch.float32 if FASTER * wide < half else dtype
