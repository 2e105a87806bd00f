"""Skip the lesser experts of a token whose best one dominates: NAEE's dynamic skipping (arXiv 2402.14800, §3.3)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from .base import Counting, LayerSample, Parameters, Ranking, SelectionSizes, bisected, mean_count

STEPS = 24
"""Of bisection."""


@dataclass(frozen=True, kw_only=True)
class Skip(Counting):
    """`share >= ratio × the token's greatest share`, with a ratio for each layer, among the default number of experts.

    The ratio is a quantile of the lesser experts' shares over the greatest on calibration tokens: of the second's in
    NAEE, which has two experts a token, and the median.
    """

    budget: ClassVar[str] = "quantile"
    only_fewer: ClassVar[bool] = True

    quantile: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the lesser experts that are skipped; 0.5 is the paper's median."""

    def parameters(self, config: SelectionSizes) -> Mapping[str, Tensor]:
        return {"ratio": torch.zeros(())}

    def evidence(self, ranking: Ranking, hidden_TD: Tensor, parameters: Parameters) -> Tensor:
        return _ratios(ranking) - parameters["ratio"].float()

    def count(self, evidence_TN: Tensor) -> Tensor:
        return (evidence_TN >= 0).sum(-1)

    def fit(self, layers: Sequence[LayerSample], mean: float) -> tuple[Self, list[Parameters]]:
        def runs_more(quantile: float) -> bool:
            tried = [s._replace(evidence_TN=_ratios(s.ranking) - _ratio(s, quantile)) for s in layers]
            return mean_count(self, tried) > mean

        _, high = bisected(0.0, 1.0, runs_more, STEPS)
        return replace(self, quantile=high), [{"ratio": _ratio(s, high)} for s in layers]


def _ratio(layer: LayerSample, quantile: float) -> Tensor:
    """Find the quantile of the lesser experts' shares over the greatest."""
    ratios = _ratios(layer.ranking)[:, 1 : layer.default].flatten()
    return torch.quantile(_some(ratios), quantile) if len(ratios) else torch.zeros(())


def _ratios(ranking: Ranking) -> Tensor:
    return ranking.shares_TN / ranking.shares_TN.amax(-1, keepdim=True).clamp(min=1e-12)


def _some(values: Tensor, most: int = 1 << 20) -> Tensor:
    """Take evenly spaced values, no more than `torch.quantile` sorts."""
    return values[:: -(-len(values) // most)] if len(values) > most else values
