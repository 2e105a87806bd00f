"""The fast tier: room for a fixed number of experts, in memory that is taken once.

Shapes: S slots, D hidden size, I neurons of one expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..moe.kernels import is_column_major
from .source import ExpertSource, ExpertWeights

if TYPE_CHECKING:
    from .policies.base import ExpertKey


class Slots:
    """Memory for experts on a CPU, filled by the threads that read.

    Args:
        count: experts that fit.
        like: an expert's shapes and dtype, without memory.
        device: whose memory it is.
    """

    def __init__(self, count: int, like: ExpertWeights, device: torch.device) -> None:
        # untouched pages take no memory, so a tier that is larger than needed costs nothing
        with torch.inference_mode(False):  # threads of their own write into it
            self.memory = ExpertWeights(*(_room(count, part, device) for part in like))
        self.free = list(range(count - 1, -1, -1))

    def at(self, slot: int) -> ExpertWeights:
        """Give the memory of a slot."""
        return ExpertWeights(self.memory.gate_up[slot], self.memory.down[slot])

    def fill(self, slot: int, source: ExpertSource, key: ExpertKey) -> int:
        """Read an expert into a slot; returns the bytes that came."""
        return source.read(key, self.at(slot))

    def arrive(self, slot: int) -> None:
        """Have what is calculated next wait until a slot is filled."""
        return

    def leave(self, slot: int) -> None:
        """Note that what uses a slot has been given to the device."""
        return


def _room(count: int, like: Tensor, device: torch.device) -> Tensor:
    """Take memory for so many matrices, each laid out as one is."""
    if is_column_major(like):
        return _room(count, like.mT, device).mT
    return torch.empty(count, *like.shape, dtype=like.dtype, device=device)


class CudaSlots(Slots):
    """Memory for experts on a GPU, filled over a stream of its own while another one calculates."""

    def __init__(self, count: int, like: ExpertWeights, device: torch.device) -> None:
        super().__init__(count, like, device)
        self.device, self.like = device, like
        self.stream = torch.cuda.Stream(device)
        self.filled = [torch.cuda.Event() for _ in range(count)]
        self.used = [torch.cuda.Event() for _ in range(count)]

    def fill(self, slot: int, source: ExpertSource, key: ExpertKey) -> int:
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.used[slot])  # the expert that was here may still be in use
            if source.is_pinned:
                size = source.read(key, self.at(slot))
            else:
                staged = ExpertWeights(
                    *(torch.empty(part.shape, dtype=part.dtype, pin_memory=True) for part in self.like)
                )  # torch's allocator keeps pinned memory, so this is cheap from the second time on
                size = source.read(key, staged)
                for part, target in zip(staged, self.at(slot), strict=True):
                    target.copy_(part, non_blocking=True)
            self.filled[slot].record(self.stream)
        return size

    def arrive(self, slot: int) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.filled[slot])

    def leave(self, slot: int) -> None:
        self.used[slot].record(torch.cuda.current_stream(self.device))


def make_slots(count: int, like: ExpertWeights, device: torch.device) -> Slots:
    """Make the fast tier of a device."""
    return (CudaSlots if device.type == "cuda" else Slots)(count, like, device)
