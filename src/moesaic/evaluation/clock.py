"""The time, once a device has done what it was given."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from transformers import PreTrainedModel


def now(model: PreTrainedModel | Tensor) -> float:
    """Wait for the device of a model or tensor, and tell the time in seconds."""
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
    return time.perf_counter()
