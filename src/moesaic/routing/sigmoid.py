"""Each expert opens by its own sigmoid: DSMoE's router (arXiv 2502.12455, §3).

Shapes: T tokens, D hidden size, E routed experts, K slots for experts in a token.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..calibration.activations import LayerActivations
from ..models.moe_block import Routing
from ..partition import Partition
from .base import Gate, RoutedExperts, gather, unit_scores
from .linear import Linear, LinearGate


class SigmoidGate(LinearGate):
    """`z = sigmoid(x W.T)`; the experts that run are weighted by `z E / (number that run)`.

    In training all experts run, with the weight of those that should not 0 and the gradient of z (straight-through).
    """

    def scores(self, hidden_TD: Tensor, experts: RoutedExperts) -> Tensor:
        return super().scores(hidden_TD, experts).sigmoid()

    def shares(self, scores_TE: Tensor) -> Tensor:
        """Take the sigmoids themselves."""
        return scores_TE

    def weigh(self, scores_TE: Tensor, index_TK: Tensor, dtype: torch.dtype) -> Routing:
        count = scores_TE.shape[-1]
        runs_TE = torch.zeros_like(scores_TE[:, :1]).bool().expand(-1, count + 1).scatter(1, index_TK, True)[:, :-1]
        if self.training and torch.is_grad_enabled():
            weights_TK = (scores_TE * runs_TE).detach() + scores_TE - scores_TE.detach()
            index_TK = torch.arange(count, device=scores_TE.device).expand_as(scores_TE)
        else:
            weights_TK = gather(scores_TE, index_TK, self.selection.dynamic_top_k)
        return Routing(index_TK, (weights_TK * count / runs_TE.sum(-1, keepdim=True).clamp(min=1)).to(dtype))


@dataclass(frozen=True, kw_only=True)
class Sigmoid(Linear):
    """The ridge regression of `linear`; an expert with more than the mean norm of a token opens."""

    gate_class: ClassVar[type[Gate]] = SigmoidGate
    default_selection: ClassVar[str] = "threshold"

    intercept: bool = False

    def fit(self, sample: LayerActivations, partition: Partition, num_experts_per_tok: int) -> dict[str, Tensor]:
        return unit_scores(super().fit(sample, partition, num_experts_per_tok), sample.input_TD)
