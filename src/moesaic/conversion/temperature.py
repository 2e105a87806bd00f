"""Temperature of a converted model: its logits are scaled so that it is as sure as it should be.

One factor for the whole model, in the final norm's weight, so that any engine applies it; the ranking of tokens, and
with it greedy text, stays as it was (temperature scaling: Guo et al., arXiv 1706.04599).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import registry
from ..models.layerwise import LayerwiseModel
from ..models.norms import can_scale_logits, final_norm, scale_logits
from .prepare import Conversion
from .states import HiddenStates

STEP, LEAST = 0.05, 0.5


class Temperature(NamedTuple):
    """The factor on the logits, and the tensors that carry it, by name."""

    logit_factor: float
    tensors: dict[str, Tensor]


@torch.no_grad()
def fit_temperature(layerwise: LayerwiseModel, tokens_NL: Tensor, hidden_NLD: Tensor) -> Temperature:
    """Fit the factor of least loss on validation tokens, whose last hidden states are given.

    Factors go down from 1 in steps of `STEP` until the loss rises; the model is left as it was. Without a final norm
    that can carry a factor it is 1.
    """
    if not can_scale_logits(layerwise.model):
        return Temperature(1.0, {})
    parameters = list(final_norm(layerwise.model).parameters())
    dense = [parameter.data.clone() for parameter in parameters]

    def loss(factor: float) -> tuple[float, Temperature]:
        names = scale_logits(layerwise.model, factor)
        found = layerwise.token_losses(tokens_NL, hidden_NLD).mean().item()
        scaled = {name: layerwise.model.get_parameter(name).data.clone() for name in names}
        for parameter, before in zip(parameters, dense, strict=True):
            parameter.data.copy_(before)
        return found, Temperature(round(factor, 4), scaled)

    factor, (least, best) = 1.0, loss(1.0)
    while factor - STEP >= LEAST:
        found, scaled = loss(factor - STEP)
        if not found < least:
            break
        factor, least, best = factor - STEP, found, scaled
    return best


def fit(conversion: Conversion, states: HiddenStates) -> Temperature:
    """Fit the temperature on validation text; 1 without recovery or such text."""
    if registry.text("recovery", conversion.config.recovery) == "none" or states.validation is None:
        return Temperature(1.0, {})
    tokens_NL, hidden_NLD = conversion.tokens.validation_NL, states.validation
    if (pictured := conversion.tokens.pictured.get("validation")) is not None:
        # a model may be surer of its answers than the bundled ones make right, whatever the conversion did
        text_N = ~pictured.has_pictures_N
        tokens_NL, hidden_NLD = tokens_NL[text_N], hidden_NLD[text_N.to(hidden_NLD.device)]
    return fit_temperature(conversion.layerwise, tokens_NL, hidden_NLD) if len(tokens_NL) else Temperature(1.0, {})
