"""Whether neighbouring tokens run the same experts: measured, and made so by a loss.

LocMoE's (arXiv 2401.13920) divergence from what is near, as the residency of experts in a cache: near is what the token
before has just run (ReMoE, arXiv 2605.27081).

Shapes: M sequences, L tokens in one, T = M L tokens, E routed experts, K slots for experts in a token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def locality_loss(scores_TE: Tensor, index_TK: Tensor, length: int) -> Tensor:
    """Sum `KL(uniform over the experts of the token before || softmax(scores))` over tokens, nats; a first one has 0.

    Args:
        scores_TE: of sequences one after the other.
        index_TK: the experts that run; an index of E is none.
        length: tokens in a sequence.
    """
    count = scores_TE.shape[-1]
    log_share_MLE = scores_TE.log_softmax(-1).view(-1, length, count)
    before_TE = torch.zeros(len(index_TK), count + 1, device=scores_TE.device).scatter_(1, index_TK, 1.0)[:, :-1]
    before_TE = before_TE / before_TE.sum(-1, keepdim=True).clamp(min=1)
    before_MLE = before_TE.view(-1, length, count)[:, :-1]
    return (before_MLE * (before_MLE.clamp(min=1e-30).log() - log_share_MLE[:, 1:])).sum()


def kept_experts(index_TK: Tensor, length: int) -> float:
    """Measure the share of tokens, all but the first of each sequence, that run the experts of the one before."""
    set_MLK = index_TK.sort(-1).values.view(-1, length, index_TK.shape[1])
    same_ML = (set_MLK[:, 1:] == set_MLK[:, :-1]).all(-1)
    return same_ML.float().mean().item() if same_ML.numel() else 1.0
