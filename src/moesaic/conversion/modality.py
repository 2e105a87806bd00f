"""How a converted layer does on text and on pictures apart: in held-out data, whatever it was calibrated on.

Shapes: T tokens, D hidden size, E routed experts, K slots for experts in a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..calibration.activations import CHUNK_TOKENS, LayerActivations
from ..calibration.layers import Tap, relative_error, relative_weights
from ..models.moe_block import count_load
from ..models.pictured import Pictured
from ..moe.block import MoE


class ByModality(NamedTuple):
    """Errors and loads of one layer over held-out tokens of `text` and of pictures (`image`)."""

    error_by_modality: dict[str, float]
    expert_tokens_by_modality: dict[str, list[int]]


@torch.no_grad()
def by_modality(
    moe: MoE, sample: LayerActivations, held_out: Tap, pictured: Pictured, chosen_TK: Tensor | None
) -> ByModality:
    """Compare a block with the dense FFN on the held-out tokens that it has just run.

    Args:
        moe: the block.
        sample: the layer's calibration tokens, for its dense FFN.
        held_out: what entered and left the block.
        pictured: which of its tokens are parts of pictures, or padding.
        chosen_TK: their experts, where these are decided ahead of the layers.
    """
    keep_T = ~pictured.is_padding_NL.flatten()
    picks = {"text": ~pictured.is_image_NL.flatten() & keep_T, "image": pictured.is_image_NL.flatten() & keep_T}
    input_TD, found_TD = torch.cat(held_out.inputs), torch.cat(held_out.outputs)
    dense_TD = torch.cat([sample.ffn(x_CD) for x_CD in input_TD.split(CHUNK_TOKENS)])
    whole = LayerActivations(
        ffn=sample.ffn, input_TD=input_TD, output_TD=dense_TD, weight_T=relative_weights(dense_TD),
        domain_T=torch.zeros(len(input_TD), dtype=torch.int64, device=input_TD.device), chosen_TK=chosen_TK,
    )  # fmt: skip
    errors, loads = {}, {}
    for name, pick_T in picks.items():
        pick_T = pick_T.to(input_TD.device)
        if pick_T.any():
            part = whole.take(pick_T)
            errors[name] = relative_error(part, found_TD[pick_T])
            loads[name] = expert_loads(moe, part).tolist()
    return ByModality(errors, loads)


@torch.no_grad()
def expert_loads(moe: MoE, sample: LayerActivations) -> Tensor:
    """Count the sample's tokens that run each routed expert, int64 [E]."""
    if moe.gate is None or moe.experts is None:
        return torch.zeros(0, dtype=torch.int64)
    count, index_TK = moe.experts.num_experts, sample.chosen_TK
    if index_TK is None:
        index_TK = torch.cat([moe.gate(x_CD, moe.experts).top_k_index for x_CD in sample.input_TD.split(CHUNK_TOKENS)])
    return count_load(index_TK.cpu(), count)
