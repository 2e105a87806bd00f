"""The experts implementation `moesaic_store`: products with weights that a store brings.

Shapes: T tokens, D hidden size, K active experts, P = T K pairs of token and expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers.integrations.moe import ExpertsInterface

from ..models.products import product
from ..moe.kernels import add_slots, down_product, is_plain, sort_pairs
from .predict import VIEW, StoredBlock
from .source import ExpertWeights

NAME = "moesaic_store"


def stored_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute `y_t = sum_k weight_tk * expert_{index_tk}(x_t)`, [T, D], by the products of `moesaic`.

    Experts that are there run while the others are read; what they add is added up in the same order as ever, so that
    the text is the same. Of layouts that `moesaic` leaves to transformers the last bit may differ.
    """
    block: StoredBlock = getattr(self, VIEW)
    with torch.no_grad():
        if len(hidden_states) == 1:
            return _one_token(self, block, hidden_states, top_k_index, top_k_weights)
        pairs = sort_pairs(top_k_index, self.num_experts)
        if not pairs.experts:
            return torch.zeros_like(hidden_states)
        done = {
            expert.number: run_expert(
                self, expert.number, hidden_states[pairs.tokens_of(expert.number)], expert.weights
            )
            for expert in block.visit(list(pairs.experts), hidden_states)
        }
        return pairs.add_up(hidden_states, top_k_weights, torch.cat([done[expert] for expert in pairs.experts]))


def _one_token(self: Any, block: StoredBlock, hidden_1D: Tensor, index_1K: Tensor, weights_1K: Tensor) -> Tensor:
    """Run a token's experts, and add up in the order of its slots, as the implementation `moesaic` does."""
    slots = [(slot, expert) for slot, expert in enumerate(index_1K[0].tolist()) if expert < self.num_experts]
    if not slots:
        return torch.zeros_like(hidden_1D)
    chosen = sorted({expert for _, expert in slots})
    done = {e.number: run_expert(self, e.number, hidden_1D, e.weights) for e in block.visit(chosen, hidden_1D)}
    out_KD = torch.cat([done[expert] for _, expert in slots])
    return add_slots(out_KD, weights_1K[:, [slot for slot, _ in slots]]).to(hidden_1D.dtype)


def run_expert(self: Any, number: int, x_CD: Tensor, weights: ExpertWeights) -> Tensor:
    """Run one expert of any layout that transformers has: transposed, with biases, with a norm after it."""
    if is_plain(self):
        return down_product(self._apply_gate(product(x_CD, weights.gate_up)), weights.down)

    def biased(x: Tensor, weight: Tensor, name: str) -> Tensor:
        out = x @ weight if self.is_transposed else linear(x, weight)
        return out + getattr(self, f"{name}_bias")[number] if self.has_bias else out

    hidden = biased(x_CD, weights.gate_up, "gate_up_proj")
    hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
    out = biased(hidden, weights.down, "down_proj")
    return self.post_expert_norm(out) if getattr(self, "has_post_expert_norm", False) else out


ExpertsInterface.register(NAME, stored_experts_forward)
