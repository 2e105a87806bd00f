"""FactorLLM (arXiv 2408.11855): the router learns which experts alone come nearest to the dense FFN's output."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, linear
from transformers import PreTrainedModel

from ...moe.block import MoE
from .base import DenseFFN, check_parts
from .full import Full


@dataclass(frozen=True, kw_only=True)
class FactorLLM(Full):
    """`L = L_task + KL(label || softmax(scores))`: the prior-approximate router beside full training.

    The label has 1/K for each of the K experts with the least `‖E_i(x) - FFN(x) K / E‖`; a shared expert's output is
    taken off the FFN's first.
    """

    needs_dense: ClassVar[bool] = True

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        check_parts(model, "its label asks an expert for K / E of the FFN's output")
        return super().prepare(model)

    def layer_loss(self, moe: MoE, x_TD: Tensor, index_TK: Tensor, dense: DenseFFN | None) -> Tensor | None:
        assert dense is not None
        gate, experts = moe.routed
        x_TD = x_TD.detach()
        label_TE = labels(moe, x_TD, dense(x_TD), (index_TK < experts.num_experts).sum(1, keepdim=True))
        log_share_TE = gate.exact_scores(x_TD, experts).log_softmax(-1)
        return kl_div(log_share_TE, label_TE, reduction="sum")


@torch.no_grad()
def labels(moe: MoE, x_TD: Tensor, dense_TD: Tensor, active_T1: Tensor) -> Tensor:
    """Compute the distribution over experts that the router should have, float32 [T, E].

    Args:
        moe: the block.
        x_TD: what enters it.
        dense_TD: what the dense FFN makes of it.
        active_T1: how many experts run for each token, int64; where none does, the label is for one.
    """
    _, experts = moe.routed
    active_T1 = active_T1.clamp(min=1)
    target_TD = dense_TD.float()
    if moe.shared_experts is not None:
        target_TD = target_TD - moe.shared_experts(x_TD).float()
    target_TD = target_TD * active_T1 / experts.num_experts
    outputs = (linear(experts.hidden(x_TD, e), experts.down_proj[e]).float() for e in range(experts.num_experts))
    error_TE = torch.stack([(output_TD - target_TD).square().sum(-1) for output_TD in outputs], dim=-1)
    rank_TE = error_TE.argsort(-1).argsort(-1)
    return (rank_TE < active_T1).float() / active_T1
