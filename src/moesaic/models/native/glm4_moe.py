"""`Glm4MoeForCausalLM`: stock transformers, vLLM, SGLang, llama.cpp and MLX have it.

Shapes: D hidden size, E routed experts, I neurons of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...errors import InputError
from .base import NativeForm, Tensors

ROUTER_SCALE = 2.0**-10
"""Of the working form's scores, which are about 1: small enough that a sigmoid is 1/2 + z/4."""
WHY_NOT = {
    "gemma2": "Gemma has GeGLU and norms after attention and FFN",
    "gemma3_text": "Gemma has GeGLU and norms after attention and FFN",
    "granite": "Granite has four multipliers",
    "olmo2": "OLMo-2 has norms after attention and FFN only",
}
SOURCES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "attention_dropout", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Glm4Moe(NativeForm):
    """Chosen experts with weight 1 from the sigmoid router: `2 sigmoid(z) -> 1` as `z -> 0`.

    With ε = `ROUTER_SCALE`: `gate x ε`, `e_score_correction_bias x ε / 4`, experts' `down_proj x 2`; `norm_topk_prob`
    false and `routed_scaling_factor` 1. The order of the experts is that of the unscaled scores, since sigmoid'(0) =
    1/4. An expert's weight is off by about `ε |score| / 2`, a thousandth.
    """

    def config(self, working: Any) -> dict[str, Any]:
        check(working)
        rope = dict(working.rope_parameters)
        rope.setdefault("partial_rotary_factor", 1.0)
        default = rope["rope_type"] == "default"
        dtype = str(working.dtype).removeprefix("torch.")
        return {name: getattr(working, name, None) for name in SAME} | {
            "architectures": ["Glm4MoeForCausalLM"],
            "model_type": "glm4_moe",
            "hidden_act": "silu",
            "head_dim": head_dim(working),
            "attention_bias": working.dense_model_type == "qwen2",
            "use_qk_norm": working.dense_model_type == "qwen3",
            "n_routed_experts": working.num_experts,
            "n_shared_experts": working.n_shared_experts,
            "num_experts_per_tok": working.num_experts_per_tok,
            "moe_intermediate_size": working.moe_intermediate_size,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "num_nextn_predict_layers": 0,
            "rope_theta": rope["rope_theta"],
            "partial_rotary_factor": rope["partial_rotary_factor"],
            "rope_scaling": None if default else rope,
            "rope_parameters": rope,
            "tie_word_embeddings": False,
            "use_cache": True,
            "dtype": dtype,
            "torch_dtype": dtype,
        }

    def layer(self, tensors: Tensors, working: Any) -> Tensors:
        native = split_attention(tensors, working)
        gate_ED, bias_E = native.pop("mlp.gate.weight"), native.pop("mlp.gate.e_score_correction_bias")
        native["mlp.gate.weight"] = gate_ED.float() * ROUTER_SCALE
        native["mlp.gate.e_score_correction_bias"] = bias_E.float() * ROUTER_SCALE / 4
        gate_up, down = native.pop("mlp.experts.gate_up_proj"), native.pop("mlp.experts.down_proj")
        for expert, (gate_up_XD, down_DI) in enumerate(zip(gate_up, down, strict=True)):
            name = f"mlp.experts.{expert}."
            native[name + "gate_proj.weight"], native[name + "up_proj.weight"] = gate_up_XD.chunk(2)
            native[name + "down_proj.weight"] = down_DI * 2
        return native

    def working_layer(self, tensors: Tensors, working: Any) -> Tensors:
        layer = join_attention(tensors, working)
        dtype = layer["mlp.shared_experts.down_proj.weight"].dtype
        for name, factor in (("weight", 1), ("e_score_correction_bias", 4)):
            layer[f"mlp.gate.{name}"] = (layer[f"mlp.gate.{name}"] / ROUTER_SCALE * factor).to(dtype)
        gates, ups, downs = (
            [layer.pop(f"mlp.experts.{e}.{part}_proj.weight") for e in range(working.num_experts)]
            for part in ("gate", "up", "down")
        )
        layer["mlp.experts.gate_up_proj"] = torch.stack(
            [torch.cat([gate, up]) for gate, up in zip(gates, ups, strict=True)]
        )
        layer["mlp.experts.down_proj"] = torch.stack(downs) / 2
        return layer


def check(working: Any) -> None:
    """Raises InputError, with the reason, for what this architecture cannot say."""
    family, reason = working.dense_model_type, None
    length, window = working.max_position_embeddings, getattr(working, "sliding_window", None)
    if family not in SOURCES:
        reason = WHY_NOT.get(family, f"its attention was made for {', '.join(SOURCES)}, not for {family}")
    elif working.hidden_act != "silu":
        reason = f"its experts have SiLU, the model has {working.hidden_act}"
    elif "sliding_attention" in (getattr(working, "layer_types", None) or ()) or (
        family != "qwen2" and window is not None and window < length
    ):
        reason = f"it has no sliding window, the model attends to {window} tokens only"
    elif family != "qwen2" and getattr(working, "attention_bias", False):
        reason = "it has no bias in o_proj, the model does"
    elif working.rope_parameters["rope_type"] == "longrope":
        reason = "engines read longrope for other architectures only"
    elif working.router != "linear":
        reason = f"its router is linear, the model's is {working.router}"
    elif not working.num_experts:
        reason = "the model has no routed experts; a statically pruned one is no Mixture-of-Experts"
    elif not working.n_shared_experts or working.shared_expert_bias:
        reason = "it needs a shared expert without bias; convert with a plan like S1A1E4"
    if reason:
        raise InputError(f"this model cannot be written as glm4_moe: {reason}. The working form runs everywhere "
                         "transformers does")  # fmt: skip


def head_dim(working: Any) -> int:
    """Size of one attention head."""
    return getattr(working, "head_dim", None) or working.hidden_size // working.num_attention_heads


def split_attention(tensors: Tensors, working: Any) -> Tensors:
    """The layer's tensors with q, k and v apart (Phi-3 has them fused)."""
    split = dict(tensors)
    if (fused := split.pop("self_attn.qkv_proj.weight", None)) is not None:
        queries, keys = (n * head_dim(working) for n in (working.num_attention_heads, working.num_key_value_heads))
        parts = fused.split([queries, keys, keys])
        split |= {f"self_attn.{n}_proj.weight": part for n, part in zip("qkv", parts, strict=True)}
    return split


def join_attention(tensors: Tensors, working: Any) -> Tensors:
    """The inverse of `split_attention`."""
    joined = dict(tensors)
    if working.dense_model_type == "phi3":
        parts = [joined.pop(f"self_attn.{n}_proj.weight") for n in "qkv"]
        joined["self_attn.qkv_proj.weight"] = torch.cat(parts)
    return joined
