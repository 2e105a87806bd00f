"""A learned policy says how many experts run: Ada-K (ICLR 2025, arXiv 2410.10456, §3)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from .base import Learning, Parameters, Ranking, SelectionSizes


@dataclass(frozen=True, kw_only=True)
class AdaK(Learning):
    """`count = 1 + argmax_n (W x - penalty n)_n`, W a bias-free [N, D] allocator in each layer.

    The paper says how many are drawn in training, `n ~ softmax(W x)`, and not what is done in use: here the likeliest
    number runs, or one is drawn. `penalty` is 0 in the paper; it moves a trained policy to a budget.
    """

    budget: ClassVar[str] = "penalty"
    default_learner: ClassVar[str] = "ppo"

    penalty: float = 0.0
    """In nats an expert."""
    sample: bool = False
    """Whether the number is drawn from the policy in place of its likeliest."""

    def parameters(self, config: SelectionSizes) -> Mapping[str, Tensor]:
        return {"weight": torch.zeros(config.num_experts, config.hidden_size)}

    def evidence(self, ranking: Ranking, hidden_TD: Tensor, parameters: Parameters) -> Tensor:
        logits_TN = linear(hidden_TD.float(), parameters["weight"].float())
        return logits_TN[:, : ranking.index_TN.shape[1]]

    def tilted(self, evidence_TN: Tensor) -> Tensor:
        """Compute the policy's logits under the penalty, [T, N]."""
        return evidence_TN - self.penalty * torch.arange(evidence_TN.shape[1], device=evidence_TN.device)

    def count(self, evidence_TN: Tensor) -> Tensor:
        logits_TN = self.tilted(evidence_TN)
        if self.sample and len(logits_TN):
            return 1 + logits_TN.softmax(-1).multinomial(1)[:, 0]
        return 1 + logits_TN.argmax(-1)

    def keep(self, evidence_TN: Tensor, temperature: float) -> Tensor:
        """Give `P(count >= rank)`, the policy's survival function."""
        return self.tilted(evidence_TN).softmax(-1).flip(-1).cumsum(-1).flip(-1)

    def looser(self, evidence_TN: Tensor) -> Tensor:
        """Say how logits move as the penalty falls: by the number of experts."""
        return torch.arange(evidence_TN.shape[1], device=evidence_TN.device).expand_as(evidence_TN).float()

    def bounds(self, evidence: Sequence[Tensor]) -> tuple[float, float]:
        most = max(float((part.amax(-1) - part.amin(-1)).amax()) for part in evidence) + 1
        return -most, most
