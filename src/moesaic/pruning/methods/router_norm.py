"""The experts that the router has the longest rows for; looks at no text."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..sample import BlockSample
from .base import Kept, Pruner, best


@dataclass(frozen=True, kw_only=True)
class RouterNorm(Pruner):
    """`‖W_e‖`, the norm of the router's row of expert e."""

    def select(self, sample: BlockSample, keep: int, generator: torch.Generator) -> Kept:
        return Kept(experts=best(sample.router_rows().norm(dim=1), keep, sample.groups))
