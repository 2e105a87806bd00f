"""The experts that are chosen most often."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..sample import BlockSample
from .base import Kept, Pruner, best


@dataclass(frozen=True, kw_only=True)
class Frequency(Pruner):
    """`sum_t [token t runs expert e]`."""

    def select(self, sample: BlockSample, keep: int, generator: torch.Generator) -> Kept:
        return Kept(experts=best(sample.expert_tokens(), keep, sample.groups))
