"""Closed-form recovery: down-projections solved again for what the router selects (design §4.5).

Shapes: T tokens, C tokens of one chunk, D hidden size, F dense neurons, W neurons of all blocks, E experts, K active.
A *block* is the shared expert or one routed expert; its features are its neurons' activations on its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
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

    Experts that never run together (top-1) couple through the shared expert only, so each has its own small system.
    It also sees the others' tokens with a small weight, which pulls it to the static solution where it has few tokens.
    """

    ridge: Annotated[float, Field(ge=0)] = 0.3
    """Relative to each diagonal entry of the normal equations."""
    other_tokens: Annotated[float, Field(ge=0)] = 0.005
    """Weight of the other specialists' tokens (τ); the own count 1."""

    @torch.no_grad()
    def recover(self, moe: MoE, sample: LayerSample, partition: Partition) -> None:
        blocks = [partition.shared] * bool(len(partition.shared)) + list(partition.experts)
        dense = [sample.ffn.down_DF[:, block].T.float() for block in blocks]
        if moe.gate is not None and moe.gate.num_experts_per_tok == 1:
            changes = self._top_one(moe, sample, blocks, dense)
        else:
            changes = ridge_change(*normal_equations(moe, sample, blocks), self.ridge).split([len(b) for b in blocks])
        for (_, _, (_, _, down_DI)), prior_ID, change_ID in zip(
            moe.parts(partition.shared, partition.experts), dense, changes, strict=True
        ):
            down_DI.copy_((prior_ID + change_ID).T)

    def _top_one(self, moe: MoE, sample: LayerSample, blocks: list[Tensor], dense: list[Tensor]) -> list[Tensor]:
        """The change of each block's down-projection where no token runs two routed experts.

        The normal equations are an arrow: shared [S, S], each expert [I, I], and each expert with the shared [I, S].
        """
        has_shared = moe.shared_experts is not None
        shared = blocks[0] if has_shared else blocks[0][:0]
        prior_SD = dense[0] if has_shared else dense[0][:0]
        experts = list(zip(blocks, dense, strict=True))[has_shared:]
        system = [Arrow.empty(len(shared), len(block), prior_ID) for block, prior_ID in experts]
        for part, h_CF in sample.chunks():
            expert_C = chosen(moe, sample.input_TD[part])[0].squeeze(1)
            h_CF, y_CD = weighted(h_CF, sample.output_TD[part], sample.weight_T[part])
            h_CS = h_CF[:, shared]
            y_CD = y_CD - h_CS @ prior_SD.to(h_CS.dtype)
            for e, (block, prior_ID) in enumerate(experts):
                share_C1 = torch.where(expert_C == e, 1.0, self.other_tokens**0.5)[:, None].to(h_CF.dtype)
                z_CI = h_CF[:, block] * share_C1
                system[e].add(h_CS * share_C1, z_CI, y_CD * share_C1 - z_CI @ prior_ID.to(z_CI.dtype))
        return solve_arrows(system, self.ridge)[0 if has_shared else 1 :]


@dataclass(frozen=True)
class Arrow:
    """One expert's part in the normal equations of top-1 routing, summed in float32."""

    gram_SS: Tensor
    gram_IS: Tensor
    gram_II: Tensor
    rest_SD: Tensor
    rest_ID: Tensor

    @classmethod
    def empty(cls, shared: int, width: int, like_ID: Tensor) -> Arrow:
        hidden = like_ID.shape[1]
        shapes = ((shared, shared), (width, shared), (width, width), (shared, hidden), (width, hidden))
        return cls(*(like_ID.new_zeros(shape) for shape in shapes))

    def add(self, z_CS: Tensor, z_CI: Tensor, rest_CD: Tensor) -> None:
        """Add a chunk of weighted activations and of what the block leaves of the dense output."""
        self.gram_SS.add_(z_CS.T @ z_CS)
        self.gram_IS.add_(z_CI.T @ z_CS)
        self.gram_II.add_(z_CI.T @ z_CI)
        self.rest_SD.add_(z_CS.T @ rest_CD)
        self.rest_ID.add_(z_CI.T @ rest_CD)


def solve_arrows(system: list[Arrow], ridge: float) -> list[Tensor]:
    """[change of the shared block, of each expert]: block elimination of the experts, then the shared block.

    Equals `ridge_change` of the whole system, whose blocks between different experts are 0.
    """
    gram_SS = damp(reduce(torch.add, (part.gram_SS for part in system)), ridge)
    rest_SD = reduce(torch.add, (part.rest_SD for part in system))
    solved = []
    for part in system:
        x_IX = solve_spd(damp(part.gram_II, ridge), torch.cat([part.gram_IS, part.rest_ID], dim=1))
        x_IS, x_ID = x_IX.split([part.gram_IS.shape[1], part.rest_ID.shape[1]], dim=1)
        gram_SS = gram_SS - part.gram_IS.T @ x_IS
        rest_SD = rest_SD - part.gram_IS.T @ x_ID
        solved.append((x_IS, x_ID))
    change_SD = solve_spd(gram_SS, rest_SD) if len(gram_SS) else rest_SD
    return [change_SD, *(x_ID - x_IS @ change_SD for x_IS, x_ID in solved)]


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

    Only G's lower triangle is read, and its diagonal is overwritten. Without any token the change is 0.
    """
    return solve_spd(damp(gram_WW, ridge), rest_WD)


def damp(gram_WW: Tensor, ridge: float) -> Tensor:
    """G + diag(λ) in place, λ_i = ridge × G_ii, at least `RIDGE_FLOOR` × the mean, so that a silent neuron stays."""
    diagonal = gram_WW.diagonal()
    floor = RIDGE_FLOOR * diagonal.mean() if len(diagonal) else 0
    diagonal.add_(ridge * diagonal.clamp(min=floor) if floor > 0 else 1.0)
    return gram_WW


def solve_spd(gram_WW: Tensor, rest_WD: Tensor) -> Tensor:
    """`G⁻¹ R` from G's lower triangle.

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
