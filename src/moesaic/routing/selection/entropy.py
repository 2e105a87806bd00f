"""More experts where the router is undecided: as many as the perplexity of its distribution (Adaptive-K, Balsamo)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from .base import Counting, Parameters, Ranking


@dataclass(frozen=True, kw_only=True)
class Entropy(Counting):
    """`count = floor(scale × exp(H))`, H the entropy in nats of the shares, which sum to 1."""

    budget: ClassVar[str] = "scale"
    falling: ClassVar[bool] = False
    reaches_zero: ClassVar[bool] = True

    scale: Annotated[float, Field(ge=0)] = 1.0
    """How many experts run where the distribution's perplexity is 1."""

    def evidence(self, ranking: Ranking, hidden_TD: Tensor, parameters: Parameters) -> Tensor:
        share_TN = ranking.shares_TN / ranking.shares_TN.sum(-1, keepdim=True).clamp(min=1e-12)
        entropy_T1 = -torch.special.xlogy(share_TN, share_TN).sum(-1, keepdim=True)
        rank_N = torch.arange(1, share_TN.shape[1] + 1, device=share_TN.device)
        return entropy_T1.exp() / rank_N

    def count(self, evidence_TN: Tensor) -> Tensor:
        return (evidence_TN * self.scale >= 1).sum(-1)

    def bounds(self, evidence: Sequence[Tensor]) -> tuple[float, float]:
        return 0.0, float(max(part.shape[1] for part in evidence))
