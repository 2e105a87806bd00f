"""The hidden states that a conversion carries from layer to layer.

Shapes: N sequences, L tokens in one, M opening tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from ..models.integrity import check_numbers
from ..models.layerwise import LayerwiseModel
from .tokens import ConversionTokens

TEXTS = {
    "calibration": "calibration", "converted": "held_out", "dense": "held_out", "validation": "validation",
    "opening": "opening", "dense_opening": "opening",
}  # fmt: skip
"""The text that each of the hidden states is of."""


@dataclass(frozen=True, kw_only=True)
class HiddenStates:
    """What enters a decoder layer, [N, L, D] each; None where there is no such text."""

    calibration: Tensor
    converted: Tensor
    """Held-out text on the path of converted layers."""
    dense: Tensor | None = None
    """Held-out text on the path of dense layers; None in a trial, which compares with nothing."""
    validation: Tensor | None = None
    opening: Tensor | None = None
    """Tokens that open a text, [M, 1, D], on the path of converted layers."""
    dense_opening: Tensor | None = None
    """The same on the path of dense layers."""

    def tensors(self) -> dict[str, Tensor]:
        """List those that there are, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Put together what `tensors` gave."""
        return cls(**tensors)


def embed(layerwise: LayerwiseModel, tokens: ConversionTokens, *, dense: bool = True) -> HiddenStates:
    """Make the hidden states that enter the first layer; with `dense`, held-out text on the dense path too."""
    texts = {"calibration": tokens.calibration_NL, "validation": tokens.validation_NL, "opening": tokens.opening_M1}
    texts |= {"converted": tokens.held_out_NL}
    found = {
        name: layerwise.embed(tokens_NL, tokens.pictured.get(TEXTS[name]), TEXTS[name])
        for name, tokens_NL in texts.items()
        if len(tokens_NL)
    }
    if "opening" in found:
        found["dense_opening"] = found["opening"].clone()
    if dense:
        found["dense"] = found["converted"].clone()
    return HiddenStates.from_tensors(found)


def run_dense(layerwise: LayerwiseModel, index: int, layer: torch.nn.Module, states: HiddenStates) -> HiddenStates:
    """Run a layer that stays dense on all of them."""
    after = {
        name: layerwise.run(index, layer, hidden_NLD, TEXTS[name]) for name, hidden_NLD in states.tensors().items()
    }
    check_numbers(after, f"layer {index}", layerwise.dtype)
    return HiddenStates.from_tensors(after)


def relearn_layer_calls(layerwise: LayerwiseModel, tokens: ConversionTokens) -> None:
    """Let a model know how it calls its layers on texts that were embedded in another process."""
    texts = {"calibration": tokens.calibration_NL, "validation": tokens.validation_NL, "held_out": tokens.held_out_NL}
    for name, tokens_NL in (texts | {"opening": tokens.opening_M1}).items():
        pictured = tokens.pictured.get(name)
        few_NL = tokens_NL if pictured else tokens_NL[:1]
        if len(few_NL):
            layerwise.embed(few_NL, pictured, name)
