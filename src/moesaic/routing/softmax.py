"""Weights that sum to 1, for experts that are whole FFNs: MoE-LLaVA's router (arXiv 2401.15947, §3.2).

Shapes: T tokens, D hidden size, E routed experts, K slots for experts in a token.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..calibration.activations import LayerActivations
from ..models.moe_block import Routing
from ..partition import Partition
from .base import DenseConfig, Gate, Router, gather
from .linear import LinearGate
from .selection.base import GateConfig

TINY = 1e-12


class SoftmaxGate(LinearGate):
    """`p = softmax(x W.T)` over all experts; those that run are weighted by p, or by p over their sum of it.

    The gradient of the weights reaches W. A single expert that is weighted by its share of its own p has none, so that
    in training it gets the straight-through one of other gates.
    """

    def __init__(self, config: GateConfig) -> None:
        super().__init__(config)
        self.norm_topk_prob = config.norm_topk_prob

    def weigh(self, scores_TE: Tensor, index_TK: Tensor, dtype: torch.dtype) -> Routing:
        if self.norm_topk_prob and index_TK.shape[-1] == 1:
            return super().weigh(scores_TE, index_TK, dtype)
        share_TK = gather(scores_TE.softmax(-1), index_TK, True)  # slots may be empty by a rule from outside, too
        return Routing(index_TK, self.rank_weights(share_TK).to(dtype))

    def rank_weights(self, shares_TK: Tensor) -> Tensor:
        return shares_TK / shares_TK.sum(-1, keepdim=True).clamp(min=TINY) if self.norm_topk_prob else shares_TK


@dataclass(frozen=True, kw_only=True)
class Softmax(Router):
    """`x W.T` with small random rows, as the paper starts: of experts that are equal none is better for any token."""

    gate_class: ClassVar[type[Gate]] = SoftmaxGate
    averages: ClassVar[bool] = True

    renormalised: bool = True
    """Whether the weights of those that run are divided by their sum, so that equal experts give the dense output. So
    the paper's code does (DeepSpeed's gate for two experts); its formula does not."""
    seed: int = 0
    """Seed of the router's random rows."""

    def model_fields(self, config: DenseConfig) -> dict[str, int]:
        return super().model_fields(config) | {"norm_topk_prob": self.renormalised}

    def fit(self, sample: LayerActivations, partition: Partition, num_experts_per_tok: int) -> dict[str, Tensor]:
        """Draw W evenly from `±1 / √D`, as a linear layer starts; each layer of a model draws other numbers."""
        bits = sample.ffn.gate_FD[0].float().contiguous().view(torch.int32).long().sum().item()
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + int(bits)) % 2**63)
        hidden = sample.input_TD.shape[1]
        weight_ED = 2 * torch.rand(len(partition.experts), hidden, generator=generator) - 1
        return {"weight": (weight_ED / hidden**0.5).to(sample.input_TD.device)}
