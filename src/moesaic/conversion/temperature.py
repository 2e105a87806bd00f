"""A converted model is as sure of itself as the dense one and less often right: its logits are scaled to fit.

One factor for the whole model, in the final norm's weight, so that any engine applies it; the ranking of tokens, and
with it greedy text, stays as it was (temperature scaling: Guo et al., arXiv 1706.04599).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.families import scale_logits
from .prepare import Conversion

STEP, LEAST = 0.05, 0.5


@torch.no_grad()
def fit_temperature(conversion: Conversion, validation_NLD: Tensor) -> tuple[float, dict[str, Tensor]]:
    """(factor of the logits of least loss on the validation tokens, the final norm's tensor by name).

    Factors go down from 1 in steps of `STEP` until the loss rises; the stream's model is left as it was.
    """
    norm = conversion.stream.model.base_model.norm
    dense_D = norm.weight.data.clone()

    def loss(factor: float) -> tuple[float, dict[str, Tensor]]:
        name = scale_logits(conversion.stream.model, factor)
        found = conversion.stream.token_losses(conversion.validation_NL, validation_NLD).mean().item()
        scaled = {name: norm.weight.data.clone()}
        norm.weight.data.copy_(dense_D)
        return found, scaled

    factor, (least, tensors) = 1.0, loss(1.0)
    while factor - STEP >= LEAST:
        found, scaled = loss(factor - STEP)
        if not found < least:
            break
        factor, least, tensors = factor - STEP, found, scaled
    return round(factor, 4), tensors
