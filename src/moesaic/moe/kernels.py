"""Experts implementation `moesaic` for transformers' experts interface; it serves stock MoE checkpoints too.

On CPUs torch's grouped product reaches little of the machine's speed, while one plain product per expert that has
tokens reads only the chosen experts' weights and copies none. On GPUs, and under `torch.compile` (no data-dependent
loop), transformers' own implementations run; `moesaic_triton` has kernels of ours for a few tokens, and is not yet the
choice there because it was run in Triton's interpreter only.

Shapes: T tokens, D hidden size, E experts, I neurons of one, F = E I of all, K active experts, C tokens of one expert,
P = T K pairs of token and expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, linear
from transformers.integrations.moe import (
    ExpertsInterface,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)

from ..models.products import product

NAME, TRITON = "moesaic", "moesaic_triton"
GROUPED_MM_ALIGNMENT_BYTES = 16
FEW_PAIRS = 64
FEW_TOKENS = 8
"""Of an expert, for which a sum of columns each takes less time than a product with transposed weights."""
PIECE = 256
"""Columns of a piece of a sum, at least."""
SPLIT = "_is_expert_parallel"
FLAGS = ("is_transposed", "has_bias", "has_post_expert_norm", SPLIT)
"""What transformers says of experts that are not just two products; not every version has all."""


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute `y_t = sum_k weight_tk * expert_{index_tk}(x_t)`, [T, D]; equals the naive loop of `Experts.forward`.

    Indices from E on stand for no expert and cost nothing on CPUs, nor in the grouped products of GPUs.
    """
    mixed = torch.is_autocast_enabled(hidden_states.device.type)  # grouped products take one dtype only
    if not is_plain(self) or (hidden_states.is_cuda and not mixed) or torch.compiler.is_compiling():
        return _by_transformers(self, hidden_states, top_k_index, top_k_weights)
    if len(hidden_states) == 1:
        return _one_token(self, hidden_states, top_k_index, top_k_weights)
    return _by_expert(self, hidden_states, top_k_index, top_k_weights)


def _by_transformers(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    rows = (self.gate_up_proj.shape[-1], self.down_proj.shape[-1])
    aligned = all(size * hidden_states.element_size() % GROUPED_MM_ALIGNMENT_BYTES == 0 for size in rows)
    few = top_k_index.numel() <= FEW_PAIRS
    if not aligned and not few and is_plain(self) and not torch.compiler.is_compiling():
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
    if not said and not is_plain(self):
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


def is_plain(self: Any) -> bool:
    """Tell whether the experts are laid out as ours are: `[gate; up]` rows, no biases, not split over devices."""
    ours = self.has_gate and self.is_concatenated
    return ours and not any(getattr(self, flag, False) for flag in FLAGS)


def _one_token(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run the chosen experts, nothing sorted, all their neurons at once after the first product: decoding."""
    slots = [(slot, expert) for slot, expert in enumerate(top_k_index[0].tolist()) if expert < self.num_experts]
    if not slots:
        return torch.zeros_like(hidden_states)
    if len(slots) < top_k_index.shape[1]:
        top_k_weights = top_k_weights[:, [slot for slot, _ in slots]]
    experts = [expert for _, expert in slots]
    hidden_KI = self._apply_gate(torch.cat([linear(hidden_states, self.gate_up_proj[expert]) for expert in experts]))
    if is_column_major(self.down_proj) and not hidden_KI.requires_grad:
        out_KD = rows_product(hidden_KI, self.down_proj, torch.tensor(experts))
    else:
        out_KD = torch.cat([linear(hidden_KI[k : k + 1], self.down_proj[e]) for k, e in enumerate(experts)])
    return add_slots(out_KD, top_k_weights).to(hidden_states.dtype)


def add_slots(out_KD: Tensor, weights_1K: Tensor) -> Tensor:
    """Add up what a token's experts put out, each times its weight, [1, D]."""
    return (out_KD * weights_1K[0, :, None]).sum(0, keepdim=True)


def lay_down_column_major(model: nn.Module) -> None:
    """Lay the down-projections of all experts out so that each neuron's column is in one piece; values stay.

    Decoding on a CPU then sums the chosen neurons' columns in one operation, where small experts would be as many
    products.
    """
    for module in model.modules():
        if hasattr(module, "is_concatenated") and is_plain(module):
            weight = module.get_parameter("down_proj")
            weight.data = column_major(weight.data)


def column_major(down: Tensor) -> Tensor:
    """Lay down-projections [..., D, I] out anew, each neuron's column in one piece."""
    return down.mT.contiguous().mT


def is_column_major(down: Tensor) -> bool:
    """Tell whether `lay_down_column_major` laid down-projections [..., D, I] out."""
    return not down.is_contiguous() and down.mT.is_contiguous()


def rows_product(hidden_KI: Tensor, down_EDI: Tensor, expert_K: Tensor) -> Tensor:
    """Compute `h_k Wd_{expert_k}^T`, [K, D], of down-projections that are column-major: weighted sums of their columns.

    torch sums each row in one thread, so rows are summed in pieces, which depend on an expert's width alone: a store,
    which brings one expert after the other, is to round as all experts at once do.
    """
    (rows, width), hidden_size = hidden_KI.shape, down_EDI.shape[-2]
    pieces = next((n for n in (16, 8, 4, 2) if width % n == 0 and width // n >= PIECE), 1)
    index_KI = expert_K[:, None] * width + torch.arange(width)
    columns_FD = down_EDI.mT.reshape(-1, hidden_size)
    shape = (rows * pieces, width // pieces)
    sums = embedding_bag(index_KI.view(shape), columns_FD, mode="sum", per_sample_weights=hidden_KI.reshape(shape))
    return sums if pieces == 1 else sums.view(rows, pieces, hidden_size).sum(1)


def down_product(hidden_CI: Tensor, down_DI: Tensor) -> Tensor:
    """Compute `h Wd^T` of one expert for C tokens, [C, D], however it is laid out."""
    if takes_columns(hidden_CI, len(hidden_CI), down_DI):
        return rows_product(hidden_CI, down_DI, torch.zeros(len(hidden_CI), dtype=torch.int64))
    return product(hidden_CI, down_DI)


def takes_columns(hidden: Tensor, tokens: int, down: Tensor) -> bool:
    """Tell whether an expert's outputs for so many tokens are sums of its columns, and not one product."""
    return tokens <= FEW_TOKENS and is_column_major(down) and not hidden.requires_grad


class Pairs(NamedTuple):
    """Pairs of token and expert, sorted by expert."""

    experts: dict[int, slice]
    """Where the pairs of each expert that has any are, ascending."""
    expert_P: Tensor
    token_P: Tensor
    order_P: Tensor
    """Where each pair is in the flattened index [T K]."""

    def tokens_of(self, expert: int) -> Tensor:
        """Give the tokens that an expert runs for."""
        return self.token_P[self.experts[expert]]

    def add_up(self, hidden_TD: Tensor, weights_TK: Tensor, out_PD: Tensor) -> Tensor:
        """Add the experts' outputs, each times its weight, to their tokens', [T, D]."""
        weighted_PD = out_PD * weights_TK.flatten()[self.order_P, None]
        return torch.zeros_like(hidden_TD).index_add_(0, self.token_P, weighted_PD.to(hidden_TD.dtype))


def sort_pairs(index_TK: Tensor, num_experts: int) -> Pairs:
    """Sort pairs of token and expert by expert; those of no expert are left out."""
    expert_P, order_P = index_TK.flatten().sort(stable=True)
    counts = torch.bincount(expert_P, minlength=num_experts)[:num_experts].tolist()
    ends = list(itertools.accumulate(counts))
    expert_P, order_P = expert_P[: ends[-1]], order_P[: ends[-1]]
    places = {e: slice(end - count, end) for e, (end, count) in enumerate(zip(ends, counts, strict=True)) if count}
    return Pairs(places, expert_P, order_P // index_TK.shape[1], order_P)


def _by_expert(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run one product per expert that has any pair, and add each to its tokens' output."""
    pairs = sort_pairs(top_k_index, self.num_experts)
    if not pairs.experts:
        return torch.zeros_like(hidden_states)
    x_PD = hidden_states[pairs.token_P]
    gate_ups = self.gate_up_proj.unbind()  # not indexed: the gradient of an index is as large as all experts
    gate_up_PI = torch.cat([product(x_PD[place], gate_ups[e]) for e, place in pairs.experts.items()])
    return pairs.add_up(hidden_states, top_k_weights, _down(self._apply_gate(gate_up_PI), self.down_proj, pairs))


def _down(hidden_PI: Tensor, down_EDI: Tensor, pairs: Pairs) -> Tensor:
    """Compute the outputs of all pairs, [P, D], as `down_product` computes each expert's."""
    few = {
        expert for expert, place in pairs.experts.items()
        if takes_columns(hidden_PI, place.stop - place.start, down_EDI)
    }  # fmt: skip
    if len(few) == len(pairs.experts):
        return rows_product(hidden_PI, down_EDI, pairs.expert_P)
    downs = down_EDI.unbind()
    outputs = [product(hidden_PI[place], downs[e]) for e, place in pairs.experts.items() if e not in few]
    if not few:
        return torch.cat(outputs)
    few_P = torch.cat([torch.full((place.stop - place.start,), e in few) for e, place in pairs.experts.items()])
    out_PD = hidden_PI.new_empty(len(hidden_PI), down_EDI.shape[1])
    out_PD[few_P] = rows_product(hidden_PI[few_P], down_EDI, pairs.expert_P[few_P])
    out_PD[~few_P] = torch.cat(outputs)
    return out_PD


def few_by_triton(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run our Triton kernels for a few tokens without gradients, else `experts_forward`."""
    from .triton import supports, triton_experts_forward

    few = top_k_index.numel() <= FEW_PAIRS and not torch.is_grad_enabled()
    if not (few and is_plain(self) and supports(self)):
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)
    return triton_experts_forward(self, hidden_states, top_k_index, top_k_weights)


def register() -> None:
    """Make the implementations known to transformers by their names, `moesaic` and `moesaic_triton`."""
    ExpertsInterface.register(NAME, experts_forward)
    if find_spec("triton"):
        ExpertsInterface.register(TRITON, few_by_triton)
