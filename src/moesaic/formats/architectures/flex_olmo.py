"""`FlexOlmoForCausalLM`: for OLMo-2, whose norms come after attention and FFN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..base import Format, Tensors
from . import _decoder as decoder

EXPERTS = "mlp.experts."
PARTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class FlexOlmo(Format):
    """Chosen experts with weight 1 from renormalised gates: `K softmax(ε z) -> 1`; exactly 1 for K = 1 (ε = 1 then).

    `gate x ε`, experts' `down_proj x K`. It has no shared expert, so each expert holds a copy of it. Stock transformers
    and vLLM have it.
    """

    sources: ClassVar[tuple[str, ...]] = ("olmo2",)
    loaded_by: ClassVar[tuple[str, ...]] = ("transformers", "vllm")
    copies_shared: ClassVar[bool] = True

    def config(self, working: Any) -> dict[str, Any]:
        decoder.check(
            self, working, decoder.unlike_heads(working),
            decoder.not_power(working.num_experts_per_tok, "active experts"),
            decoder.too_small(working, decoder.renormalised_scale(working)),
        )  # fmt: skip
        return decoder.common_config(working, "flex_olmo", "FlexOlmoForCausalLM") | {
            "num_experts": working.num_experts,
            "intermediate_size": working.moe_intermediate_size + working.shared_expert_intermediate_size,
            "norm_topk_prob": True,
            "attention_bias": False,
        }

    def layer(self, tensors: Tensors, working: Any) -> Tensors:
        native = dict(tensors)
        del native["mlp.gate.e_score_correction_bias"]
        native["mlp.gate.weight"] = native["mlp.gate.weight"] * decoder.renormalised_scale(working)
        gate_up, down = decoder.replicate_shared(native, working.num_experts_per_tok)
        return native | decoder.split_experts(gate_up, down, EXPERTS, PARTS)

    def moesaic_layer(self, tensors: Tensors, working: Any) -> Tensors:
        layer = dict(tensors)
        layer["mlp.gate.weight"] = layer["mlp.gate.weight"] / decoder.renormalised_scale(working)
        layer["mlp.gate.e_score_correction_bias"] = layer["mlp.gate.weight"].new_zeros(working.num_experts)
        gate_up, down = decoder.join_experts(layer, working.num_experts, EXPERTS, PARTS)
        return layer | decoder.separate_shared(
            gate_up, down, working.moe_intermediate_size, working.num_experts_per_tok
        )
