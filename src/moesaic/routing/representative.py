"""CMoE's analytical router (arXiv 2502.04416, §3.3): one neuron's activation stands for its expert's.

Shapes: T tokens, D hidden size, E experts.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear, normalize, silu

from ..calibration.activations import LayerActivations
from ..models.moe_block import Routing
from ..partition import Partition
from .base import Gate, RoutedExperts, Router, gather
from .selection.base import GateConfig


class RepresentativeGate(Gate):
    """`|SiLU(x g.T) * (x u.T)|` of one representative neuron an expert (CMoE, arXiv 2502.04416, §3.3).

    The chosen experts are weighted by `1 + softmax(scores) * scale` with the learnable `scale` (CMoE's u) 0 at first.
    """

    trainable_names: ClassVar[tuple[str, ...]] = ("scale",)

    def __init__(self, config: GateConfig) -> None:
        super().__init__(config)
        self.gate_proj = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self.up_proj = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self.scale = nn.Parameter(torch.zeros(config.num_experts))

    def scores(self, hidden_TD: Tensor, experts: RoutedExperts) -> Tensor:
        x_TD = hidden_TD.float()
        return (silu(linear(x_TD, self.gate_proj.float())) * linear(x_TD, self.up_proj.float())).abs()

    def weigh(self, scores_TE: Tensor, index_TK: Tensor, dtype: torch.dtype) -> Routing:
        weights_TE = 1 + scores_TE.softmax(-1) * self.scale.float()
        return Routing(index_TK, gather(weights_TE, index_TK, True).to(dtype))  # a rule from outside may leave slots


@dataclass(frozen=True, kw_only=True)
class Representative(Router):
    """`|SiLU(x ĝ) (x û)|` with the representative neuron's unit-norm gate and up rows.

    A partition without representatives gets the most salient neuron of each expert.
    """

    gate_class: ClassVar[type[Gate]] = RepresentativeGate

    balance_rounds: Annotated[int, Field(ge=0)] = 0
    """Rounds of auxiliary-loss-free load balancing on the calibration tokens: `b += step * sign(mean load - load)`."""
    balance_step: Annotated[float, Field(gt=0)] = 1e-3
    """How far a bias moves in a round; CMoE's γ."""

    @property
    def has_bias(self) -> bool:
        return self.balance_rounds > 0

    def fit(self, sample: LayerActivations, partition: Partition, num_experts_per_tok: int) -> dict[str, Tensor]:
        neurons = partition.representatives
        if neurons is None:
            _, _, saliency_F = sample.moments()
            best = saliency_F[partition.experts].argmax(1, keepdim=True)
            neurons = partition.experts.gather(1, best).squeeze(1)
        ffn = sample.ffn
        parameters = {
            "gate_proj": normalize(ffn.gate_FD[neurons].float()),
            "up_proj": normalize(ffn.up_FD[neurons].float()),
            "scale": torch.zeros(len(neurons)),
        }
        if self.balance_rounds:
            x_TD = sample.input_TD.float()
            scores_TE = (silu(x_TD @ parameters["gate_proj"].T) * (x_TD @ parameters["up_proj"].T)).abs()
            parameters["e_score_correction_bias"] = balance(
                scores_TE, num_experts_per_tok, self.balance_rounds, self.balance_step
            )
        return parameters


def balance(scores_TE: Tensor, active: int, rounds: int, step: float) -> Tensor:
    """Fit the selection bias [E] that evens out how many tokens choose each expert (DeepSeek-V3's and CMoE's rule)."""
    bias_E = torch.zeros_like(scores_TE[0])
    for _ in range(rounds):
        chosen_TK = (scores_TE + bias_E).topk(active, dim=1).indices
        load_E = torch.bincount(chosen_TK.flatten(), minlength=len(bias_E)).float()
        bias_E += step * (load_E.mean() - load_E).sign()
    return bias_E
