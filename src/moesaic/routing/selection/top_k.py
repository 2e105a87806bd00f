"""The k experts of greatest score: what all stock architectures do."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from .base import Counting, LayerSample, Parameters, Ranking, ScoringGate


@dataclass(frozen=True, kw_only=True)
class TopK(Counting):
    """`topk(scores + e_score_correction_bias, k)`; the model's own k unless another one is given."""

    dynamic_top_k: ClassVar[bool] = False

    k: Annotated[int, Field(ge=0)] = 0
    """Experts for every token; 0: the model's `num_experts_per_tok`, in calibration the number next to the budget."""

    def evidence(self, ranking: Ranking, hidden_TD: Tensor, parameters: Parameters) -> Tensor:
        return ranking.scores_TN

    def counts(self, ranking: Ranking, hidden_TD: Tensor, parameters: Parameters, default: int) -> Tensor:
        tokens, ranks = ranking.index_TN.shape
        return torch.full((tokens,), self.fixed(ranks, default), device=ranking.index_TN.device)

    def fixed(self, ranks: int, default: int) -> int:
        """Say how many run of so many ranks."""
        return int(self.within(torch.tensor(self.k or default), ranks, default))

    def select(self, scores_TE: Tensor, hidden_TD: Tensor, gate: ScoringGate) -> Tensor:
        count = self.fixed(scores_TE.shape[-1], gate.num_experts_per_tok)
        return (scores_TE + gate.e_score_correction_bias.float()).topk(count, dim=-1).indices

    def fit(self, layers: Sequence[LayerSample], mean: float) -> tuple[Self, list[Parameters]]:
        return replace(self, k=self.k or max(1, round(mean))), [s.parameters for s in layers]
