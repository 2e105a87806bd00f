"""A dense model as GGUF, so that llama.cpp can run it beside what it was converted to, in the same type."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from transformers import PretrainedConfig

from ...checkpoint.reader import Checkpoint
from ...errors import InputError
from ...models.families import ATTENTION, HEAD, LAYERS
from ...models.integrity import read_config
from ...models.tokenizer import load_tokenizer
from ..gguf_names import OUTSIDE_NAMES, RENAMED, ROPE_FACTORS, interleaved
from ..gguf_support import K_QUANTS, find_quantiser
from .config import write_sizes
from .tensors import OUTTYPES, announce, encoded, kind_of, rope_factors
from .vocabulary import write_vocabulary
from .writer import quantise

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
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    config.rope_parameters = {"partial_rotary_factor": 1.0} | config.rope_parameters
    left_out = {HEAD} if config.tie_word_embeddings else set()
    theirs = {name: llama_cpp_name(name) for name in checkpoint.names() if name not in left_out}
    factors = rope_factors(config, head_size)
    shapes = {called: torch.Size(checkpoint.headers[name].shape) for name, called in theirs.items()}
    shapes |= {} if factors is None else {ROPE_FACTORS: factors.shape}
    kinds = {name: kind_of(name, shape, OUTTYPES[outtype]) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
    write_sizes(writer, config.to_dict(), head_size, outtype)
    write_vocabulary(writer, folder, load_tokenizer(folder), config.vocab_size)
    announce(writer, shapes, kinds)
    heads = {f"{ATTENTION}.{n}_proj.weight": count for n, count in _heads(config).items()}
    for name, called in theirs.items():
        tensor = checkpoint.read(name)
        if count := heads.get(name.removeprefix(LAYERS).partition(".")[2]):
            tensor = interleaved(tensor, count)
        writer.write_tensor_data(encoded(called, tensor, kinds[called]))
    if factors is not None:
        writer.write_tensor_data(encoded(ROPE_FACTORS, factors, kinds[ROPE_FACTORS]))
    writer.close()


def llama_cpp_name(name: str) -> str:
    """Translate a dense model's name of a tensor to llama.cpp's.

    Raises:
        InputError: this writer does not know it, so the file would lack it.
    """
    if name.startswith(LAYERS):
        index, _, inner = name.removeprefix(LAYERS).partition(".")
        return f"blk.{index}.{known(NAMES, inner, name)}"
    return known(OUTSIDE_NAMES, name, name)


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
