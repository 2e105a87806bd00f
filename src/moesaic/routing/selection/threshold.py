"""All experts whose score is above one threshold for all layers; DSMoE's rule (arXiv 2502.12455, §3)."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from .base import Counting, Parameters, Ranking


@dataclass(frozen=True, kw_only=True)
class Threshold(Counting):
    """`scores > threshold`; DSMoE's scores are sigmoids, a stock router's its probabilities."""

    reaches_zero: ClassVar[bool] = True

    at_least: Annotated[int, Field(ge=0)] = 0
    threshold: float = 0.5
    """Score above which an expert runs; calibration sets it."""

    def evidence(self, ranking: Ranking, hidden_TD: Tensor, parameters: Parameters) -> Tensor:
        return ranking.scores_TN
