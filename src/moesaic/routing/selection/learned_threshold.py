"""A threshold on the router's scores that each expert learns as a function of the token; moesaic's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from .base import Learning, Parameters, Ranking, SelectionSizes


@dataclass(frozen=True, kw_only=True)
class LearnedThreshold(Learning):
    """As many run as pass `level_e > threshold + (W x + b)_e`, W [E, D] and b of each layer.

    Levels are scores, or logarithms of probabilities. Which experts run is the router's order, as everywhere: where one
    passes and a better one does not, the better one runs. It begins as `threshold` with one value for all layers, to
    which W = b = 0 is equal. It is as large as the allocator of Ada-K, which sees the token but not the router's scores
    and so has to learn first what they say.
    """

    reaches_zero: ClassVar[bool] = True

    threshold: float = 0.0
    """What `level` less the learnt part has to exceed; calibration sets it."""

    def parameters(self, config: SelectionSizes) -> Mapping[str, Tensor]:
        return {"weight": torch.zeros(config.num_experts, config.hidden_size), "bias": torch.zeros(config.num_experts)}

    def evidence(self, ranking: Ranking, hidden_TD: Tensor, parameters: Parameters) -> Tensor:
        learnt_TE = linear(hidden_TD.float(), parameters["weight"].float(), parameters["bias"].float())
        return ranking.levels_TN - learnt_TE.gather(-1, ranking.index_TN)

    def keep(self, evidence_TN: Tensor, temperature: float) -> Tensor:
        """Give `sigmoid((level - threshold - W x - b) / temperature)`."""
        return ((evidence_TN - self.threshold) / temperature).sigmoid()
