"""`FlexOlmoForCausalLM`: for OLMo-2, whose norms come after attention and FFN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...results import Json
from ..base import Format, MoesaicModelConfig, Tensors
from . import _decoder as decoder

EXPERTS = "mlp.experts."
PARTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class FlexOlmo(Format):
    """Chosen experts with weight 1 from renormalised gates: `K softmax(ε z) -> 1`; exactly 1 for K = 1 (ε = 1 then).

    `gate x ε`, experts' `down_proj x K`. It has no shared expert, so each expert holds a copy of it. Nothing is scaled
    for router `softmax`, which is its own. Stock transformers and vLLM have it.
    """

    routers: ClassVar[tuple[str, ...]] = ("linear", "softmax")
    sources: ClassVar[tuple[str, ...]] = ("olmo2",)
    loaded_by: ClassVar[tuple[str, ...]] = ("transformers", "vllm")
    preference: ClassVar[int | None] = 2
    copies_shared: ClassVar[bool] = True

    def expert_factor(self, config: MoesaicModelConfig) -> int:
        return decoder.renormalised_factor(config)

    def reason_against(self, config: MoesaicModelConfig) -> str:
        return decoder.reason_against(
            self, config, decoder.unlike_heads(config),
            decoder.not_power(self.expert_factor(config), "active experts"),
            decoder.too_small(config, decoder.renormalised_scale(config)),
        )  # fmt: skip

    def config_json(self, config: MoesaicModelConfig) -> Json:
        return decoder.common_config(config, "flex_olmo", "FlexOlmoForCausalLM") | {
            "num_experts": config.num_experts,
            "intermediate_size": config.moe_intermediate_size + config.shared_expert_intermediate_size,
            "norm_topk_prob": config.router != "softmax" or config.norm_topk_prob,
            "attention_bias": False,
        }

    def layer(self, tensors: Tensors, config: MoesaicModelConfig) -> Tensors:
        stock = dict(tensors)
        del stock["mlp.gate.e_score_correction_bias"]
        stock["mlp.gate.weight"] = stock["mlp.gate.weight"] * decoder.renormalised_scale(config)
        gate_up, down = decoder.replicate_shared(stock, self.expert_factor(config))
        return stock | decoder.split_experts(gate_up, down, EXPERTS, PARTS)

    def moesaic_layer(self, tensors: Tensors, config: MoesaicModelConfig) -> Tensors:
        layer = dict(tensors)
        layer["mlp.gate.weight"] = layer["mlp.gate.weight"] / decoder.renormalised_scale(config)
        layer["mlp.gate.e_score_correction_bias"] = layer["mlp.gate.weight"].new_zeros(config.num_experts)
        gate_up, down = decoder.join_experts(layer, EXPERTS, PARTS)
        return layer | decoder.separate_shared(gate_up, down, config.moe_intermediate_size, self.expert_factor(config))
