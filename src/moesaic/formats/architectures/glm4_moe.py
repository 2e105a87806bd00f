"""`Glm4MoeForCausalLM`: stock transformers, vLLM, SGLang, llama.cpp and MLX have it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..base import Format, Tensors
from . import _decoder as decoder

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

    def config(self, working: Any) -> dict[str, Any]:
        decoder.check(
            self, working,
            (not working.n_shared_experts, "it needs a shared expert; convert with a plan like S1A1E4"),
        )  # fmt: skip
        return decoder.common_config(working, "glm4_moe", "Glm4MoeForCausalLM") | {
            "head_dim": decoder.head_dim(working),
            "attention_bias": working.dense_model_type == "qwen2",
            "use_qk_norm": working.dense_model_type == "qwen3",
            "n_routed_experts": working.num_experts,
            "n_shared_experts": working.n_shared_experts,
            "moe_intermediate_size": working.moe_intermediate_size,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "num_nextn_predict_layers": 0,
        }

    def layer(self, tensors: Tensors, working: Any) -> Tensors:
        native = decoder.split_attention(tensors, working)
        native["mlp.gate.weight"] = native["mlp.gate.weight"].float() * decoder.ROUTER_SCALE
        bias_E = native["mlp.gate.e_score_correction_bias"].float()
        native["mlp.gate.e_score_correction_bias"] = bias_E * decoder.ROUTER_SCALE / 4
        gate_up, down = native.pop("mlp.experts.gate_up_proj"), native.pop("mlp.experts.down_proj") * 2
        return native | decoder.split_experts(gate_up, down, EXPERTS, PARTS)

    def moesaic_layer(self, tensors: Tensors, working: Any) -> Tensors:
        layer = decoder.join_attention(tensors, working)
        dtype = layer["self_attn.o_proj.weight"].dtype
        for name, factor in (("weight", 1), ("e_score_correction_bias", 4)):
            layer[f"mlp.gate.{name}"] = (layer[f"mlp.gate.{name}"] / decoder.ROUTER_SCALE * factor).to(dtype)
        gate_up, down = decoder.join_experts(layer, working.num_experts, EXPERTS, PARTS)
        return layer | {"mlp.experts.gate_up_proj": gate_up, "mlp.experts.down_proj": down / 2}
