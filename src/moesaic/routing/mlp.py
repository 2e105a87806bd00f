"""MoEfication's router (Zhang et al., ACL-F 2022, §3.3): a small network that predicts each expert's activation.

Shapes: T tokens, D hidden size, E experts.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, linear

from ..calibration.activations import LayerActivations
from ..partition import Partition
from .base import Gate, RoutedExperts, Router
from .selection.base import GateConfig


class MLPGate(Gate):
    """`tanh(x W1.T) W2.T`, a small network that predicts how much each expert will say (MoEfication)."""

    trainable_names: ClassVar[tuple[str, ...]] = ("hidden_proj", "weight")

    def __init__(self, config: GateConfig) -> None:
        super().__init__(config)
        self.hidden_proj = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.num_experts))

    def scores(self, hidden_TD: Tensor, experts: RoutedExperts) -> Tensor:
        return linear(linear(hidden_TD.float(), self.hidden_proj.float()).tanh(), self.weight.float())


@dataclass(frozen=True, kw_only=True)
class MLP(Router):
    """`tanh(x W1.T) W2.T` of width E, fitted by Adam to the experts' sums of |h| over the token's largest.

    The paper sums positive activations of ReLU models; gated ones have signs, so magnitudes are summed.
    """

    gate_class: ClassVar[type[Gate]] = MLPGate

    steps: Annotated[int, Field(gt=0)] = 300
    """Steps of 1,024 tokens."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    """Adam's learning rate, as in MoEfication."""

    def fit(self, sample: LayerActivations, partition: Partition, num_experts_per_tok: int) -> dict[str, Tensor]:
        target_TE = torch.cat([h_CF.float().abs()[:, partition.experts].sum(2) for _, h_CF in sample.chunks()])
        target_TE /= target_TE.amax(1, keepdim=True).clamp(min=1e-12)
        x_TD = sample.input_TD.float()
        scale = x_TD.square().mean().sqrt()
        generator = torch.Generator().manual_seed(0)
        experts, hidden = target_TE.shape[1], x_TD.shape[1]
        first, second = (
            (torch.randn(experts, size, generator=generator) / size**0.5).to(x_TD.device).requires_grad_()
            for size in (hidden, experts)
        )
        optimizer = torch.optim.Adam([first, second], self.learning_rate)
        with torch.enable_grad():
            for _ in range(self.steps):
                pick = torch.randint(len(x_TD), (1_024,), generator=generator)
                logits = (x_TD[pick] / scale @ first.T).tanh() @ second.T
                loss = binary_cross_entropy_with_logits(logits, target_TE[pick])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return {"hidden_proj": (first / scale).detach(), "weight": second.detach()}
