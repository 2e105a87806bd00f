"""The keys and values of a GGUF file that llama.cpp builds its graph from."""

from __future__ import annotations

from typing import Any

import gguf

from ..architectures._decoder import head_dim
from ..converted import Converted


def write_config(writer: gguf.GGUFWriter, config: dict[str, Any], source: Converted, outtype: str) -> None:
    """Everything but the tokenizer; `config` is the native form's."""
    working = source.config
    writer.add_name(source.checkpoint.folder.name)
    name = "ALL_F32" if outtype == "f32" else f"MOSTLY_{outtype.upper()}"
    writer.add_file_type(gguf.LlamaFileType[name])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim(working))
    writer.add_value_length(head_dim(working))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_expert_count(working.num_experts)
    writer.add_expert_used_count(working.num_experts_per_tok)
    write_rope(writer, config, head_dim(working))
    if config["model_type"] == "glm4_moe":
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    elif config["model_type"] == "granitemoeshared":
        writer.add_expert_shared_feed_forward_length(config["shared_intermediate_size"])
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])


def write_rope(writer: gguf.GGUFWriter, config: dict[str, Any], size: int) -> None:
    """Rotary positions; Llama 3's scaling is a tensor."""
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(size * rope["partial_rotary_factor"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
