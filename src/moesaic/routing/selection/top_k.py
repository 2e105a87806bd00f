"""The k experts of greatest score: what all stock architectures do."""

from dataclasses import dataclass

from torch import Tensor

from .base import ScoringGate, Selection


@dataclass(frozen=True, kw_only=True)
class TopK(Selection):
    """`topk(scores + e_score_correction_bias, num_experts_per_tok)`."""

    def select(self, scores_TE: Tensor, hidden_TD: Tensor, gate: ScoringGate) -> Tensor:
        return (scores_TE + gate.e_score_correction_bias.float()).topk(gate.num_experts_per_tok, dim=-1).indices
