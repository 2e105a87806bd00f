"""All experts whose score comes near the token's greatest: D2DMoE's rule (arXiv 2310.04361, §3.3)."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from .base import ScoringGate, Selection, where_runs


@dataclass(frozen=True, kw_only=True)
class Relative(Selection):
    """`scores >= threshold × the token's greatest score`; fewer experts run as it rises, 0 runs all positive ones."""

    dynamic_top_k: ClassVar[bool] = True

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The paper's τ."""

    def select(self, scores_TE: Tensor, hidden_TD: Tensor, gate: ScoringGate) -> Tensor:
        return where_runs(scores_TE >= self.threshold * scores_TE.amax(-1, keepdim=True))
