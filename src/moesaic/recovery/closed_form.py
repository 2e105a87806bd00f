"""Closed-form recovery: down-projections solved again for what the router selects.

Shapes: T tokens, C tokens of one chunk, D hidden size, F dense neurons, W neurons of all blocks, E experts, K active.
A *block* is the shared expert or one routed expert; its features are its neurons' activations on its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import linear

from ..calibration.activations import CHUNK_TOKENS, LayerActivations
from ..models.moe_block import Routing
from ..moe.block import MoE
from ..partition import Partition
from .base import Recovery

CONDITION_FOR_FP32 = 1e6
RIDGE_FLOOR = 1e-3
RIDGES = (0.03, 0.1, 0.3, 1.0)
HELD_OUT = 8
"""One in this many tokens judges the ridges."""
PANEL = 256
"""Rows of the normal equations computed at once; above the diagonal nothing is."""
SKETCH = 128
"""Random combinations of the outputs that ridges are judged on: `E ‖A S‖² = SKETCH ‖A‖²` for S of standard normals."""

Systems = dict[int, tuple[Tensor, Tensor]]
"""(lower triangle of Z.T Z, Z.T R) of what is solved together: all blocks (0), or a top-1 expert and the shared one."""
Features = Iterator[tuple[int, Tensor, Tensor]]
"""(system, Z, R) of chunks of tokens: weighted activations of the blocks, and what they leave of the dense output."""


@dataclass(frozen=True, kw_only=True)
class ClosedForm(Recovery):
    """`min_W sum_t w_t² ‖y_t - (m_t * h_t) W‖² + ridge sum_i G_ii ‖W_i - W_dense,i‖²`, m the mask of what runs.

    G_ii is the neuron's own weighted energy, so the ridge does not depend on a neuron's scale: it is the penalty that
    multiplicative noise of variance `ridge` on the activations amounts to.

    Experts that never run together (top-1) couple through the shared expert only, so each has its own small system.
    """

    ridge: Annotated[float, Field(ge=0)] | None = None
    """Relative to each diagonal entry; without it, that of `RIDGES` with the least error on held-out tokens."""
    other_tokens: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the other specialists' tokens (τ), which pulls to the static solution; the own count 1."""

    @torch.no_grad()
    def recover(self, moe: MoE, sample: LayerActivations, partition: Partition) -> None:
        blocks = [partition.shared] * bool(len(partition.shared)) + list(partition.experts)
        shared = len(partition.shared) if top_one(moe) else 0
        fitted = sample.tokens - (max(1, sample.tokens // HELD_OUT) if self.ridge is None else 0)
        systems: Systems = {}
        for part in (sample.take(slice(fitted)), sample.opening):
            for number, z_CX, rest_CD in self._features(moe, part, blocks) if part else ():
                add(systems, number, z_CX, rest_CD)
        ridge = self.ridge
        if ridge is None:
            held_out = sample.take(slice(fitted, None))
            ridge = best_ridge(systems, shared, self._features(moe, held_out, blocks))
        changes = torch.cat(solve_arrows(systems, shared, ridge)).split([len(block) for block in blocks])
        parts = moe.parts(partition.shared, partition.experts)
        for expert, change_ID in zip(parts, changes, strict=True):
            expert.down_DI.copy_(sample.ffn.down_DF[:, expert.neurons].float() + change_ID.T)

    def _features(self, moe: MoE, sample: LayerActivations, blocks: list[Tensor]) -> Features:
        """Compute features: of top-1 experts as an arrow, with nothing between two experts, else all blocks at once."""
        if not top_one(moe):
            yield from joint_features(moe, sample, blocks)
            return
        has_shared = moe.shared_experts is not None
        shared = blocks[0] if has_shared else blocks[0][:0]
        routed = [chosen(moe, part) for part in sample.parts()]
        expert_T = torch.cat([routing.top_k_index.squeeze(1) for routing in routed])
        gain_T1 = torch.cat([routing.top_k_weights for routing in routed])
        weighs = bool((gain_T1 != 1).any())
        for expert, block in enumerate(blocks[has_shared:]):
            ffn = sample.ffn.take(torch.cat([shared, block]))
            weight_T = torch.where(expert_T == expert, 1.0, self.other_tokens**0.5) * sample.weight_T
            picks = weight_T.nonzero().squeeze(1).split(CHUNK_TOKENS)
            for part in picks:  # without any token one empty chunk, so that every expert has a system
                h_CX = ffn.hidden(sample.input_TD[part])
                if weighs:
                    h_CX[:, len(shared) :] *= gain_T1[part]
                rest_CD = sample.output_TD[part].float() - linear(h_CX, ffn.down_DF).float()
                yield expert, *weighted(h_CX, rest_CD, weight_T[part])


def top_one(moe: MoE) -> bool:
    """Tell whether each token runs exactly one routed expert."""
    gate = moe.gate
    return gate is not None and gate.num_experts_per_tok == 1 and not gate.selection.dynamic_top_k


def add(systems: Systems, number: int, z_CX: Tensor, rest_CD: Tensor) -> None:
    """Add a chunk of tokens to the normal equations `number`, which begin as zeros."""
    size = z_CX.shape[1]
    if number not in systems:
        zeros = partial(torch.zeros, device=z_CX.device)
        systems[number] = zeros(size, size), zeros(size, rest_CD.shape[1])
    gram_XX, right_XD = systems[number]
    right_XD += z_CX.T @ rest_CD
    for first in range(0, size, PANEL):
        last = first + PANEL
        gram_XX[first:last, :last] += z_CX[:, first:last].T @ z_CX[:, :last]


def best_ridge(systems: Systems, shared: int, held_out: Features) -> float:
    """Choose the ridge of `RIDGES` with the least error on held-out tokens, which are added to the systems on the way.

    Solutions are linear in R, so a sketch of R's columns is solved for and judged, at a fraction of the whole's cost.
    """
    size = next(iter(systems.values()))[1].shape[1]
    sketch_DS = torch.randn(size, SKETCH, generator=torch.Generator().manual_seed(0))
    if size <= SKETCH:
        sketch_DS = torch.eye(size)
    sketch_DS = sketch_DS.to(systems[0][1].device)
    sketched = {number: (gram_XX, right_XD @ sketch_DS) for number, (gram_XX, right_XD) in systems.items()}
    tried = [solve_arrows(sketched, shared, ridge) for ridge in RIDGES]
    errors = [0.0] * len(RIDGES)
    for number, z_CX, rest_CD in held_out:
        rest_CS = rest_CD.float() @ sketch_DS
        for i, changes in enumerate(tried):
            left_CS = rest_CS - z_CX.float() @ torch.cat([changes[0], changes[1 + number]])
            errors[i] += left_CS.square().sum().item()
        add(systems, number, z_CX, rest_CD)
    return RIDGES[errors.index(min(errors))]


def solve_arrows(systems: Systems, shared: int, ridge: float) -> list[Tensor]:
    """Solve for [change of the shared block, of each expert]: the experts are eliminated first, then the shared block.

    Each expert's system is (Z.T Z, Z.T R) of the shared neurons and its own, [S + I, S + I] and [S + I, D]. Equals
    `ridge_change` of the whole system, whose blocks between different experts are 0.
    """
    gram_SS = torch.stack([gram_XX[:shared, :shared] for gram_XX, _ in systems.values()]).sum(0)
    damping_S = damping(gram_SS, ridge)
    rest_SD = torch.stack([rest_XD[:shared] for _, rest_XD in systems.values()]).sum(0)
    solved = []
    for _, (gram_XX, rest_XD) in sorted(systems.items()):
        gram_IS = gram_XX[shared:, :shared]
        x_IX = ridge_change(gram_XX[shared:, shared:], torch.cat([gram_IS, rest_XD[shared:]], dim=1), ridge)
        x_IS, x_ID = x_IX.split([shared, rest_XD.shape[1]], dim=1)
        gram_SS = gram_SS - gram_IS.T @ x_IS
        rest_SD = rest_SD - gram_IS.T @ x_ID
        solved.append((x_IS, x_ID))
    change_SD = solve_spd(gram_SS + damping_S.diag(), rest_SD) if shared else rest_SD
    return [change_SD, *(x_ID - x_IS @ change_SD for x_IS, x_ID in solved)]


def weighted(h_CF: Tensor, y_CD: Tensor, weight_C: Tensor) -> tuple[Tensor, Tensor]:
    """Compute (w h, w y) in bfloat16 if the activations are, where its products are the fastest; else in float32.

    Sums over chunks are kept in float32. Float16 is not used: the products would overflow.
    """
    dtype = torch.bfloat16 if h_CF.dtype == torch.bfloat16 else torch.float32
    return (h_CF.float() * weight_C[:, None]).to(dtype), (y_CD * weight_C[:, None]).to(dtype)


def chosen(moe: MoE, sample: LayerActivations) -> Routing:
    """Say which experts these tokens run: what is decided for the whole model already, else what the gate says."""
    gate, experts = moe.routed
    if sample.chosen_TK is not None:
        return gate.fixed(sample.chosen_TK, sample.input_TD.dtype)
    return gate(sample.input_TD, experts)


def joint_features(moe: MoE, sample: LayerActivations, blocks: list[Tensor]) -> Features:
    """Compute chunks (0, Z [C, W], R [C, D]) of all blocks together.

    Z holds the weighted activations times the gate's weights, zero where an expert does not run. Regressing the rest,
    not the output, keeps bf16 products accurate.
    """
    neurons_W = torch.cat(blocks)
    prior_DW = sample.ffn.down_DF[:, neurons_W]
    bias = moe.shared_experts.down_proj.bias if moe.shared_experts is not None else None
    for part, h_CF in sample.chunks():
        z_CW = h_CF[:, neurons_W] * gains(moe, sample.take(part), blocks).to(h_CF.dtype)
        rest_CD = sample.output_TD[part].float() - linear(z_CW, prior_DW, bias).float()
        yield 0, *weighted(z_CW, rest_CD, sample.weight_T[part])


def gains(moe: MoE, sample: LayerActivations, blocks: list[Tensor]) -> Tensor:
    """Compute the factor on each neuron in each token, [C, W]: 1 for shared ones, the gate's weight or 0 for routed."""
    x_CD = sample.input_TD
    widths = torch.tensor([len(block) for block in blocks], device=x_CD.device)
    gain_CB = torch.ones(len(x_CD), len(blocks), dtype=x_CD.dtype, device=x_CD.device)
    if moe.experts is not None:
        routed_CE = x_CD.new_zeros(len(x_CD), moe.experts.num_experts + 1)  # the last column is no expert
        gain_CB[:, -moe.experts.num_experts :] = routed_CE.scatter_(1, *chosen(moe, sample))[:, :-1]
    return gain_CB.repeat_interleave(widths, dim=1)


def ridge_change(gram_WW: Tensor, rest_WD: Tensor, ridge: float) -> Tensor:
    """Solve for the change from the prior, [W, D].

    `argmin_C tr(C.T G C) - 2 tr(C.T B) + sum_i λ_i ‖C_i‖²` with λ_i = ridge × G_ii. Only G's lower triangle is read,
    and it is left as it was. Without any token the change is 0.
    """
    diagonal = gram_WW.diagonal()
    kept = diagonal.clone()
    diagonal.add_(damping(gram_WW, ridge))  # in place: a copy would be as large as everything else together
    change_WD = solve_spd(gram_WW, rest_WD)
    diagonal.copy_(kept)
    return change_WD


def damping(gram_WW: Tensor, ridge: float) -> Tensor:
    """Compute λ [W] = ridge × G_ii, at least `RIDGE_FLOOR` × the mean: a silent neuron stays. 1 if all are silent."""
    diagonal = gram_WW.diagonal()
    floor = RIDGE_FLOOR * diagonal.mean() if len(diagonal) else 0
    return ridge * diagonal.clamp(min=floor) if floor > 0 else torch.ones_like(diagonal)


def solve_spd(gram_WW: Tensor, rest_WD: Tensor) -> Tensor:
    """Solve for `G⁻¹ R` from G's lower triangle.

    Cholesky in float32, in float64 when that fails or its condition estimate is poor, eigenvalues when even that fails.
    """
    factor, failed = torch.linalg.cholesky_ex(gram_WW)
    diagonal = factor.diagonal()
    if not failed and (diagonal.max() / diagonal.min()).square() <= CONDITION_FOR_FP32:
        return torch.cholesky_solve(rest_WD, factor)
    del factor, diagonal
    factor, failed = torch.linalg.cholesky_ex(gram_WW.double())
    if not failed:
        return torch.cholesky_solve(rest_WD.double(), factor).float()
    values_W, vectors_WW = torch.linalg.eigh(gram_WW.double())
    kept_W = values_W > values_W[-1] * torch.finfo(torch.float32).eps
    inverse_W = torch.where(kept_W, 1 / values_W, 0.0)[:, None]
    return (vectors_WW @ (inverse_W * (vectors_WW.T @ rest_WD.double()))).float()
