"""Experts and a router made for each other: neurons go where a linear router sends the tokens that need them.

Shapes: T tokens, C tokens of one chunk, F neurons, E routed experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..calibration.activations import CHUNK_TOKENS, LayerActivations
from ..calibration.ridge import WeightedRidge

RIDGE = 1e-2
"""Of the router, as that of `routing/linear.py`."""
Reassign = Callable[[Tensor], Tensor]
"""Who is in which expert, 0 or 1 [F, E], from what each neuron would catch in each expert and in the shared one,
[F, E + 1]."""


def alternate(sample: LayerActivations, member_FE: Tensor, active: int, rounds: int, reassign: Reassign) -> Tensor:
    """Move neurons between experts, by at most so many rounds, so that experts catch more importance.

    With `v_ti = (h_ti ‖Wd_i‖)²` a router is fitted by ridge regression to each expert's `sqrt(sum_{i in e} v_ti)`, its
    `active` greatest scores are each token's experts, and in expert e a neuron would catch `sum_{t sent to e} w_t²
    v_ti`, in the shared one that of all tokens; `reassign` decides by these. All v are kept, in the activations' dtype.

    Args:
        sample: one layer's FFN and its calibration tokens.
        member_FE: the members of the experts at first, 0 or 1.
        active: routed experts that run for one token.
        rounds: the most that are made; they end when no neuron moves.
        reassign: puts neurons into experts by what they would catch.

    Returns:
        The members of the experts then, 0 or 1 [F, E].
    """
    value_TF, ridge = importance(sample), WeightedRidge(sample.input_TD, sample.weight_T, RIDGE)
    weight_T1 = sample.weight_T.square()[:, None]
    for _ in range(rounds):
        score_TE = fitted_scores(ridge, (value_TF @ member_FE.to(value_TF.dtype)).float().sqrt())
        dispatch_TE = torch.zeros_like(score_TE).scatter_(1, score_TE.topk(active, dim=1).indices, 1.0)
        dispatch_TX = (torch.cat([dispatch_TE, torch.ones_like(weight_T1)], dim=1) * weight_T1).to(value_TF.dtype)
        captured_FX = torch.zeros(value_TF.shape[1], dispatch_TX.shape[1], device=value_TF.device)
        for value_CF, dispatch_CX in zip(value_TF.split(CHUNK_TOKENS), dispatch_TX.split(CHUNK_TOKENS), strict=True):
            captured_FX += value_CF.T @ dispatch_CX
        previous, member_FE = member_FE, reassign(captured_FX / sample.tokens)
        if torch.equal(previous, member_FE):
            break
    return member_FE


def importance(sample: LayerActivations) -> Tensor:
    """Compute `(h_ti ‖Wd_i‖)²` of all tokens and neurons, [T, F]."""
    dtype = squares_dtype(sample.input_TD.dtype)
    value_TF = sample.input_TD.new_empty(sample.tokens, sample.ffn.intermediate_size, dtype=dtype)
    norm_F = sample.ffn.down_DF.float().norm(dim=0).to(dtype)
    for part, h_CF in sample.chunks():
        torch.mul(h_CF.to(dtype), norm_F, out=value_TF[part]).square_()
    return value_TF


def squares_dtype(dtype: torch.dtype) -> torch.dtype:
    """Choose the dtype for squares of activations: their own, but float32 for float16, which overflows at 256²."""
    return torch.float32 if dtype == torch.float16 else dtype


def fitted_scores(ridge: WeightedRidge, target_TE: Tensor) -> Tensor:
    """Predict the targets, centred per token, by the regression, [T, E]."""
    weight_DE, bias_E = ridge.fit(target_TE - target_TE.mean(1, keepdim=True))
    return torch.addmm(bias_E, ridge.x_TD.float(), weight_DE)


def memberships(experts_EI: Tensor, neurons: int) -> Tensor:
    """Write index sets [E, I] as columns of 0 and 1, [F, E]."""
    member_FE = torch.zeros(neurons, len(experts_EI), device=experts_EI.device)
    return member_FE.scatter_(0, experts_EI.T, 1.0)


def index_sets(member_FE: Tensor, width: int) -> Tensor:
    """List the members of each column in ascending order, int64 [E, width]."""
    return member_FE.T.nonzero()[:, 1].view(-1, width)
