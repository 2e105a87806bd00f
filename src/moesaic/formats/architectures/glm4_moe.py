"""`Glm4MoeForCausalLM`: stock transformers, vLLM, SGLang, llama.cpp and MLX have it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...models.families import ATTENTION
from ...results import Json
from ..base import Format, MoesaicModelConfig, Tensors
from . import _decoder as decoder

if TYPE_CHECKING:
    from gguf import GGUFWriter

EXPERTS = "mlp.experts."
PARTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Glm4Moe(Format):
    """Chosen experts with weight 1 from the sigmoid router: `2 sigmoid(z) -> 1` as `z -> 0`.

    With ε = `ROUTER_SCALE`: `gate x ε`, `e_score_correction_bias x ε / 4`, experts' `down_proj x 2`; `norm_topk_prob`
    false and `routed_scaling_factor` 1. The order of the experts is that of the unscaled scores, since sigmoid'(0) =
    1/4. An expert's weight is off by about `ε |score| / 2`, a thousandth.
    """

    selection_bias: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("llama", "mistral", "qwen2", "qwen3", "phi3")
    loaded_by: ClassVar[tuple[str, ...]] = ("transformers", "vllm", "sglang", "mlx")
    preference: ClassVar[int | None] = 0
    gguf_architecture: ClassVar[str | None] = "glm4moe"

    def expert_factor(self, config: MoesaicModelConfig) -> int:
        return 2

    def reason_against(self, config: MoesaicModelConfig) -> str:
        return decoder.reason_against(
            self, config,
            (not config.n_shared_experts, "it needs a shared expert; convert with a plan like S1A1E4"),
            (config.num_experts < 2, "it needs two routed experts, the model has one; convert with a plan like S1A1E4"),
        )  # fmt: skip

    def config_json(self, config: MoesaicModelConfig) -> Json:
        return decoder.common_config(config, "glm4_moe", "Glm4MoeForCausalLM") | {
            "head_dim": decoder.head_dim(config),
            "attention_bias": config.dense_model_type == "qwen2",
            "use_qk_norm": config.dense_model_type == "qwen3",
            "n_routed_experts": config.num_experts,
            "n_shared_experts": config.n_shared_experts,
            "moe_intermediate_size": config.moe_intermediate_size,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "num_nextn_predict_layers": 0,
        }

    def layer(self, tensors: Tensors, config: MoesaicModelConfig) -> Tensors:
        stock = decoder.split_attention(tensors, config)
        stock["mlp.gate.weight"] = stock["mlp.gate.weight"].float() * decoder.ROUTER_SCALE
        bias_E = stock["mlp.gate.e_score_correction_bias"].float()
        stock["mlp.gate.e_score_correction_bias"] = bias_E * decoder.ROUTER_SCALE / 4
        gate_up, down = (
            stock.pop("mlp.experts.gate_up_proj"),
            stock.pop("mlp.experts.down_proj") * self.expert_factor(config),
        )
        return stock | decoder.split_experts(gate_up, down, EXPERTS, PARTS)

    def moesaic_layer(self, tensors: Tensors, config: MoesaicModelConfig) -> Tensors:
        layer = decoder.join_attention(tensors, config)
        dtype = layer[f"{ATTENTION}.o_proj.weight"].dtype
        for name, factor in (("weight", 1), ("e_score_correction_bias", 4)):
            layer[f"mlp.gate.{name}"] = (layer[f"mlp.gate.{name}"] / decoder.ROUTER_SCALE * factor).to(dtype)
        gate_up, down = decoder.join_experts(layer, EXPERTS, PARTS)
        return layer | {"mlp.experts.gate_up_proj": gate_up, "mlp.experts.down_proj": down / self.expert_factor(config)}

    def gguf_layer(self, native: Tensors, config: MoesaicModelConfig) -> Tensors:
        gate_up, down = decoder.join_experts(native, EXPERTS, PARTS)
        shared = {n: native.pop(f"mlp.shared_experts.{n}_proj.weight") for n in ("gate", "up", "down")}
        return {
            "post_attention_norm.weight": native.pop("post_attention_layernorm.weight"),
            "ffn_gate_inp.weight": native.pop("mlp.gate.weight"),
            "exp_probs_b.bias": native.pop("mlp.gate.e_score_correction_bias"),
        } | decoder.gguf_experts(gate_up, down, shared)

    def native_layer(self, theirs: Tensors) -> Tensors:
        routed, shared = (decoder.native_experts(theirs, kind) for kind in ("exps", "shexp"))
        return {
            "post_attention_layernorm.weight": theirs.pop("post_attention_norm.weight"),
            "mlp.gate.weight": theirs.pop("ffn_gate_inp.weight"),
            "mlp.gate.e_score_correction_bias": theirs.pop("exp_probs_b.bias"),
            **{f"mlp.shared_experts.{n}_proj.weight": tensor for n, tensor in shared._asdict().items()},
        } | decoder.split_experts(routed.gate_up, routed.down, EXPERTS, PARTS)

    def gguf_keys(self, writer: GGUFWriter, config: Json) -> None:
        from gguf import ExpertGatingFuncType

        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
        writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
