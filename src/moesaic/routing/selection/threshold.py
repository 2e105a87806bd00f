"""All experts whose score is above a threshold: DSMoE's rule (arXiv 2502.12455, §3)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import ScoringGate, Selection, where_runs


@dataclass(frozen=True, kw_only=True)
class Threshold(Selection):
    """`scores > threshold`."""

    dynamic_top_k: ClassVar[bool] = True

    threshold: float = 0.5

    def select(self, scores_TE: Tensor, hidden_TD: Tensor, gate: ScoringGate) -> Tensor:
        return where_runs(scores_TE > self.threshold)
