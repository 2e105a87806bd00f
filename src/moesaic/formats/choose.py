"""Which format a converted model is written in, and which engines load it."""

from __future__ import annotations

from typing import NamedTuple

from transformers import AutoConfig, PreTrainedConfig

from .. import registry
from ..errors import InputError
from ..models.families import takes_pictures
from ..moe.modeling import MODEL_TYPE
from .base import Format, MoesaicModelConfig, all_formats, block_config


class ChosenFormat(NamedTuple):
    """How a model is written, and why not as a stock architecture (nothing if it is)."""

    format: Format
    reason: str


def choose_format(
    wish: object, config: MoesaicModelConfig, has_bias: bool, whole: PreTrainedConfig | None = None
) -> ChosenFormat:
    """Choose the format to write a model in.

    Args:
        wish: a format or its name, or `auto` for the first stock architecture that holds the model, else moesaic's own.
        config: the model's; of a vision-language model, of its language tower.
        has_bias: whether routers add a constant to each expert's score.
        whole: the configuration of a whole vision-language model.

    Raises:
        InputError: a format that is unknown or cannot hold the model.
    """
    if wish == "gguf":
        raise InputError("GGUF is made of a converted model: moesaic export OUT OUT.gguf --format gguf")
    if wish != "auto":
        format: Format = registry.build("format", wish)
        if whole is not None and (reason := tower_reason(format, whole)):
            raise InputError(f"this model cannot be written as {format.name}: {reason}; use --format moesaic")
        format.check(config, has_bias)
        return ChosenFormat(format, "")
    reasons = []
    for format in all_formats():
        if format.preference is None or config.dense_model_type not in format.sources:
            continue
        copies = format.copies_shared and config.n_shared_experts and config.num_experts_per_tok > 1
        several = "each of several active experts would run a copy of the shared one" if copies else ""
        tower = "" if whole is None else tower_reason(format, whole)
        reason = tower or several or format.reason(config, has_bias) or format.width_reason(config)
        if not reason:
            return ChosenFormat(format, "")
        reasons.append(f"not {format.name}: {reason}")
    reasons.append(f"no stock Mixture-of-Experts has {config.dense_model_type}'s layers")
    return ChosenFormat(registry.build("format", MODEL_TYPE), reasons[0])


def tower_reason(format: Format, whole: PreTrainedConfig) -> str:
    """Say why a vision-language model cannot have its language tower in a stock architecture; nothing if it can.

    Families that make their tower of whatever `text_config` says can; others have a class of their own.
    """
    if format.name == MODEL_TYPE or not takes_pictures(whole) or format.whole_model_type:
        return ""
    if whole.sub_configs["text_config"] is not AutoConfig:
        return f"{whole.dense_model_type} models have a language tower of their own class"  # pyrefly: ignore[missing-attribute]
    return ""


def engines_of(format: Format, whole: PreTrainedConfig) -> list[str]:
    """List the engines that load a model written in a format; of vision-language models only what was seen to."""
    text = block_config(whole)
    found = format.engines(text)
    return found if text is whole else [engine for engine in found if engine == "transformers"]
