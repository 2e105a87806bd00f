"""Closed-form recovery: down-projections solved again for what the router selects (design §4.5).

Shapes: T tokens, C tokens of one chunk, D hidden size, F dense neurons, W neurons of all blocks, E experts, K active.
A *block* is the shared expert or one routed expert; its features are its neurons' activations on its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.sample import LayerSample
from ..models.moe import MoE
from ..partition import Partition
from .base import Recovery

CONDITION_FOR_FP32 = 1e6


@dataclass(frozen=True, kw_only=True)
class ClosedForm(Recovery):
    """`min_W sum_t w_t² ‖y_t - (m_t * h_t) W‖² + ridge ‖W - W_dense‖²`, m the mask of the neurons that run.

    Experts that never run together and share nothing (top-1 specialists) are solved one by one, each also with a small
    weight on the tokens of the others, which pulls it to the static solution where it has few tokens of its own.
    """

    ridge: float = 0.3
    """Relative to the mean diagonal of the normal equations."""
    other_tokens: float = 0.03
    """Weight of the other specialists' tokens (τ); the own count 1."""

    @torch.no_grad()
    def recover(self, moe: MoE, sample: LayerSample, partition: Partition) -> None:
        blocks = [partition.shared] * bool(len(partition.shared)) + list(partition.experts)
        target_TD = sample.output_TD.float()
        if partition.bias_D is not None:
            target_TD = target_TD - partition.bias_D
        isolated = moe.shared_experts is None and moe.gate is not None and moe.gate.num_experts_per_tok == 1
        down_WD = [sample.ffn.down_DF[:, block].T.float() for block in blocks]
        if isolated:
            solved = self._solve_isolated(moe, sample, blocks, target_TD, down_WD)
        else:
            gram_WW, right_WD = normal_equations(moe, sample, blocks, target_TD)
            solved = ridge_to_prior(gram_WW, right_WD, torch.cat(down_WD), self.ridge).split([len(b) for b in blocks])
        if moe.shared_experts is not None:
            moe.shared_experts.down_proj.weight.copy_(solved[0].T)
            solved = solved[1:]
        if moe.experts is not None:
            moe.experts.down_proj.copy_(torch.stack([weight_ID.T for weight_ID in solved]))

    def _solve_isolated(
        self, moe: MoE, sample: LayerSample, blocks: list[Tensor], target_TD: Tensor, down_WD: list[Tensor]
    ) -> list[Tensor]:
        grams = [torch.zeros(len(b), len(b), device=target_TD.device) for b in blocks]
        rights = [torch.zeros(len(b), target_TD.shape[1], device=target_TD.device) for b in blocks]
        for part, h_CF in sample.chunks():
            expert_C = chosen(moe, sample.input_TD[part])[0].squeeze(1)
            h_CF, y_CD = weighted(h_CF, target_TD[part], sample.weight_T[part])
            for e, block in enumerate(blocks):
                share_C1 = torch.where(expert_C == e, 1.0, self.other_tokens**0.5)[:, None].to(h_CF.dtype)
                z_CI = h_CF[:, block] * share_C1
                grams[e] += z_CI.T @ z_CI
                rights[e] += z_CI.T @ (y_CD * share_C1)
        return [ridge_to_prior(*system, self.ridge) for system in zip(grams, rights, down_WD, strict=True)]


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


def normal_equations(moe: MoE, sample: LayerSample, blocks: list[Tensor], target_TD: Tensor) -> tuple[Tensor, Tensor]:
    """(Z.T Z [W, W], Z.T Y [W, D]) of the weighted features of all blocks, each block only on its own tokens.

    Equals the products with a matrix Z that has zeros where an expert does not run; pairs of experts cost only the
    tokens that run both.
    """
    size = sum(len(block) for block in blocks)
    edges = torch.tensor([0, *[len(block) for block in blocks]]).cumsum(0).tolist()
    gram_WW = torch.zeros(size, size, device=target_TD.device)
    right_WD = torch.zeros(size, target_TD.shape[1], device=target_TD.device)
    for part, h_CF in sample.chunks():
        h_CF, y_CD = weighted(h_CF, target_TD[part], sample.weight_T[part])
        features = block_features(moe, sample.input_TD[part], h_CF, blocks)
        for i, (on_i, z_i) in enumerate(features):
            right_WD[edges[i] : edges[i + 1]] += z_i.T @ y_CD[on_i]
            for j, (on_j, z_j) in enumerate(features[: i + 1]):
                both = on_i & on_j
                product = z_i[both[on_i]].T @ z_j[both[on_j]]
                gram_WW[edges[i] : edges[i + 1], edges[j] : edges[j + 1]] += product
    return gram_WW.tril_() + gram_WW.tril(-1).T, right_WD


def block_features(moe: MoE, x_CD: Tensor, h_CF: Tensor, blocks: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """For each block (tokens that run it, bool [C]; their activations times the gate's weight, [tokens, I])."""
    features = []
    experts = blocks
    if moe.shared_experts is not None:
        features.append((torch.ones(len(x_CD), dtype=torch.bool, device=x_CD.device), h_CF[:, blocks[0]]))
        experts = blocks[1:]
    if experts:
        index_CK, weight_CK = chosen(moe, x_CD)
        for e, block in enumerate(experts):
            hit_CK = index_CK == e
            on_C = hit_CK.any(1)
            gain_C1 = (weight_CK * hit_CK).sum(1, keepdim=True)[on_C].to(h_CF.dtype)
            features.append((on_C, h_CF[on_C][:, block] * gain_C1))
    return features


def ridge_to_prior(gram_WW: Tensor, right_WD: Tensor, prior_WD: Tensor, ridge: float) -> Tensor:
    """`argmin_W tr(W.T G W) - 2 tr(W.T B) + λ ‖W - prior‖²`, λ = ridge × mean diagonal of G, [W, D].

    Solved for the change from the prior by Cholesky, in float64 when float32 fails or its condition estimate is poor,
    by eigenvalues when that fails too. Without any token the prior is returned. G is overwritten.
    """
    scale = gram_WW.diagonal().mean()
    if scale <= 0:
        return prior_WD
    rest_WD = right_WD - gram_WW @ prior_WD
    gram_WW.diagonal().add_(ridge * scale)
    factor, failed = torch.linalg.cholesky_ex(gram_WW)
    diagonal = factor.diagonal()
    if failed or (diagonal.max() / diagonal.min()).square() > CONDITION_FOR_FP32:
        rest_WD, system_WW = rest_WD.double(), gram_WW.double()
        factor, failed = torch.linalg.cholesky_ex(system_WW)
        if failed:
            values_W, vectors_WW = torch.linalg.eigh(system_WW)
            kept_W = values_W > values_W[-1] * torch.finfo(torch.float32).eps
            inverse_W = torch.where(kept_W, 1 / values_W, 0.0)[:, None]
            return prior_WD + (vectors_WW @ (inverse_W * (vectors_WW.T @ rest_WD))).float()
    return prior_WD + torch.cholesky_solve(rest_WD, factor).float()
