"""`GraniteMoeSharedForCausalLM`: for Granite, and for Llama 3's rope in llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..base import Format, Tensors
from . import _decoder as decoder

MULTIPLIERS = ("embedding_multiplier", "logits_scaling", "residual_multiplier")


@dataclass(frozen=True, kw_only=True)
class GraniteMoeShared(Format):
    """Chosen experts with weight 1 from the softmax over the K chosen: `K softmax(ε z) -> 1`; 1 for K = 1 (ε = 1).

    `router x ε`, experts' `output_linear x K`; the shared expert has no gate.
    """

    sources: ClassVar[tuple[str, ...]] = ("llama", "mistral", "granite")
    loaded_by: ClassVar[tuple[str, ...]] = ("transformers", "vllm", "sglang")

    def config(self, working: Any) -> dict[str, Any]:
        decoder.check(
            self, working, decoder.unlike_heads(working),
            (not working.n_shared_experts, "it needs a shared expert; convert with a plan like S1A1E4"),
            decoder.not_power(working.num_experts_per_tok, "active experts"),
            decoder.too_small(working, decoder.renormalised_scale(working)),
        )  # fmt: skip
        granite = working.dense_model_type == "granite"
        return decoder.common_config(working, "granitemoeshared", "GraniteMoeSharedForCausalLM") | {
            "num_local_experts": working.num_experts,
            "intermediate_size": working.moe_intermediate_size,
            "shared_intermediate_size": working.shared_expert_intermediate_size,
            "attention_bias": False,
            "attention_multiplier": working.attention_multiplier if granite else decoder.head_dim(working) ** -0.5,
            **{name: getattr(working, name) if granite else 1.0 for name in MULTIPLIERS},
        }

    def layer(self, tensors: Tensors, working: Any) -> Tensors:
        native = dict(tensors)
        del native["mlp.gate.e_score_correction_bias"]
        moe, shared = "block_sparse_moe.", "mlp.shared_experts."
        native[moe + "router.layer.weight"] = native.pop("mlp.gate.weight") * decoder.renormalised_scale(working)
        native[moe + "input_linear.weight"] = native.pop("mlp.experts.gate_up_proj")
        native[moe + "output_linear.weight"] = native.pop("mlp.experts.down_proj") * working.num_experts_per_tok
        parts = [native.pop(f"{shared}{name}_proj.weight") for name in ("gate", "up")]
        native["shared_mlp.input_linear.weight"] = torch.cat(parts)
        native["shared_mlp.output_linear.weight"] = native.pop(f"{shared}down_proj.weight")
        return native

    def moesaic_layer(self, tensors: Tensors, working: Any) -> Tensors:
        layer = dict(tensors)
        moe, shared = "block_sparse_moe.", "mlp.shared_experts."
        gate_ED = layer.pop(moe + "router.layer.weight") / decoder.renormalised_scale(working)
        gate, up = layer.pop("shared_mlp.input_linear.weight").chunk(2)
        return layer | {
            "mlp.gate.weight": gate_ED,
            "mlp.gate.e_score_correction_bias": gate_ED.new_zeros(len(gate_ED)),
            "mlp.experts.gate_up_proj": layer.pop(moe + "input_linear.weight"),
            "mlp.experts.down_proj": layer.pop(moe + "output_linear.weight") / working.num_experts_per_tok,
            f"{shared}gate_proj.weight": gate.clone(),
            f"{shared}up_proj.weight": up.clone(),
            f"{shared}down_proj.weight": layer.pop("shared_mlp.output_linear.weight"),
        }
