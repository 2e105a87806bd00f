"""The baseline of chance."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..sample import BlockSample
from .base import Kept, Pruner, best


@dataclass(frozen=True, kw_only=True)
class Random(Pruner):
    """Experts drawn without replacement, by the seed."""

    def select(self, sample: BlockSample, keep: int, generator: torch.Generator) -> Kept:
        return Kept(experts=best(torch.rand(sample.num_experts, generator=generator), keep, sample.groups))
