"""Closed-form recovery: down-projections solved again for what the router selects (design §4.5).

Shapes: T tokens, C tokens of one chunk, D hidden size, F dense neurons, W neurons of all blocks, E experts, K active.
A *block* is the shared expert or one routed expert; its features are its neurons' activations on its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import linear

from ..calibration.sample import LayerSample
from ..models.moe import MoE
from ..partition import Partition
from .base import Recovery

CONDITION_FOR_FP32 = 1e6
RIDGE_FLOOR = 1e-3
PANEL = 512
"""Rows of the normal equations computed at once; above the diagonal nothing is."""


@dataclass(frozen=True, kw_only=True)
class ClosedForm(Recovery):
    """`min_W sum_t w_t² ‖y_t - (m_t * h_t) W‖² + ridge sum_i G_ii ‖W_i - W_dense,i‖²`, m the mask of what runs.

    G_ii is the neuron's own weighted energy, so the ridge does not depend on a neuron's scale: it is the penalty that
    multiplicative noise of variance `ridge` on the activations amounts to.

    Experts that never run together and share nothing (top-1 specialists) are solved one by one, each also with a small
    weight on the tokens of the others, which pulls it to the static solution where it has few tokens of its own.
    """

    ridge: Annotated[float, Field(ge=0)] = 0.3
    """Relative to each diagonal entry of the normal equations."""
    other_tokens: Annotated[float, Field(ge=0)] = 0.03
    """Weight of the other specialists' tokens (τ); the own count 1."""

    @torch.no_grad()
    def recover(self, moe: MoE, sample: LayerSample, partition: Partition) -> None:
        blocks = [partition.shared] * bool(len(partition.shared)) + list(partition.experts)
        dense = [sample.ffn.down_DF[:, block].T.float() for block in blocks]
        if moe.shared_experts is None and moe.gate is not None and moe.gate.num_experts_per_tok == 1:
            changes = self._isolated(moe, sample, blocks, dense)
        else:
            changes = ridge_change(*normal_equations(moe, sample, blocks), self.ridge).split([len(b) for b in blocks])
        for (_, _, (_, _, down_DI)), prior_ID, change_ID in zip(
            moe.parts(partition.shared, partition.experts), dense, changes, strict=True
        ):
            down_DI.copy_((prior_ID + change_ID).T)

    def _isolated(self, moe: MoE, sample: LayerSample, blocks: list[Tensor], dense: list[Tensor]) -> list[Tensor]:
        """The change of each expert's down-projection where no token runs two blocks."""
        grams = [torch.zeros(len(b), len(b), device=d.device) for b, d in zip(blocks, dense, strict=True)]
        rests = [torch.zeros_like(d) for d in dense]
        for part, h_CF in sample.chunks():
            expert_C = chosen(moe, sample.input_TD[part])[0].squeeze(1)
            h_CF, y_CD = weighted(h_CF, sample.output_TD[part], sample.weight_T[part])
            for e, (block, prior_ID) in enumerate(zip(blocks, dense, strict=True)):
                share_C1 = torch.where(expert_C == e, 1.0, self.other_tokens**0.5)[:, None].to(h_CF.dtype)
                z_CI = h_CF[:, block] * share_C1
                grams[e] += z_CI.T @ z_CI
                rests[e] += z_CI.T @ (y_CD * share_C1 - z_CI @ prior_ID.to(z_CI.dtype))
        return [ridge_change(gram, rest, self.ridge) for gram, rest in zip(grams, rests, strict=True)]


def weighted(h_CF: Tensor, y_CD: Tensor, weight_C: Tensor) -> tuple[Tensor, Tensor]:
    """(w h, w y) in bfloat16 if the activations are, whose products are thrice as fast on CPUs; else in float32.

    Sums over chunks are kept in float32. Float16 is not used: the products would overflow.
    """
    dtype = torch.bfloat16 if h_CF.dtype == torch.bfloat16 else torch.float32
    return (h_CF.float() * weight_C[:, None]).to(dtype), (y_CD * weight_C[:, None]).to(dtype)


def chosen(moe: MoE, x_CD: Tensor) -> tuple[Tensor, Tensor]:
    """(expert indices, weights) [C, K] that the block's gate gives these tokens."""
    assert moe.gate is not None
    assert moe.experts is not None
    return moe.gate(x_CD, moe.experts)


def normal_equations(moe: MoE, sample: LayerSample, blocks: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(lower triangle of Z.T Z [W, W], Z.T R [W, D]), R what the block leaves of the dense output.

    Z holds the weighted activations of all blocks, times the gate's weights, zero where an expert does not run.
    Regressing the rest, not the output, keeps bf16 products accurate.
    """
    neurons_W = torch.cat(blocks)
    size, device = len(neurons_W), sample.weight_T.device
    gram_WW = torch.zeros(size, size, device=device)
    right_WD = torch.zeros(size, sample.output_TD.shape[1], device=device)
    prior_DW = sample.ffn.down_DF[:, neurons_W]
    bias = moe.shared_experts.down_proj.bias if moe.shared_experts is not None else None
    for part, h_CF in sample.chunks():
        z_CW = h_CF[:, neurons_W] * gains(moe, sample.input_TD[part], blocks).to(h_CF.dtype)
        rest_CD = sample.output_TD[part].float() - linear(z_CW, prior_DW, bias).float()
        z_CW, rest_CD = weighted(z_CW, rest_CD, sample.weight_T[part])
        right_WD += z_CW.T @ rest_CD
        for first in range(0, size, PANEL):
            last = first + PANEL
            gram_WW[first:last, :last] += z_CW[:, first:last].T @ z_CW[:, :last]
    return gram_WW, right_WD


def gains(moe: MoE, x_CD: Tensor, blocks: list[Tensor]) -> Tensor:
    """The factor on each neuron in each token, [C, W]: 1 for shared ones, the gate's weight or 0 for routed ones."""
    widths = torch.tensor([len(block) for block in blocks], device=x_CD.device)
    gain_CB = torch.ones(len(x_CD), len(blocks), dtype=x_CD.dtype, device=x_CD.device)
    if moe.experts is not None:
        index_CK, weight_CK = chosen(moe, x_CD)
        gain_CB[:, -moe.experts.num_experts :] = 0
        gain_CB.scatter_(1, index_CK + len(blocks) - moe.experts.num_experts, weight_CK)
    return gain_CB.repeat_interleave(widths, dim=1)


def ridge_change(gram_WW: Tensor, rest_WD: Tensor, ridge: float) -> Tensor:
    """`argmin_C tr(C.T G C) - 2 tr(C.T B) + sum_i λ_i ‖C_i‖²`, λ_i = ridge × G_ii, [W, D]: the change from the prior.

    λ_i is at least `RIDGE_FLOOR` × the mean of all, so that neurons that never speak stay as they are. Only G's lower
    triangle is read, and its diagonal is overwritten. Cholesky in float32, in float64 when that fails or its condition
    estimate is poor, eigenvalues when even that fails. Without any token the change is 0.
    """
    diagonal = gram_WW.diagonal()
    floor = RIDGE_FLOOR * diagonal.mean()
    if floor <= 0:
        return torch.zeros_like(rest_WD)
    diagonal.add_(ridge * diagonal.clamp(min=floor))
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
