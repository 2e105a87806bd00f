"""REAP: experts whose gated outputs are large where they run (Lasby et al., arXiv 2510.13999)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..sample import BlockSample
from .base import Kept, Pruner, best


@dataclass(frozen=True, kw_only=True)
class Reap(Pruner):
    """`S_e = mean over the tokens t that run e of g_e(t) ‖E_e(x_t)‖`; an expert that none runs has 0.

    The gates g are renormalised, so that a token's add up to 1, as the authors' code does since March 2026.
    """

    def select(self, sample: BlockSample, keep: int, generator: torch.Generator) -> Kept:
        return Kept(experts=best(saliency(sample), keep, sample.groups))


def saliency(sample: BlockSample) -> Tensor:
    """Compute S, float32 [E]."""
    weight_TE = sample.weights()
    gate_TE = weight_TE / weight_TE.sum(1, keepdim=True).clamp(min=1e-20)
    found = []
    for expert in range(sample.num_experts):
        token = weight_TE[:, expert].nonzero().squeeze(1)
        norm_T = sample.output(expert, token).float().norm(dim=1)
        found.append((gate_TE[token, expert] * norm_T).sum() / max(len(token), 1))
    return torch.stack(found)
