"""The keys and values of a GGUF file that llama.cpp builds its graph from."""

from __future__ import annotations

import json
from pathlib import Path

import gguf

from ...checkpoint.facts import saved_settings
from ...checkpoint.gguf_converted import CONFIG, FILES, KEPT_FILES
from ...checkpoint.writer import CONFIG_FILE
from ...results import Json
from ..architectures._decoder import head_dim
from ..base import Format
from ..converted import Converted
from ..fields import stock_config


def write_config(writer: gguf.GGUFWriter, format: Format, source: Converted, outtype: str) -> None:
    """Write all keys but those of the tokenizer; the name says of which model it is."""
    config = format.config_json(source.config)
    writer.add_name(name_of(source.checkpoint.folder))
    write_sizes(writer, config, head_dim(source.config), outtype)
    writer.add_expert_count(source.config.num_experts)
    writer.add_expert_used_count(source.config.num_experts_per_tok)
    format.gguf_keys(writer, config)


def write_sizes(writer: gguf.GGUFWriter, config: Json, head_size: int, outtype: str) -> None:
    """Write the keys that dense models and Mixtures of Experts share, from the fields of a `config.json`."""
    name = "ALL_F32" if outtype == "f32" else f"MOSTLY_{outtype.upper()}"
    writer.add_file_type(gguf.LlamaFileType[name])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    write_rope(writer, config, head_size)


def name_of(folder: Path) -> str:
    """Name a converted model after its dense model and plan; one that transformers saved again after its folder."""
    if not (folder / CONFIG_FILE).is_file():
        return folder.name
    settings = saved_settings(folder)
    return f"{settings['model'].rstrip('/')} {settings['plan']}"


def write_rope(writer: gguf.GGUFWriter, config: Json, size: int) -> None:
    """Write rotary positions; Llama 3's scaling is a tensor."""
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


def write_kept(writer: gguf.GGUFWriter, format: Format, source: Converted) -> None:
    """Write what llama.cpp has no use for, and `moesaic.load` reads the file back by.

    The stock architecture's `config.json`, the tokenizer as tokenizers has it, and what the conversion was and gave.
    """
    folder = source.checkpoint.folder
    writer.add_string(CONFIG, json.dumps(stock_config(format, source.whole)))
    tokenizer = folder / "tokenizer.json"
    if tokenizer.is_file():  # where it is missing, the vocabulary says so
        writer.add_string(gguf.Keys.Tokenizer.HF_JSON, tokenizer.read_text("utf-8"))
    for name in KEPT_FILES:
        if (folder / name).is_file():
            writer.add_string(FILES + name, (folder / name).read_text("utf-8"))
