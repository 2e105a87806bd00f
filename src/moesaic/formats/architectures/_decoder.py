"""What the stock formats share: attention, rope, experts as engines name them, and reasons to refuse.

Shapes: D hidden size, E routed experts, I neurons of one, X = 2 I.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...models.devices import dtype_name
from ...models.families import ATTENTION
from ...results import Json
from ..base import Format, MoesaicModelConfig, Tensors

Reason = tuple[bool, str]
"""Whether a format cannot hold a model, and why."""
ROUTER_SCALE = 2.0**-10
"""Of moesaic's own format's scores, which are about 1: small enough that a softmax or sigmoid of them is flat."""
WHY_NOT = {
    "gemma2": "Gemma has GeGLU and norms after attention and FFN",
    "gemma3_text": "Gemma has GeGLU and norms after attention and FFN",
    "granite": "Granite has four multipliers; write it as granitemoeshared",
    "olmo2": "OLMo-2 has norms after attention and FFN only; write it as flex_olmo",
}
COPIED_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "attention_dropout", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip


def common_config(config: MoesaicModelConfig, model_type: str, architecture: str) -> Json:
    """Write the part of `config.json` that every stock format has, as transformers 5 and as older engines read it."""
    rope = dict(config.rope_parameters)
    rope.setdefault("partial_rotary_factor", 1.0)
    dtype = dtype_name(config.dtype)
    return {name: getattr(config, name, None) for name in COPIED_FIELDS} | {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "num_experts_per_tok": config.num_experts_per_tok,
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "rope_parameters": rope,
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def reason_against(format: Format, config: MoesaicModelConfig, *reasons: Reason) -> str:
    """Say why a format cannot hold a model: what no stock one can, or the first of its own `reasons` that holds."""
    family, biased = config.dense_model_type, getattr(config, "attention_bias", False)
    length, window = config.max_position_embeddings, getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
        family != "qwen2" and window is not None and window < length
    )
    act = getattr(config, "hidden_act", None)
    other = f"its attention was made for {', '.join(format.sources)}, not for {family}"
    common = (
        (family not in format.sources, WHY_NOT.get(family, other)),
        (act != "silu", f"its experts have SiLU, the model has {act}"),
        (slides, f"it has no sliding window, the model attends to {window} tokens only"),
        (family != "qwen2" and biased, "it has no bias in o_proj, the model does"),
        (
            format.name != "glm4_moe" and config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0,
            "it turns whole heads, the model parts of them",
        ),
        (config.rope_parameters.get("rope_type") == "longrope", "engines read longrope for other architectures only"),
        (config.router not in format.routers, f"its router is linear, the model's is {config.router}"),
        (
            config.selection != "top-k",
            f"it runs a fixed number of experts, the model's selection is {config.selection}",
        ),
        (
            not config.num_experts,
            "the model has no routed experts; a statically pruned one is no Mixture-of-Experts",
        ),
        (config.shared_expert_bias, "its shared expert has no bias"),
    )
    return next((reason for holds, reason in (*common, *reasons) if holds), "")


def renormalised_scale(config: MoesaicModelConfig) -> float:
    """Choose ε for gates that are divided by their sum: 1 if they are meant so, or weigh one expert by 1 anyway."""
    return 1.0 if config.num_experts_per_tok == 1 or config.router == "softmax" else ROUTER_SCALE


def renormalised_factor(config: MoesaicModelConfig) -> int:
    """Say what undoes gates that sum to 1 where each should be 1: the active experts; 1 if they are meant so."""
    return 1 if config.router == "softmax" else config.num_experts_per_tok


def too_small(config: MoesaicModelConfig, scale: float) -> Reason:
    """Say why formats that hold the scaled gate in the model's dtype cannot hold it."""
    short = scale < 1 and config.dtype == torch.float16
    return short, "float16 cannot hold its gates, which are scaled down; convert with --dtype bfloat16"


def unlike_heads(config: MoesaicModelConfig) -> Reason:
    """Say why formats that take the size of a head from the hidden size cannot hold a model."""
    size = config.hidden_size // config.num_attention_heads
    return head_dim(config) != size, f"its heads are of {size} dimensions, the model's of {head_dim(config)}"


def not_power(number: int, what: str) -> Reason:
    """Say why formats that weigh experts by 1 / number cannot hold a model: only powers of two undo it exactly."""
    return number & (number - 1) != 0, f"its gates undo {number} {what} exactly only if that is a power of two"


def head_dim(config: MoesaicModelConfig) -> int:
    """Find the size of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def split_attention(tensors: Tensors, config: MoesaicModelConfig) -> Tensors:
    """Split a layer's tensors into q, k and v (Phi-3 has them fused)."""
    split = dict(tensors)
    if (fused := split.pop(f"{ATTENTION}.qkv_proj.weight", None)) is not None:
        queries, keys = (n * head_dim(config) for n in (config.num_attention_heads, config.num_key_value_heads))
        parts = fused.split([queries, keys, keys])
        split |= {f"{ATTENTION}.{n}_proj.weight": part for n, part in zip("qkv", parts, strict=True)}
    return split


def join_attention(tensors: Tensors, config: MoesaicModelConfig) -> Tensors:
    """Join q, k and v: the inverse of `split_attention`."""
    joined = dict(tensors)
    if config.dense_model_type == "phi3":
        parts = [joined.pop(f"{ATTENTION}.{n}_proj.weight") for n in "qkv"]
        joined[f"{ATTENTION}.qkv_proj.weight"] = torch.cat(parts)
    return joined


def split_experts(gate_up_EXD: Tensor, down_EDI: Tensor, prefix: str, names: Sequence[str]) -> Tensors:
    """Give each expert's gate, up and down projection its own name."""
    split = {}
    for expert, (gate_up_XD, down_DI) in enumerate(zip(gate_up_EXD, down_EDI, strict=True)):
        parts = (*gate_up_XD.chunk(2), down_DI)
        split |= {f"{prefix}{expert}.{name}.weight": part for name, part in zip(names, parts, strict=True)}
    return split


def join_experts(layer: Tensors, prefix: str, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Join the projections of all experts that `layer` has, and take them out: the inverse of `split_experts`."""
    experts = range(sum(f"{prefix}{e}.{names[0]}.weight" in layer for e in range(len(layer))))
    gates, ups, downs = ([layer.pop(f"{prefix}{e}.{name}.weight") for e in experts] for name in names)
    rows = torch.cat([part for pair in zip(gates, ups, strict=True) for part in pair])
    return rows.view(len(gates), -1, rows.shape[1]), torch.stack(downs)


def replicate_shared(layer: Tensors, active: int) -> tuple[Tensor, Tensor]:
    """Copy the shared expert into each routed one, for gates of 1 / active; takes the parts out of `layer`.

    `sum_k (1 / K) (K routed_k(x) + shared(x)) = sum_k routed_k(x) + shared(x)`.

    Returns:
        gate_up [E, 2 (I + S), D] and down [E, D, I + S], S the shared expert's neurons.
    """
    gate_up_EXD, down_EDI = layer.pop("mlp.experts.gate_up_proj"), layer.pop("mlp.experts.down_proj") * active
    if "mlp.shared_experts.down_proj.weight" not in layer:
        return gate_up_EXD, down_EDI
    gate_ID, up_ID, down_DI = (layer.pop(f"mlp.shared_experts.{n}_proj.weight") for n in ("gate", "up", "down"))

    def every(weight: Tensor) -> Tensor:
        return weight.expand(len(gate_up_EXD), -1, -1)

    gate_EID, up_EID = gate_up_EXD.chunk(2, dim=1)
    return torch.cat([gate_EID, every(gate_ID), up_EID, every(up_ID)], 1), torch.cat([down_EDI, every(down_DI)], 2)


def separate_shared(gate_up_EXD: Tensor, down_EDI: Tensor, width: int, active: int) -> Tensors:
    """Take the copies of the shared expert out again: the inverse of `replicate_shared`.

    `width` neurons are the routed expert's own.
    """
    gate_EID, up_EID = gate_up_EXD.chunk(2, dim=1)
    layer = {
        "mlp.experts.gate_up_proj": torch.cat([gate_EID[:, :width], up_EID[:, :width]], 1),
        "mlp.experts.down_proj": down_EDI[:, :, :width] / active,
    }
    shared = {"gate": gate_EID[0, width:], "up": up_EID[0, width:], "down": down_EDI[0, :, width:]}
    if down_EDI.shape[2] > width:
        layer |= {f"mlp.shared_experts.{name}_proj.weight": weight for name, weight in shared.items()}
    return layer


def gguf_experts(gate_up_EXD: Tensor, down_EDI: Tensor, shared: Tensors) -> Tensors:
    """Name routed experts and the shared one's `gate`, `up` and `down` as llama.cpp does."""
    gate_EID, up_EID = gate_up_EXD.chunk(2, dim=1)
    routed = {"ffn_gate_exps.weight": gate_EID, "ffn_up_exps.weight": up_EID, "ffn_down_exps.weight": down_EDI}
    return routed | {f"ffn_{name}_shexp.weight": weight for name, weight in shared.items()}


class GGUFExperts(NamedTuple):
    """Experts as llama.cpp has them: all routed ones, or the shared one."""

    gate: Tensor
    up: Tensor
    down: Tensor

    @property
    def gate_up(self) -> Tensor:
        """`gate` above `up`, as transformers has them."""
        return torch.cat([self.gate, self.up], -2)


def native_experts(theirs: Tensors, kind: str) -> GGUFExperts:
    """Take experts out of a layer of a GGUF: the inverse of `gguf_experts`; `exps` or `shexp`."""
    return GGUFExperts(*(theirs.pop(f"ffn_{name}_{kind}.weight") for name in GGUFExperts._fields))
