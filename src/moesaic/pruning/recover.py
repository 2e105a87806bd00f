"""The kept experts' down-projections solved again, for what the removed ones said.

Shapes: T tokens, D hidden size, N kept experts, I neurons of one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..calibration.layers import relative_weights
from ..models.moe_block import MoEBlock
from ..recovery.closed_form import HELD_OUT, RIDGES, ridge_change

SWEEPS = 3


@torch.no_grad()
def best_block_ridge(block: MoEBlock, input_TD: Tensor, target_TD: Tensor, weight_TN: Tensor) -> float:
    """Choose the ridge of `RIDGES` whose fit to the other tokens has the least error on one in `HELD_OUT`, in a sweep.

    `RIDGES` and the error's weights are those of the conversion's recovery.
    """
    judge_T = torch.arange(len(input_TD), device=input_TD.device) % HELD_OUT == HELD_OUT - 1
    fit, judge = ([part[pick] for part in (input_TD, target_TD, weight_TN)] for pick in (~judge_T, judge_T))
    value_T, judged_TD = relative_weights(judge[1]), judge[1].float()
    errors = []
    for ridge in RIDGES:
        found_NDI = recover(block, fit[0], fit[1], fit[2], ridge, sweeps=1)
        said = (linear(features(block, e, judge[0], judge[2]), down_DI) for e, down_DI in enumerate(found_NDI))
        wrong_TD = sum(said, start=-judged_TD) * value_T[:, None]
        errors.append(wrong_TD.square().sum().item())
    return RIDGES[errors.index(min(errors))]


def features(block: MoEBlock, expert: int, input_TD: Tensor, weight_TN: Tensor) -> Tensor:
    """Compute an expert's activations times the router's weight for it, float32 [T, I]."""
    gate_up_XD = block.experts.get_parameter("gate_up_proj")[expert]
    gate_TI, up_TI = linear(input_TD, gate_up_XD).chunk(2, dim=-1)
    activation_TI = block.experts.act_fn(gate_TI) * up_TI  # pyrefly: ignore[not-callable]
    return activation_TI.float() * weight_TN[:, expert, None]


@torch.no_grad()
def recover(
    block: MoEBlock, input_TD: Tensor, target_TD: Tensor, weight_TN: Tensor, ridge: float, sweeps: int = SWEEPS
) -> Tensor:
    """Fit the experts' down-projections to what all experts said together: float32 [N, D, I].

    `min_W sum_t v_t² ‖y_t - sum_e g_te h_te W_e‖² + ridge sum_i G_ii ‖W_i - W_own,i‖²`, g the router's weights, v the
    tokens' (1 / ‖y‖), G the features' Gram matrix. Experts take turns, each fitting what the others leave, so that a
    system has the size of one expert; where no token runs two of them one sweep is the minimum.

    Args:
        block: with the kept experts.
        input_TD: what enters it.
        target_TD: what all experts of the source say, weighted.
        weight_TN: the router's weights of the kept experts, 0 where one does not run.
        ridge: relative to each neuron's energy.
        sweeps: turns of each expert.
    """
    own_NDI, value_T = block.down_proj.float(), relative_weights(target_TD)
    found_NDI, tokens = own_NDI.clone(), [column.nonzero().squeeze(1) for column in weight_TN.T]

    def own_features(expert: int) -> Tensor:
        token = tokens[expert]
        return features(block, expert, input_TD[token], weight_TN[token]) * value_T[token, None]

    rest_TD = target_TD.float() * value_T[:, None]
    for expert, token in enumerate(tokens):
        rest_TD[token] -= own_features(expert) @ own_NDI[expert].T
    for _ in range(sweeps):
        for expert, token in enumerate(tokens):
            if not len(token):
                continue
            z_TI, change_ID = own_features(expert), (found_NDI[expert] - own_NDI[expert]).T
            # the rest that this expert's change so far has not yet taken away
            open_TD = rest_TD[token] + z_TI @ change_ID
            new_ID = ridge_change(z_TI.T @ z_TI, z_TI.T @ open_TD, ridge)
            rest_TD[token] = open_TD - z_TI @ new_ID
            found_NDI[expert] = own_NDI[expert] + new_ID.T
    return found_NDI
