"""A dense model as GGUF, so that llama.cpp can run it beside what it was converted to, in the same type."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ...checkpoint.reader import Checkpoint
from ...errors import InputError
from ...models.families import ATTENTION, HEAD, LAYERS
from ...models.integrity import read_config
from ...models.tokenizer import load_tokenizer
from ..gguf_names import OUTSIDE_NAMES, RENAMED, interleaved
from ..gguf_support import K_QUANTS, find_quantiser
from .config import write_rope
from .vocabulary import write_vocabulary
from .writer import OUTTYPES, kind_of, quantise

ARCHITECTURES = {"qwen2": "qwen2", "qwen3": "qwen3", "llama": "llama", "mistral": "llama"}
"""llama.cpp's name of a family."""
FFN = {f"mlp.{n}_proj.weight": f"ffn_{n}.weight" for n in ("gate", "up", "down")}
NAMES = RENAMED | FFN | {"post_attention_layernorm.weight": "ffn_norm.weight"}


def write_dense_gguf(folder: Path, path: Path, outtype: str) -> None:
    """Write the dense model in `folder` to `path`, its matrices in `outtype`.

    K-quants are made of f16 by `llama-quantize`.

    Raises:
        InputError: a family that this writer does not know, or a K-quant without `llama-quantize`.
        WorkError: `llama-quantize` failed.
    """
    quantiser = find_quantiser(outtype) if outtype in K_QUANTS else None
    _write(folder, path, "f16" if quantiser else outtype)
    if quantiser:
        quantise(quantiser, path, outtype)


def _write(folder: Path, path: Path, outtype: str) -> None:
    config, checkpoint = read_config(folder), Checkpoint(folder)
    if config.model_type not in ARCHITECTURES:
        families = ", ".join(ARCHITECTURES)
        raise InputError(f"the dense model is {config.model_type}; only {families} are written as dense GGUF")
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
    _write_config(writer, config, outtype)
    write_vocabulary(writer, folder, load_tokenizer(folder), config.vocab_size)
    turned = {f"{ATTENTION}.{n}_proj.weight": heads for n, heads in _heads(config).items()}
    for name in checkpoint.names():
        if name == HEAD and config.tie_word_embeddings:
            continue
        tensor = checkpoint.read(name)
        if name.startswith(LAYERS):
            index, _, inner = name.removeprefix(LAYERS).partition(".")
            theirs = f"blk.{index}.{known(NAMES, inner, name)}"
            if inner in turned:
                tensor = interleaved(tensor, turned[inner])
        else:
            theirs = known(OUTSIDE_NAMES, name, name)
        kind = kind_of(theirs, tensor.shape, OUTTYPES[outtype])
        writer.add_tensor(
            theirs, gguf.quants.quantize(tensor.float().contiguous().numpy(), kind), raw_dtype=kind
        )  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def known(names: dict[str, str], ours: str, tensor: str) -> str:
    """Translate a tensor's name to llama.cpp's.

    Raises:
        InputError: this writer does not know it, so the file would lack it.
    """
    if ours not in names:
        raise InputError(f"the dense model has '{tensor}', which this GGUF writer does not know")
    return names[ours]


def _heads(config: PretrainedConfig) -> dict[str, int]:
    """Count heads of queries and keys whose rows llama.cpp wants in its own rope's order; empty where it is ours."""
    if ARCHITECTURES[config.model_type] != "llama":
        return {}
    return {"q": config.num_attention_heads, "k": config.num_key_value_heads}


def _write_config(writer: gguf.GGUFWriter, config: PretrainedConfig, outtype: str) -> None:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = {"partial_rotary_factor": 1.0} | config.rope_parameters
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if outtype == "f32" else f"MOSTLY_{outtype.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    write_rope(writer, {"rope_parameters": rope}, size)
    if rope["rope_type"] == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        factors = rope["rope_theta"] ** -(torch.arange(0, size, 2) / size) / scaled
        writer.add_tensor("rope_freqs.weight", factors.float().numpy())
