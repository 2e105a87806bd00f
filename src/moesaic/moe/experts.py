"""Routed experts: 3-D weights and the naive forward that fast implementations are held to.

Shapes: T tokens, D hidden size, E routed experts, I neurons of one, K active experts.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.integrations import use_experts_implementation

from ..routing.selection.base import GateConfig


class MoEConfig(GateConfig, Protocol):
    """What the block needs to know of a model's configuration."""

    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    shared_expert_bias: bool


@use_experts_implementation
class Experts(nn.Module):
    """Routed experts as 3-D weights; transformers' experts interface swaps this naive forward for a fast one."""

    may_have_empty_slots = False
    """Whether indices of E, which stand for no expert, may come."""

    def __init__(self, config: MoEConfig, act_fn: nn.Module) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        width, hidden = config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, width))
        self.act_fn = act_fn

    def hidden(self, x_TD: Tensor, expert: int) -> Tensor:
        """Compute the activations of one expert's neurons, [T, I]."""
        gate_TI, up_TI = linear(x_TD, self.gate_up_proj[expert]).chunk(2, dim=-1)
        return self.act_fn(gate_TI) * up_TI

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute `y_t = sum_k weight_tk * expert_{index_tk}(x_t)`, [T, D]; indices from E on stand for no expert."""
        output_TD = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            out = linear(self.hidden(hidden_states[token], expert), self.down_proj[expert])
            output_TD.index_add_(0, token, out * top_k_weights[token, slot, None])
        return output_TD

    def output_norms(self, x_TD: Tensor) -> Tensor:
        """Compute `‖h_e Wd_e‖` of every expert, float32 [T, E]."""
        outputs = (linear(self.hidden(x_TD, e), self.down_proj[e]) for e in range(self.num_experts))
        return torch.stack([out.float().norm(dim=-1) for out in outputs], dim=-1)
