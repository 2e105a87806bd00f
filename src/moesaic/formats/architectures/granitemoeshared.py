"""`GraniteMoeSharedForCausalLM`: for Granite, and for Llama 3's rope in llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ...results import Json
from ..base import Format, MoesaicModelConfig, Tensors
from . import _decoder as decoder

if TYPE_CHECKING:
    from gguf import GGUFWriter

MULTIPLIERS = ("embedding_multiplier", "logits_scaling", "residual_multiplier")


@dataclass(frozen=True, kw_only=True)
class GraniteMoeShared(Format):
    """Chosen experts with weight 1 from the softmax over the K chosen: `K softmax(ε z) -> 1`; 1 for K = 1 (ε = 1).

    `router x ε`, experts' `output_linear x K`; the shared expert has no gate.
    """

    sources: ClassVar[tuple[str, ...]] = ("llama", "mistral", "granite")
    loaded_by: ClassVar[tuple[str, ...]] = ("transformers", "vllm", "sglang")
    preference: ClassVar[int | None] = 1
    gguf_architecture: ClassVar[str | None] = "granitemoe"
    gguf_interleaved: ClassVar[bool] = True

    def expert_factor(self, config: MoesaicModelConfig) -> int:
        return config.num_experts_per_tok

    def reason_against(self, config: MoesaicModelConfig) -> str:
        return decoder.reason_against(
            self, config, decoder.unlike_heads(config),
            (not config.n_shared_experts, "it needs a shared expert; convert with a plan like S1A1E4"),
            decoder.not_power(config.num_experts_per_tok, "active experts"),
            decoder.too_small(config, decoder.renormalised_scale(config)),
        )  # fmt: skip

    def config_json(self, config: MoesaicModelConfig) -> Json:
        granite = config.dense_model_type == "granite"
        return decoder.common_config(config, "granitemoeshared", "GraniteMoeSharedForCausalLM") | {
            "num_local_experts": config.num_experts,
            "intermediate_size": config.moe_intermediate_size,
            "shared_intermediate_size": config.shared_expert_intermediate_size,
            "attention_bias": False,
            "attention_multiplier": config.to_dict()["attention_multiplier"]
            if granite
            else decoder.head_dim(config) ** -0.5,
            **{name: getattr(config, name) if granite else 1.0 for name in MULTIPLIERS},
        }

    def layer(self, tensors: Tensors, config: MoesaicModelConfig) -> Tensors:
        stock = dict(tensors)
        del stock["mlp.gate.e_score_correction_bias"]
        moe, shared = "block_sparse_moe.", "mlp.shared_experts."
        stock[moe + "router.layer.weight"] = stock.pop("mlp.gate.weight") * decoder.renormalised_scale(config)
        stock[moe + "input_linear.weight"] = stock.pop("mlp.experts.gate_up_proj")
        stock[moe + "output_linear.weight"] = stock.pop("mlp.experts.down_proj") * self.expert_factor(config)
        parts = [stock.pop(f"{shared}{name}_proj.weight") for name in ("gate", "up")]
        stock["shared_mlp.input_linear.weight"] = torch.cat(parts)
        stock["shared_mlp.output_linear.weight"] = stock.pop(f"{shared}down_proj.weight")
        return stock

    def moesaic_layer(self, tensors: Tensors, config: MoesaicModelConfig) -> Tensors:
        layer = dict(tensors)
        moe, shared = "block_sparse_moe.", "mlp.shared_experts."
        gate_ED = layer.pop(moe + "router.layer.weight") / decoder.renormalised_scale(config)
        gate, up = layer.pop("shared_mlp.input_linear.weight").chunk(2)
        return layer | {
            "mlp.gate.weight": gate_ED,
            "mlp.gate.e_score_correction_bias": gate_ED.new_zeros(len(gate_ED)),
            "mlp.experts.gate_up_proj": layer.pop(moe + "input_linear.weight"),
            "mlp.experts.down_proj": layer.pop(moe + "output_linear.weight") / self.expert_factor(config),
            f"{shared}gate_proj.weight": gate.clone(),
            f"{shared}up_proj.weight": up.clone(),
            f"{shared}down_proj.weight": layer.pop("shared_mlp.output_linear.weight"),
        }

    def gguf_layer(self, native: Tensors, config: MoesaicModelConfig) -> Tensors:
        gate, up = native.pop("shared_mlp.input_linear.weight").chunk(2)
        shared = {"gate": gate, "up": up, "down": native.pop("shared_mlp.output_linear.weight")}
        gate_up, down = (native.pop(f"block_sparse_moe.{name}_linear.weight") for name in ("input", "output"))
        return {
            "ffn_norm.weight": native.pop("post_attention_layernorm.weight"),
            "ffn_gate_inp.weight": native.pop("block_sparse_moe.router.layer.weight"),
        } | decoder.gguf_experts(gate_up, down, shared)

    def native_layer(self, theirs: Tensors) -> Tensors:
        routed, shared = (decoder.native_experts(theirs, kind) for kind in ("exps", "shexp"))
        return {
            "post_attention_layernorm.weight": theirs.pop("ffn_norm.weight"),
            "block_sparse_moe.router.layer.weight": theirs.pop("ffn_gate_inp.weight"),
            "block_sparse_moe.input_linear.weight": routed.gate_up,
            "block_sparse_moe.output_linear.weight": routed.down,
            "shared_mlp.input_linear.weight": shared.gate_up,
            "shared_mlp.output_linear.weight": shared.down,
        }

    def gguf_keys(self, writer: GGUFWriter, config: Json) -> None:
        writer.add_expert_shared_feed_forward_length(config["shared_intermediate_size"])
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
