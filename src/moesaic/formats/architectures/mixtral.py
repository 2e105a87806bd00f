"""`MixtralForCausalLM`: the oldest Mixture-of-Experts architecture, which every engine has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..base import Format, Tensors
from . import _decoder as decoder

MOE = "block_sparse_moe."
EXPERTS = MOE + "experts."
PARTS = ("w1", "w3", "w2")


@dataclass(frozen=True, kw_only=True)
class Mixtral(Format):
    """Chosen experts with weight 1 from renormalised gates, exactly so for one active expert (plan `S0A1E4`; ε = 1).

    `gate x ε`, experts' `w2 x K`. It has no shared expert, so each expert holds a copy of it.
    """

    sources: ClassVar[tuple[str, ...]] = ("llama", "mistral", "phi3")
    loaded_by: ClassVar[tuple[str, ...]] = ("transformers", "vllm", "sglang", "mlx")
    copies_shared: ClassVar[bool] = True

    def engines(self, working: Any) -> list[str]:
        unlike, _ = decoder.unlike_heads(working)  # MLX takes the size of a head from the hidden size
        return [engine for engine in super().engines(working) if engine != "mlx" or not unlike]

    def config(self, working: Any) -> dict[str, Any]:
        decoder.check(
            self, working,
            decoder.not_power(working.num_experts_per_tok, "active experts"),
            decoder.too_small(working, decoder.renormalised_scale(working)),
        )  # fmt: skip
        return decoder.common_config(working, "mixtral", "MixtralForCausalLM") | {
            "head_dim": decoder.head_dim(working),
            "num_local_experts": working.num_experts,
            "intermediate_size": working.moe_intermediate_size + working.shared_expert_intermediate_size,
            "sliding_window": None,
        }

    def layer(self, tensors: Tensors, working: Any) -> Tensors:
        native = decoder.split_attention(tensors, working)
        del native["mlp.gate.e_score_correction_bias"]
        native[MOE + "gate.weight"] = native.pop("mlp.gate.weight") * decoder.renormalised_scale(working)
        gate_up, down = decoder.replicate_shared(native, working.num_experts_per_tok)
        return native | decoder.split_experts(gate_up, down, EXPERTS, PARTS)

    def moesaic_layer(self, tensors: Tensors, working: Any) -> Tensors:
        layer = decoder.join_attention(tensors, working)
        layer["mlp.gate.weight"] = layer.pop(MOE + "gate.weight") / decoder.renormalised_scale(working)
        layer["mlp.gate.e_score_correction_bias"] = layer["mlp.gate.weight"].new_zeros(working.num_experts)
        gate_up, down = decoder.join_experts(layer, working.num_experts, EXPERTS, PARTS)
        return layer | decoder.separate_shared(
            gate_up, down, working.moe_intermediate_size, working.num_experts_per_tok
        )
