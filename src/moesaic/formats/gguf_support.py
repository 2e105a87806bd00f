"""Which models llama.cpp runs as transformers does, told without the package that writes GGUF."""

from __future__ import annotations

from .. import registry
from ..errors import InputError
from .base import Format, MoesaicModelConfig

K_BLOCK = 256
"""Weights in a block of K-quants; an expert's width must be a multiple of it."""
ROPES = ("default", "llama3", "linear", "yarn")
KEYS = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor",
    "low_freq_factor", "high_freq_factor",
}  # fmt: skip
"""Of a rope's parameters those that are written; llama.cpp has the others' defaults."""


def gguf_format(config: MoesaicModelConfig, has_bias: bool) -> Format:
    """Choose the stock architecture that llama.cpp runs as transformers does.

    Raises:
        InputError: there is none.
    """
    rope = config.rope_parameters.get("rope_type")
    formats: list[Format] = [registry.build("format", name) for name in registry.names("format")]
    # llama.cpp reads Llama 3's rope factors for those that turn neighbours only, and others silently wrong
    able = [f for f in formats if f.gguf_architecture and (f.gguf_interleaved or rope != "llama3")]
    reasons = []
    for format in sorted(able, key=lambda f: f.preference or 0):
        if reason := format.reason(config, has_bias):
            reasons.append(f"As {format.name}: {reason}")
            continue
        if rope not in ROPES:
            raise InputError(f"rope type '{rope}' is not written to GGUF; {', '.join(ROPES)} are")
        if others := [key for key, value in config.rope_parameters.items() if value is not None and key not in KEYS]:
            raise InputError(f"llama.cpp has no place for what {', '.join(others)} do to the model's rope")
        return format
    raise InputError("this model cannot be written as GGUF. " + "; ".join(reasons))
