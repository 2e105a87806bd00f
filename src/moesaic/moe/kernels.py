"""Experts implementation `moesaic` for transformers' experts interface; it serves stock MoE checkpoints too.

On CPUs torch's grouped product reaches little of the machine's speed, while one plain product per expert that has
tokens reads only the chosen experts' weights and copies none. On GPUs, and under `torch.compile` (no data-dependent
loop), transformers' own implementations run; `moesaic_triton` has kernels of ours for a few tokens, and is not yet the
choice there because it was run in Triton's interpreter only.

Shapes: T tokens, D hidden size, E experts, K active experts, P = T K pairs of token and expert.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers.integrations.moe import (
    ExpertsInterface,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)

NAME, TRITON = "moesaic", "moesaic_triton"
GROUPED_MM_ALIGNMENT_BYTES = 16
FEW_PAIRS = 64
SPLIT = "_is_expert_parallel"
FLAGS = ("is_transposed", "has_bias", "has_post_expert_norm", SPLIT)
"""What transformers says of experts that are not just two products; not every version has all."""


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute `y_t = sum_k weight_tk * expert_{index_tk}(x_t)`, [T, D]; equals the naive loop of `Experts.forward`.

    Indices from E on stand for no expert and cost nothing on CPUs, nor in the grouped products of GPUs.
    """
    mixed = torch.is_autocast_enabled(hidden_states.device.type)  # grouped products take one dtype only
    if not _plain(self) or (hidden_states.is_cuda and not mixed) or torch.compiler.is_compiling():
        return _by_transformers(self, hidden_states, top_k_index, top_k_weights)
    if len(hidden_states) == 1:
        return _one_token(self, hidden_states, top_k_index, top_k_weights)
    return _by_expert(self, hidden_states, top_k_index, top_k_weights)


def _by_transformers(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    rows = (self.gate_up_proj.shape[-1], self.down_proj.shape[-1])
    aligned = all(size * hidden_states.element_size() % GROUPED_MM_ALIGNMENT_BYTES == 0 for size in rows)
    few = top_k_index.numel() <= FEW_PAIRS
    if not aligned and not few and _plain(self) and not torch.compiler.is_compiling():
        return _by_expert(self, hidden_states, top_k_index, top_k_weights)
    if not aligned or (hidden_states.is_cuda and few):
        return _knowing_empty_slots(self, batched_mm_experts_forward, hidden_states, top_k_index, top_k_weights)
    return _knowing_empty_slots(self, grouped_mm_experts_forward, hidden_states, top_k_index, top_k_weights)


def _knowing_empty_slots(
    self: Any, forward: Callable[..., Tensor], hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run one of transformers' implementations where slots may have no expert.

    Theirs leave those out, as grouped products do, or ignore them, only where experts are split over devices; so that
    is said for the call.
    """
    said = getattr(self, "may_have_empty_slots", False)
    if not said and not _plain(self):
        return forward(self, hidden_states, top_k_index, top_k_weights)
    top_k_weights = top_k_weights.where(top_k_index < self.num_experts, 0)
    if not said or not hasattr(self, SPLIT):  # nobody said so, or a transformers that knew no empty slots
        return forward(self, hidden_states, top_k_index.clamp(max=self.num_experts - 1), top_k_weights)
    before = getattr(self, SPLIT)
    setattr(self, SPLIT, True)
    try:
        return forward(self, hidden_states, top_k_index, top_k_weights)
    finally:
        setattr(self, SPLIT, before)


def _plain(self: Any) -> bool:
    """Tell whether the experts are laid out as ours are: `[gate; up]` rows, no biases, not split over devices."""
    ours = self.has_gate and self.is_concatenated
    return ours and not any(getattr(self, flag, False) for flag in FLAGS)


def _expert(self: Any, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return linear(self._apply_gate(linear(x, gate_up)), down)


def _one_token(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run the chosen experts one after the other, nothing sorted: decoding."""
    outputs = [
        _expert(self, hidden_states, self.gate_up_proj[expert], self.down_proj[expert]) * top_k_weights[:, slot, None]
        for slot, expert in enumerate(top_k_index[0].tolist())
        if expert < self.num_experts
    ]
    return sum(outputs[1:], outputs[0]).to(hidden_states.dtype) if outputs else torch.zeros_like(hidden_states)


def _by_expert(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Sort pairs by expert, run one product per expert that has any, and add each to its token's output."""
    slots = top_k_index.shape[1]
    expert_P, order_P = top_k_index.flatten().sort(stable=True)
    counts = torch.bincount(expert_P, minlength=self.num_experts)[: self.num_experts].tolist()
    order_P = order_P[: sum(counts)]
    token_P = order_P // slots
    parts = hidden_states[token_P].split(counts)
    # unbound, not indexed: the gradient of an index is as large as all experts
    weights = zip(self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True)
    done = [_expert(self, x_CD, *weight) for x_CD, weight in zip(parts, weights, strict=True) if len(x_CD)]
    output_TD = torch.zeros_like(hidden_states)
    if done:
        weighted_PD = torch.cat(done) * top_k_weights.flatten()[order_P, None]
        output_TD.index_add_(0, token_P, weighted_PD.to(hidden_states.dtype))
    return output_TD


def few_by_triton(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run our Triton kernels for a few tokens without gradients, else `experts_forward`."""
    from .triton import supports, triton_experts_forward

    few = top_k_index.numel() <= FEW_PAIRS and not torch.is_grad_enabled()
    if not (few and _plain(self) and supports(self)):
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)
    return triton_experts_forward(self, hidden_states, top_k_index, top_k_weights)


def interpreted() -> bool:
    """Tell whether Triton's interpreter runs its kernels, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def register() -> None:
    """Make the implementations known to transformers by their names, `moesaic` and `moesaic_triton`."""
    ExpertsInterface.register(NAME, experts_forward)
    if find_spec("triton"):
        ExpertsInterface.register(TRITON, few_by_triton)
