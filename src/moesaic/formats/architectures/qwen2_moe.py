"""`Qwen2MoeForCausalLM`, in the way that every engine reads alike: weights of the full softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...models.families import ATTENTION
from ...results import Json
from ..base import Format, MoesaicModelConfig, Tensors
from . import _decoder as decoder

EXPERTS = "mlp.experts."
PARTS = ("gate_proj", "up_proj", "down_proj")
SHARED_GATE = 2.0**-20
"""Not 0, of which llama.cpp's sigmoid, `silu(x) / x`, is NaN."""


@dataclass(frozen=True, kw_only=True)
class Qwen2Moe(Format):
    """Chosen experts with weight 1 from a flat softmax over all E: `E softmax(ε z) -> 1`.

    `gate x ε`, experts' `down_proj x E`, `norm_topk_prob` false (llama.cpp and MLX do not read it); the shared expert
    behind its gate of 1/2, `down_proj x 2`.
    """

    sources: ClassVar[tuple[str, ...]] = ("llama", "mistral", "qwen2", "phi3")
    loaded_by: ClassVar[tuple[str, ...]] = ("transformers", "vllm", "sglang", "mlx")

    def expert_factor(self, config: MoesaicModelConfig) -> int:
        return config.num_experts

    def reason_against(self, config: MoesaicModelConfig) -> str:
        return decoder.reason_against(
            self, config, decoder.unlike_heads(config),
            (not config.n_shared_experts, "it needs a shared expert; convert with a plan like S1A1E5"),
            decoder.not_power(config.num_experts, "routed experts"),
            decoder.too_small(config, decoder.ROUTER_SCALE),
        )  # fmt: skip

    def config_json(self, config: MoesaicModelConfig) -> Json:
        return decoder.common_config(config, "qwen2_moe", "Qwen2MoeForCausalLM") | {
            "num_experts": config.num_experts,
            "moe_intermediate_size": config.moe_intermediate_size,
            "shared_expert_intermediate_size": config.shared_expert_intermediate_size,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "qkv_bias": True,
            "use_sliding_window": False,
        }

    def layer(self, tensors: Tensors, config: MoesaicModelConfig) -> Tensors:
        stock = decoder.split_attention(tensors, config)
        del stock["mlp.gate.e_score_correction_bias"]
        stock["mlp.gate.weight"] = stock["mlp.gate.weight"] * decoder.ROUTER_SCALE
        for name in "qkv":  # engines expect a bias
            weight = stock[f"{ATTENTION}.{name}_proj.weight"]
            stock.setdefault(f"{ATTENTION}.{name}_proj.bias", weight.new_zeros(len(weight)))
        for name in PARTS:
            factor = 2 if name == "down_proj" else 1
            stock[f"mlp.shared_expert.{name}.weight"] = stock.pop(f"mlp.shared_experts.{name}.weight") * factor
        stock["mlp.shared_expert_gate.weight"] = torch.full_like(stock["mlp.gate.weight"][:1], SHARED_GATE)
        gate_up, down = stock.pop("mlp.experts.gate_up_proj"), stock.pop("mlp.experts.down_proj")
        return stock | decoder.split_experts(gate_up, down * self.expert_factor(config), EXPERTS, PARTS)

    def moesaic_layer(self, tensors: Tensors, config: MoesaicModelConfig) -> Tensors:
        layer = dict(tensors)
        if config.dense_model_type != "qwen2":
            for name in "qkv":
                del layer[f"{ATTENTION}.{name}_proj.bias"]
        layer = decoder.join_attention(layer, config)
        del layer["mlp.shared_expert_gate.weight"]
        layer["mlp.gate.weight"] = layer["mlp.gate.weight"] / decoder.ROUTER_SCALE
        layer["mlp.gate.e_score_correction_bias"] = layer["mlp.gate.weight"].new_zeros(config.num_experts)
        for name in PARTS:
            factor = 2 if name == "down_proj" else 1
            layer[f"mlp.shared_experts.{name}.weight"] = layer.pop(f"mlp.shared_expert.{name}.weight") / factor
        gate_up, down = decoder.join_experts(layer, EXPERTS, PARTS)
        return layer | {"mlp.experts.gate_up_proj": gate_up, "mlp.experts.down_proj": down / self.expert_factor(config)}
