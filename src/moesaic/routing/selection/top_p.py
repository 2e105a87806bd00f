"""The best experts until their shares sum to p: MoED (Huang et al., "Harder Tasks Need More Experts", 2403.07652)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from .base import Counting, Parameters, Ranking


@dataclass(frozen=True, kw_only=True)
class TopP(Counting):
    """The fewest best experts whose shares of the token, which sum to 1, reach p."""

    budget: ClassVar[str] = "p"
    falling: ClassVar[bool] = False

    p: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Share of the token that the experts have to reach."""

    def evidence(self, ranking: Ranking, hidden_TD: Tensor, parameters: Parameters) -> Tensor:
        share_TN = ranking.shares_TN / ranking.shares_TN.sum(-1, keepdim=True).clamp(min=1e-12)
        return share_TN.cumsum(-1) - share_TN

    def count(self, evidence_TN: Tensor) -> Tensor:
        return (evidence_TN < self.p).sum(-1)

    def bounds(self, evidence: Sequence[Tensor]) -> tuple[float, float]:
        return 0.0, 1.0
