"""The kept experts' down-projections solved again, for what the removed ones said.

Shapes: T tokens, D hidden size, N kept experts, I neurons of one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..calibration.layers import MIN_NORM
from ..models.moe_block import MoEBlock
from ..recovery.closed_form import ridge_change

RIDGE = 0.3
"""Relative to each neuron's own energy, as in `recovery/closed_form.py`."""
SWEEPS = 3


@torch.no_grad()
def recover(
    block: MoEBlock, input_TD: Tensor, target_TD: Tensor, weight_TN: Tensor, ridge: float = RIDGE, sweeps: int = SWEEPS
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
    experts, own_NDI = block.experts, block.down_proj.float()
    norm_T = target_TD.float().norm(dim=1)
    value_T = norm_T.clamp(min=max(MIN_NORM * norm_T.median().item(), 1e-30)).reciprocal()
    value_T = value_T / value_T.mean()
    found_NDI, tokens = own_NDI.clone(), [column.nonzero().squeeze(1) for column in weight_TN.T]

    def features(expert: int) -> Tensor:
        token = tokens[expert]
        gate_TI, up_TI = linear(input_TD[token], experts.get_parameter("gate_up_proj")[expert]).chunk(2, dim=-1)
        activation = experts.act_fn(gate_TI) * up_TI  # pyrefly: ignore[not-callable]
        return activation.float() * (weight_TN[token, expert] * value_T[token])[:, None]

    rest_TD = target_TD.float() * value_T[:, None]
    for expert, token in enumerate(tokens):
        rest_TD[token] -= features(expert) @ own_NDI[expert].T
    for _ in range(sweeps):
        for expert, token in enumerate(tokens):
            if not len(token):
                continue
            z_TI, change_ID = features(expert), (found_NDI[expert] - own_NDI[expert]).T
            # the rest that this expert's change so far has not yet taken away
            open_TD = rest_TD[token] + z_TI @ change_ID
            new_ID = ridge_change(z_TI.T @ z_TI, z_TI.T @ open_TD, ridge)
            rest_TD[token] = open_TD - z_TI @ new_ID
            found_NDI[expert] = own_NDI[expert] + new_ID.T
    return found_NDI
