"""`Qwen3VLMoeForConditionalGeneration`: what a Qwen3-VL becomes, whose language tower is of a class of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...results import Json
from ..base import Format, MoesaicModelConfig, Tensors
from . import _decoder as decoder

EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
"""Transposed in checkpoints."""


def expert_width(config: MoesaicModelConfig) -> int:
    """Count the neurons of an expert, with its copy of the shared one."""
    return config.moe_intermediate_size + config.shared_expert_intermediate_size


@dataclass(frozen=True, kw_only=True)
class Qwen3VLMoe(Format):
    """Chosen experts with weight 1 from renormalised gates, as in Mixtral; each holds a copy of the shared expert.

    Router `softmax` is its own, and layers may stay dense.
    """

    whole_model_type: ClassVar[str] = "qwen3_vl_moe"
    whole_architecture: ClassVar[str] = "Qwen3VLMoeForConditionalGeneration"
    routers: ClassVar[tuple[str, ...]] = ("linear", "softmax")
    mixes_dense: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("qwen3_vl_text",)
    loaded_by: ClassVar[tuple[str, ...]] = ("transformers",)
    preference: ClassVar[int | None] = 0
    copies_shared: ClassVar[bool] = True

    def expert_factor(self, config: MoesaicModelConfig) -> int:
        return decoder.renormalised_factor(config)

    def reason_against(self, config: MoesaicModelConfig) -> str:
        return decoder.reason_against(
            self, config,
            (config.router == "softmax" and not config.norm_topk_prob, "it divides its gates by their sum"),
            decoder.not_power(self.expert_factor(config), "active experts"),
            decoder.too_small(config, decoder.renormalised_scale(config)),
            (
                config.hidden_size in (width := expert_width(config), 2 * width),
                f"its experts are {width} wide, so that a matrix is as high as wide, and transformers could not tell "
                "whether it is transposed",
            ),
        )  # fmt: skip

    def config_json(self, config: MoesaicModelConfig) -> Json:
        return decoder.common_config(config, "qwen3_vl_moe_text", "Qwen3VLMoeTextModel") | {
            "head_dim": decoder.head_dim(config),
            "attention_bias": False,
            "num_experts": config.num_experts,
            "moe_intermediate_size": expert_width(config),
            "decoder_sparse_step": 1,
            "mlp_only_layers": config.mlp_only_layers or [],
        }

    def layer(self, tensors: Tensors, config: MoesaicModelConfig) -> Tensors:
        stock = dict(tensors)
        if "mlp.gate.weight" not in stock:  # stays dense
            return stock
        del stock["mlp.gate.e_score_correction_bias"]
        stock["mlp.gate.weight"] = stock["mlp.gate.weight"] * decoder.renormalised_scale(config)
        joined = decoder.replicate_shared(stock, self.expert_factor(config))
        return stock | {name: weight.transpose(1, 2).contiguous() for name, weight in zip(EXPERTS, joined, strict=True)}

    def moesaic_layer(self, tensors: Tensors, config: MoesaicModelConfig) -> Tensors:
        layer = dict(tensors)
        if "mlp.gate.weight" not in layer:
            return layer
        layer["mlp.gate.weight"] = layer["mlp.gate.weight"] / decoder.renormalised_scale(config)
        layer["mlp.gate.e_score_correction_bias"] = layer["mlp.gate.weight"].new_zeros(config.num_experts)
        gate_up, down = (layer.pop(name).transpose(1, 2).contiguous() for name in EXPERTS)
        return layer | decoder.separate_shared(gate_up, down, config.moe_intermediate_size, self.expert_factor(config))
