"""Which models llama.cpp runs as transformers does, told without the package that writes GGUF."""

from __future__ import annotations

import shutil

from .. import registry
from ..errors import InputError
from .base import Format, MoesaicModelConfig, all_formats

K_BLOCK = 256
"""Weights in a block of K-quants; an expert's width must be a multiple of it."""
WRITTEN = {
    "f32": 1, "f16": 1, "bf16": 1, "q8_0": 32, "q5_1": 32, "q5_0": 32, "q4_1": 32, "q4_0": 32
}  # fmt: skip
"""Types that moesaic writes, and the weights in a block of each: what a row must be a multiple of."""
K_QUANTS = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m", "q2_k")
"""Made by llama.cpp's own `llama-quantize`."""
ROPES = ("default", "llama3", "linear", "yarn")
KEYS = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor",
    "low_freq_factor", "high_freq_factor",
}  # fmt: skip
"""Of a rope's parameters those that are written; llama.cpp has the others' defaults."""


def block_size(outtype: str) -> int:
    """Find the weights in a block of a type.

    Raises:
        InputError: no such type.
    """
    known = (*WRITTEN, *K_QUANTS)
    if outtype not in known:
        raise InputError(f"unknown outtype '{outtype}'.{registry.nearest(outtype, known)} One of: {', '.join(known)}")
    return WRITTEN.get(outtype, K_BLOCK)


def check_k_quant(outtype: str, expert_width: int, shared_width: int) -> str:
    """Find `llama-quantize`, and check that it can quantise experts of such widths; returns its path.

    Raises:
        InputError: it is not installed, or a width is no multiple of 256, which K-quants' blocks need.
    """
    for what, width in (("experts", expert_width), ("the shared expert", shared_width)):
        if width % K_BLOCK:
            raise InputError(
                f"{outtype} has blocks of {K_BLOCK}, and the width of {what}, {width}, is no multiple of it; take q8_0 "
                f"or another type without k, or convert with a plan that 'moesaic plan' marks for K-quants"
            )
    return find_quantiser(outtype)


def find_quantiser(outtype: str) -> str:
    """Find llama.cpp's `llama-quantize`, which makes K-quants; returns its path.

    Raises:
        InputError: it is not installed.
    """
    found = shutil.which("llama-quantize")
    if not found:
        raise InputError(
            f"{outtype} is made by llama.cpp's llama-quantize, which is not on the PATH; install llama.cpp, or take "
            f"one of {', '.join(WRITTEN)}"
        )
    return found


def gguf_format(config: MoesaicModelConfig, has_bias: bool) -> Format:
    """Choose the stock architecture that llama.cpp runs as transformers does.

    Raises:
        InputError: there is none.
    """
    rope = config.rope_parameters.get("rope_type")
    # llama.cpp reads Llama 3's rope factors for those that turn neighbours only, and others silently wrong
    able = [f for f in all_formats() if f.gguf_architecture and (f.gguf_interleaved or rope != "llama3")]
    reasons = []
    for format in able:
        if reason := format.reason(config, has_bias):
            reasons.append(f"As {format.name}: {reason}")
            continue
        if rope not in ROPES:
            raise InputError(f"rope type '{rope}' is not written to GGUF; {', '.join(ROPES)} are")
        if others := [key for key, value in config.rope_parameters.items() if value is not None and key not in KEYS]:
            raise InputError(f"llama.cpp has no place for what {', '.join(others)} do to the model's rope")
        return format
    raise InputError("this model cannot be written as GGUF. " + "; ".join(reasons))
