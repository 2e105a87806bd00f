"""CMoE's analytical router (arXiv 2502.04416, §3.3): one neuron's activation stands for its expert's.

Shapes: T tokens, D hidden size, E experts.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize, silu

from ..calibration.activations import LayerActivations
from ..partition import Partition
from .base import RouterBuilder


@dataclass(frozen=True, kw_only=True)
class Representative(RouterBuilder):
    """`|SiLU(x ĝ) (x û)|` with the representative neuron's unit-norm gate and up rows.

    A partition without representatives gets the most salient neuron of each expert.
    """

    gate: ClassVar[str] = "representative"

    balance_rounds: Annotated[int, Field(ge=0)] = 0
    """Rounds of auxiliary-loss-free load balancing on the calibration tokens: `b += step * sign(mean load - load)`."""
    balance_step: Annotated[float, Field(gt=0)] = 1e-3
    """CMoE's γ."""

    def build(self, sample: LayerActivations, partition: Partition, active: int) -> dict[str, Tensor]:
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
            parameters["e_score_correction_bias"] = balance(scores_TE, active, self.balance_rounds, self.balance_step)
        return parameters


def balance(scores_TE: Tensor, active: int, rounds: int, step: float) -> Tensor:
    """The selection bias [E] that evens out how many tokens choose each expert (DeepSeek-V3's and CMoE's rule)."""
    bias_E = torch.zeros_like(scores_TE[0])
    for _ in range(rounds):
        chosen_TK = (scores_TE + bias_E).topk(active, dim=1).indices
        load_E = torch.bincount(chosen_TK.flatten(), minlength=len(bias_E)).float()
        bias_E += step * (load_E.mean() - load_E).sign()
    return bias_E
