"""A small network predicts the norm of each expert's output: D2DMoE's router (arXiv 2310.04361, §3.3).

Shapes: T tokens, D hidden size, E routed experts, K slots for experts in a token, H width of the network.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear, relu

from ..calibration.activations import LayerActivations
from ..calibration.ridge import WeightedRidge
from ..models.moe_block import Routing
from ..partition import Partition
from .base import Gate, RoutedExperts, Router
from .linear import expert_norms
from .selection.base import GateConfig


class NormGate(Gate):
    """`|relu(x W1.T) W2.T|`; all chosen experts have weight 1. It is trained by the layer's own loss only."""

    learns_by_objective: ClassVar[bool] = False
    trainable_names: ClassVar[tuple[str, ...]] = ("hidden_proj", "weight")

    def __init__(self, config: GateConfig) -> None:
        super().__init__(config)
        self.hidden_proj = nn.Parameter(torch.zeros(config.router_hidden_size, config.hidden_size))
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.router_hidden_size))

    def scores(self, hidden_TD: Tensor, experts: RoutedExperts) -> Tensor:
        return linear(relu(linear(hidden_TD.float(), self.hidden_proj.float())), self.weight.float()).abs()

    def shares(self, scores_TE: Tensor) -> Tensor:
        """Take the predicted norms themselves, none of which is negative."""
        return scores_TE

    def weigh(self, scores_TE: Tensor, index_TK: Tensor, dtype: torch.dtype) -> Routing:
        return Routing(index_TK, (index_TK < self.num_experts).to(dtype))


@dataclass(frozen=True, kw_only=True)
class Norm(Router):
    """Random first weights, the second by ridge regression onto the norms; `finetune --method d2dmoe` trains both."""

    gate_class: ClassVar[type[Gate]] = NormGate
    default_selection: ClassVar[str] = "relative"

    ridge: Annotated[float, Field(gt=0)] = 1e-2
    """Relative to the mean diagonal of the normal equations."""
    width: Annotated[int, Field(gt=0)] = 128
    """Neurons of the router's hidden layer."""

    @property
    def router_hidden_size(self) -> int:
        return self.width

    def fit(self, sample: LayerActivations, partition: Partition, num_experts_per_tok: int) -> dict[str, Tensor]:
        hidden = sample.input_TD.shape[1]
        generator = torch.Generator().manual_seed(0)
        first_HD = (torch.randn(self.width, hidden, generator=generator) / hidden**0.5).to(sample.input_TD.device)
        hidden_TH = relu(linear(sample.input_TD.float(), first_HD))
        ridge = WeightedRidge(hidden_TH, sample.weight_T, self.ridge, intercept=False)
        weight_HE, _ = ridge.fit(expert_norms(sample, partition))
        return {"hidden_proj": first_HD, "weight": weight_HE.T.contiguous()}
