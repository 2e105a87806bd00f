"""What a token costs: the weights that a step reads or a token multiplies with, dense or Mixture-of-Experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..formats.base import Format, MoesaicModelConfig, block_config
from ..models.families import decoder_layers, ffn_name
from ..models.moe_block import MoEBlock, find_block
from ..moe.ahead import network_of
from ..plan import Plan
from ..results import ConversionResult


def ffn_of(layer: nn.Module) -> nn.Module:
    """Find the FFN of a decoder layer, dense or Mixture-of-Experts."""
    block = find_block(layer)
    if block is not None:
        return block.module
    without_experts = next((c for c in layer.children() if hasattr(c, "shared_experts")), None)  # statically pruned
    return without_experts or layer.get_submodule(ffn_name(layer))


def active_block_weights(block: MoEBlock | nn.Module, experts: float | None = None) -> float:
    """Count the weights of an FFN that are read when `experts` of its routed ones are touched; None: one token's."""
    if isinstance(block, nn.Module):
        found = find_block(block)
        if found is None:
            return sum(p.numel() for p in block.parameters())
        block = found
    total = sum(p.numel() for p in block.module.parameters())
    touched = block.num_experts_per_tok if experts is None else experts
    return total - (1 - touched / block.num_experts) * sum(p.numel() for p in block.experts.parameters())


def head_weights(model: PreTrainedModel) -> Tensor:
    """Find the weights that give the logits."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return head.weight


def body_weights(model: PreTrainedModel, experts: Sequence[float | None] | None = None) -> float:
    """Count the weights that one prompt token multiplies with; the head runs on the last token only.

    Args:
        model: dense or a Mixture-of-Experts.
        experts: routed experts that a token runs in each layer, where that is not a fixed number.
    """
    return active_weights(model, experts) - head_weights(model).numel()


def active_weights(model: PreTrainedModel, experts: Sequence[float | None] | None = None) -> float:
    """Count the weights that one decoding step reads, of one token or with so many experts touched in each layer.

    Embeddings, that of a router ahead of the layers too, are looked up and not counted.
    """
    layers = list(decoder_layers(model))
    total = float(sum(p.numel() for p in model.parameters()))
    embedding = model.get_input_embeddings().get_parameter("weight")
    if embedding is not head_weights(model):
        total -= embedding.numel()
    ahead = network_of(model)
    if ahead is not None:
        total -= ahead.embed.numel()
    for layer, touched in zip(layers, experts or [None] * len(layers), strict=True):
        block = find_block(layer)
        if block is not None:
            total += active_block_weights(block, touched) - sum(p.numel() for p in block.module.parameters())
    return total


def at_experts_per_token(known: ConversionResult, config: MoesaicModelConfig, experts: float) -> ConversionResult:
    """Correct the active share of a model whose tokens run so many routed experts on average.

    `(shared neurons + experts * neurons of one) / neurons of the dense FFN`, and the parameters that come with it.
    """
    neurons = config.shared_expert_intermediate_size + experts * config.moe_intermediate_size
    return at_share(known, config, mean_share(config, neurons / config.intermediate_size))


def at_share(known: ConversionResult, config: MoesaicModelConfig, share: float) -> ConversionResult:
    """Correct the active share of a model's FFNs, and the parameters that come with it."""
    more = 3 * config.num_hidden_layers * config.hidden_size * config.intermediate_size * (share - known.ffn_active)
    return replace(known, ffn_active=share, active_parameters=known.active_parameters + round(more))


class Sizes(NamedTuple):
    """Parameters of a converted model in the format that is written."""

    memory_factor: float
    """Neurons that are kept, relative to the dense FFN's, on average over layers."""
    ffn_active: float
    """Those that one token runs."""
    total_parameters: int
    active_parameters: int


def sizes(model: PreTrainedModel, plan: Plan, format: Format) -> Sizes:
    """Count the parameters of a converted model, which may be an `empty` one, those of a vision tower too."""
    named, config = dict(model.named_parameters()), block_config(model.config)
    total = sum(p.numel() for p in named.values())
    routed = sum(p.numel() for name, p in named.items() if ".experts." in name)
    idle = routed * (1 - plan.num_experts_per_tok / plan.num_experts) if plan.num_experts else 0
    copied = format.copied_parameters(config)
    dense_ffns = 3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers
    return Sizes(
        mean_share(config, plan.memory_factor(config.intermediate_size)) + copied.total / dense_ffns,
        mean_share(config, plan.ffn_active(config.intermediate_size)),
        total + copied.total,
        round(total - idle) + copied.active,
    )


def mean_share(config: MoesaicModelConfig, share: float) -> float:
    """Average what converted layers have or run of an FFN over all layers, of which those that stay dense have 1."""
    dense = len(config.mlp_only_layers or ()) / config.num_hidden_layers
    return share * (1 - dense) + dense
