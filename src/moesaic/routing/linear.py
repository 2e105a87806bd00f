"""Ridge regression onto each expert's true output norm: moesaic's own router for disjoint experts.

Shapes: T tokens, D hidden size, E experts.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear

from ..calibration.activations import LayerActivations
from ..calibration.ridge import WeightedRidge
from ..partition import Partition
from .base import Gate, RoutedExperts, Router
from .selection.base import GateConfig


class LinearGate(Gate):
    """`x W.T`: ridge routers and centroids."""

    def __init__(self, config: GateConfig) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))

    def scores(self, hidden_TD: Tensor, experts: RoutedExperts) -> Tensor:
        return linear(hidden_TD.float(), self.weight.float())


@dataclass(frozen=True, kw_only=True)
class Linear(Router):
    """`min_{W,b} sum_t w_t² ‖x_t W + b - n_t‖² + ridge ‖W‖²`, n the experts' output norms centred per token."""

    gate_class: ClassVar[type[Gate]] = LinearGate

    ridge: Annotated[float, Field(ge=0)] = 1e-2
    """Relative to the mean diagonal of the normal equations."""
    intercept: bool = True
    """Whether there is a b; of the stock architectures only glm4_moe has one."""

    @property
    def has_bias(self) -> bool:
        return self.intercept

    def fit(self, sample: LayerActivations, partition: Partition, num_experts_per_tok: int) -> dict[str, Tensor]:
        target_TE = expert_norms(sample, partition)
        target_TE = target_TE - target_TE.mean(1, keepdim=True)
        ridge = WeightedRidge(sample.input_TD, sample.weight_T, self.ridge, self.intercept)
        weight_DE, bias_E = ridge.fit(target_TE)
        return {"weight": weight_DE.T.contiguous(), "e_score_correction_bias": bias_E}


def expert_norms(sample: LayerActivations, partition: Partition) -> Tensor:
    """Compute the norm of each expert's output, `‖h_e Wd_e‖`, float32 [T, E]."""
    down_DF = sample.ffn.down_DF
    parts = (
        torch.stack([linear(h_CF[:, e], down_DF[:, e]).float().norm(dim=1) for e in partition.experts], dim=1)
        for _, h_CF in sample.chunks()
    )
    return torch.cat(list(parts))
