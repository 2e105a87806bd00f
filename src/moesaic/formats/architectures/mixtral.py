"""`MixtralForCausalLM`: the oldest Mixture-of-Experts architecture, which every engine has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...results import Json
from ..base import Format, MoesaicModelConfig, Tensors
from . import _decoder as decoder

MOE = "block_sparse_moe."
EXPERTS = MOE + "experts."
PARTS = ("w1", "w3", "w2")


@dataclass(frozen=True, kw_only=True)
class Mixtral(Format):
    """Chosen experts with weight 1 from renormalised gates, exactly so for one active expert (plan `S0A1E4`; ε = 1).

    `gate x ε`, experts' `w2 x K`. It has no shared expert, so each expert holds a copy of it. Nothing is scaled
    for router `softmax`, which is its own.
    """

    routers: ClassVar[tuple[str, ...]] = ("linear", "softmax")
    sources: ClassVar[tuple[str, ...]] = ("llama", "mistral", "phi3")
    loaded_by: ClassVar[tuple[str, ...]] = ("transformers", "vllm", "sglang", "mlx")
    preference: ClassVar[int | None] = 3
    gguf_architecture: ClassVar[str | None] = "llama"
    gguf_interleaved: ClassVar[bool] = True
    copies_shared: ClassVar[bool] = True

    def engines(self, config: MoesaicModelConfig) -> list[str]:
        unlike, _ = decoder.unlike_heads(config)  # MLX takes the size of a head from the hidden size
        return [engine for engine in super().engines(config) if engine != "mlx" or not unlike]

    def expert_factor(self, config: MoesaicModelConfig) -> int:
        return decoder.renormalised_factor(config)

    def reason_against(self, config: MoesaicModelConfig) -> str:
        return decoder.reason_against(
            self, config,
            (config.router == "softmax" and not config.norm_topk_prob, "it divides its gates by their sum"),
            decoder.not_power(self.expert_factor(config), "active experts"),
            decoder.too_small(config, decoder.renormalised_scale(config)),
        )  # fmt: skip

    def config_json(self, config: MoesaicModelConfig) -> Json:
        return decoder.common_config(config, "mixtral", "MixtralForCausalLM") | {
            "head_dim": decoder.head_dim(config),
            "num_local_experts": config.num_experts,
            "intermediate_size": config.moe_intermediate_size + config.shared_expert_intermediate_size,
            "sliding_window": None,
        }

    def layer(self, tensors: Tensors, config: MoesaicModelConfig) -> Tensors:
        stock = decoder.split_attention(tensors, config)
        del stock["mlp.gate.e_score_correction_bias"]
        stock[MOE + "gate.weight"] = stock.pop("mlp.gate.weight") * decoder.renormalised_scale(config)
        gate_up, down = decoder.replicate_shared(stock, self.expert_factor(config))
        return stock | decoder.split_experts(gate_up, down, EXPERTS, PARTS)

    def moesaic_layer(self, tensors: Tensors, config: MoesaicModelConfig) -> Tensors:
        layer = decoder.join_attention(tensors, config)
        layer["mlp.gate.weight"] = layer.pop(MOE + "gate.weight") / decoder.renormalised_scale(config)
        layer["mlp.gate.e_score_correction_bias"] = layer["mlp.gate.weight"].new_zeros(config.num_experts)
        gate_up, down = decoder.join_experts(layer, EXPERTS, PARTS)
        return layer | decoder.separate_shared(gate_up, down, config.moe_intermediate_size, self.expert_factor(config))

    def gguf_layer(self, native: Tensors, config: MoesaicModelConfig) -> Tensors:
        gate_up, down = decoder.join_experts(native, EXPERTS, PARTS)
        return {
            "ffn_norm.weight": native.pop("post_attention_layernorm.weight"),
            "ffn_gate_inp.weight": native.pop(MOE + "gate.weight"),
        } | decoder.gguf_experts(gate_up, down, {})

    def native_layer(self, theirs: Tensors) -> Tensors:
        routed = decoder.native_experts(theirs, "exps")
        return {
            "post_attention_layernorm.weight": theirs.pop("ffn_norm.weight"),
            MOE + "gate.weight": theirs.pop("ffn_gate_inp.weight"),
        } | decoder.split_experts(routed.gate_up, routed.down, EXPERTS, PARTS)
