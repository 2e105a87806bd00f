"""Norms of decoder models: which there are, and what they do to the channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .families import text_tower

FINAL_NORMS = ("norm", "embedding_norm")
"""Of a tower, by what families call it."""
FFN_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm")
"""Of what an FFN says, before it is added to the residual stream (Gemma 2 and 3, OLMo-2, GLM-4)."""


def final_norm(model: PreTrainedModel) -> nn.Module:
    """Find the norm between the last layer and the head."""
    tower = dict(text_tower(model).named_children())
    return next(tower[name] for name in FINAL_NORMS if name in tower)


def ffn_norm(layer: nn.Module) -> nn.Module | None:
    """Find the norm of what a decoder layer's FFN says; None where that is added as it is."""
    children = dict(layer.named_children())
    return next((children[name] for name in FFN_NORMS if name in children), None)


def norm_offset(norm: nn.Module) -> float:
    """Tell what a norm adds to its weight: 0, or Gemma's 1 of `(1 + weight) * x / rms(x)`."""
    weight = norm.get_parameter("weight")
    return (norm_gain(norm) - weight.float()).mean().round().item()


def norm_gain(norm: nn.Module) -> Tensor:
    """Measure what a norm multiplies channels by, float32 [D]: of values 1 and -1, whose mean is 0 and rms is 1."""
    weight = norm.get_parameter("weight")
    sign_D = torch.ones_like(weight)
    sign_D[1::2] = -1
    bias = getattr(norm, "bias", None)
    said_D = norm(sign_D).float() - (0 if bias is None else bias.float())
    return said_D * sign_D.float()


def can_scale_logits(model: PreTrainedModel) -> bool:
    """Tell whether a final norm carries a factor of all logits: it has a weight, and nothing is added after it."""
    head = model.get_output_embeddings()
    named = dict(final_norm(model).named_parameters())
    return "weight" in named and getattr(head, "bias", None) is None


def scale_logits(model: PreTrainedModel, factor: float) -> list[str]:
    """Multiply the logits by a factor through the final norm's weight and bias, and return the names of these.

    Norms are told apart by what they do: `weight * x / rms(x)`, or Gemma's `(1 + weight) * x / rms(x)`; with the mean
    taken off, and a bias, where the family has a LayerNorm.
    """
    norm = final_norm(model)
    own, offset, gain_D = list(norm.parameters()), norm_offset(norm), norm_gain(norm)
    for name, parameter in norm.named_parameters():
        shift = offset if name == "weight" else 0.0
        parameter.data.copy_((parameter.float() + shift) * factor - shift)
    if not torch.allclose(norm_gain(norm), gain_D * factor, rtol=0.02, atol=1e-3):
        raise AssertionError(f"{type(norm).__name__} does not multiply by its weight")
    return [name for name, parameter in model.named_parameters() if any(parameter is one for one in own)]
