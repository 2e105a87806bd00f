"""A threshold on the router's scores that each layer learns as a function of the token; moesaic's own."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from .base import Learning, Parameters, Ranking, SelectionSizes


@dataclass(frozen=True, kw_only=True)
class LearnedThreshold(Learning):
    """`level > threshold + W x + b`, W [1, D] and b of each layer; levels are scores, or logarithms of probabilities.

    It begins as `threshold` with one value for all layers, to which W = b = 0 is equal, and knows what the allocator of
    Ada-K, which sees the token but not the router's scores, has to learn first.
    """

    threshold: float = 0.0

    def parameters(self, config: SelectionSizes) -> Mapping[str, Tensor]:
        return {"weight": torch.zeros(1, config.hidden_size), "bias": torch.zeros(1)}

    def evidence(self, ranking: Ranking, hidden_TD: Tensor, parameters: Parameters) -> Tensor:
        return ranking.levels_TN - linear(hidden_TD.float(), parameters["weight"].float(), parameters["bias"].float())

    def keep(self, evidence_TN: Tensor, temperature: float) -> Tensor:
        """Give `sigmoid((level - threshold - W x - b) / temperature)`."""
        return ((evidence_TN - self.threshold) / temperature).sigmoid()
