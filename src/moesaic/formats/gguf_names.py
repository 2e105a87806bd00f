"""llama.cpp's names of what every decoder has, told without the package that writes GGUF."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import Tensor

from ..models.families import ATTENTION, EMBEDDINGS, FINAL_NORM, HEAD, LAYERS

RENAMED = {
    "input_layernorm.weight": "attn_norm.weight",
    f"{ATTENTION}.o_proj.weight": "attn_output.weight",
    f"{ATTENTION}.q_norm.weight": "attn_q_norm.weight",
    f"{ATTENTION}.k_norm.weight": "attn_k_norm.weight",
    **{f"{ATTENTION}.{n}_proj.{kind}": f"attn_{n}.{kind}" for n in "qkv" for kind in ("weight", "bias")},
}
"""In a layer."""
OUTSIDE_NAMES = {
    EMBEDDINGS: "token_embd.weight",
    FINAL_NORM: "output_norm.weight",
    HEAD: "output.weight",
}
"""Outside the layers."""
ROPE_FACTORS = "rope_freqs.weight"
"""Made of the configuration, not a weight."""
BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Reorder rows for the rope that turns neighbours, from that of one that turns halves."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def halved(weight: Tensor, heads: int) -> Tensor:
    """Reorder rows for the rope that turns halves: the inverse of `interleaved`."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


class BlockName(NamedTuple):
    """The name of a layer's tensor in a GGUF."""

    prefix: str
    """How the stock architecture begins it."""
    name: str
    """In the layer."""


def block_of(name: str) -> BlockName:
    """Split the name of a layer's tensor."""
    match = BLOCK.fullmatch(name)
    if not match:
        raise ValueError(f"'{name}' is no layer's tensor")
    return BlockName(f"{LAYERS}{match[1]}.", match[2])
