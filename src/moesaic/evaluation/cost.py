"""What a token costs: the weights that a step reads or a token multiplies with, dense or converted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..models.families import decoder_layers
from ..moe.block import MoE


def ffn_of(layer: nn.Module) -> nn.Module:
    """The FFN of a decoder layer, dense or converted: the child with a down-projection or an MoE."""
    return next(c for c in layer.children() if isinstance(c, MoE) or hasattr(c, "down_proj"))


def active_block_weights(block: nn.Module, experts: float | None = None) -> float:
    """Weights of an FFN that are read when `experts` of its routed ones are touched; without a number, one token's."""
    total = sum(p.numel() for p in block.parameters())
    if not isinstance(block, MoE) or block.experts is None or block.gate is None:
        return total
    touched = block.gate.num_experts_per_tok if experts is None else experts
    return total - (1 - touched / block.experts.num_experts) * sum(p.numel() for p in block.experts.parameters())


def body_weights(model: PreTrainedModel) -> float:
    """Weights that one prompt token multiplies with; the head runs on the last token only."""
    head: Any = model.get_output_embeddings()
    return active_weights(model) - head.weight.numel()


def active_weights(model: PreTrainedModel, experts: Sequence[float | None] | None = None) -> float:
    """Weights that one decoding step reads, of one token or with so many experts touched in each layer.

    The input embedding is a look-up and not counted.
    """
    layers = list(decoder_layers(model))
    total = float(sum(p.numel() for p in model.parameters()))
    ends: tuple[Any, Any] = model.get_input_embeddings(), model.get_output_embeddings()
    embedding, head = (end.weight for end in ends)
    if embedding is not head:
        total -= embedding.numel()
    for layer, touched in zip(layers, experts or [None] * len(layers), strict=True):
        block = ffn_of(layer)
        total += active_block_weights(block, touched) - sum(p.numel() for p in block.parameters())
    return total
