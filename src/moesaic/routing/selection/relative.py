"""All experts whose share comes near the greatest: D2DMoE's rule (arXiv 2310.04361, §3.3), ik_llama.cpp's `-ser`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from .base import Counting, Parameters, Ranking


@dataclass(frozen=True, kw_only=True)
class Relative(Counting):
    """`share >= threshold × the token's greatest share`; fewer experts run as it rises, 0 runs all.

    `-ser K,t` of ik_llama.cpp is `relative:at_least=K,threshold=t,at_most=M`, M its `expert_used_count`.
    """

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the greatest that an expert needs; D2DMoE's τ."""

    def evidence(self, ranking: Ranking, hidden_TD: Tensor, parameters: Parameters) -> Tensor:
        return ranking.shares_TN

    def count(self, evidence_TN: Tensor) -> Tensor:
        return (evidence_TN >= self.threshold * evidence_TN.amax(-1, keepdim=True)).sum(-1)

    def bounds(self, evidence: Sequence[Tensor]) -> tuple[float, float]:
        return 0.0, 1.0
