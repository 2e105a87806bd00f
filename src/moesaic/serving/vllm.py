"""vLLM plug-in: what stock architectures cannot say runs in vLLM through its Transformers backend.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes. Routing is ours,
whatever the gate; the experts' products are vLLM's. Models in a stock architecture need no plug-in.
"""

from __future__ import annotations

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

BACKEND = "vllm.model_executor.models.transformers:"
NOT_SILU = ("Gemma",)
"""Families whose experts are not SwiGLU, which vLLM's fused experts are: ours run instead."""


def register() -> None:
    """Tell vLLM which of its classes runs `Moesaic...ForCausalLM`; calling it again changes nothing."""
    from vllm import ModelRegistry  # pyrefly: ignore[missing-import]

    import moesaic  # noqa: F401  registers the configurations with transformers

    known = ModelRegistry.get_supported_archs()
    for name in dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        if f"Moesaic{name}" not in known:
            plain = any(family in name for family in NOT_SILU)
            backend = BACKEND + ("TransformersForCausalLM" if plain else "TransformersMoEForCausalLM")
            ModelRegistry.register_model(f"Moesaic{name}", backend)
