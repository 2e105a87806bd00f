"""Shapes near a wanted budget: what each costs, how fast it could be, and which engines run it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..checkpoint.builtin import NAMES
from ..checkpoint.sources import HUB_ID, resolve
from ..errors import InputError
from ..evaluation.cost import active_weights, body_weights
from ..formats.base import Format
from ..formats.converted import choose_format
from ..formats.gguf.writer import K_BLOCK, gguf_format
from ..models.families import check_convertible, decoder_layers
from ..moe.modeling import moesaic_config
from ..plan import FEWEST, Plan, disjoint_plan, specialists_plan

STEPS = (256, 128, 64, 32)
"""Widths of experts that kernels and quantised blocks like, the most useful first."""
NEAR = 0.04
"""How far from the wanted share of the FFN a shape may be."""
MOST = 64
"""Disjoint groups; more are slow everywhere."""
BLOCKS = {"q4_k": K_BLOCK, "q8_0": 32, "f16": 1}
"""Types of GGUF by the width that experts must be a multiple of."""
K_TYPES = ("q4_k",)


def plans(model: str, active: float = 0.5, memory_factor: float = 1.0) -> dict[str, Any]:
    """Shapes for a dense model, specialists first; only its configuration is read.

    Returns:
        `model, intermediate_size, choices`; of each choice `partition, plan, expert_width, ffn_active, memory_factor,
        total_parameters, active_parameters, decode_limit, prefill_limit` (dense weights over active ones: what a
        decoding step reads, what a prompt token multiplies with), `format, engines, gguf` (types) and `options`, with
        which `moesaic convert` makes it.

    Raises:
        InputError: no such model, or a budget that no shape fits.
    """
    known = HUB_ID.fullmatch(model) and model not in NAMES
    try:
        config: Any = AutoConfig.from_pretrained(model if known else resolve(model))
        dense = empty(config)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"'{model}' has no configuration that transformers knows: {error}") from error
    check_convertible(decoder_layers(dense))
    size = config.intermediate_size
    found = dict.fromkeys([*specialist_shapes(active, memory_factor, size), *disjoint_shapes(active, size)])
    choices = [choice(config, dense, partition, plan) for partition, plan in found]
    return {"model": model, "intermediate_size": size, "active": active, "choices": choices}


def specialist_shapes(active: float, memory_factor: float, size: int) -> Iterator[tuple[str, Plan]]:
    """What `--active` gives, and the best shape of each step of width."""
    yield "specialists", specialists_plan(active, memory_factor, size)
    for step in STEPS:
        shapes = []
        for width in range(step, size, step):
            for shared in range(1, 9):
                experts = int(memory_factor * size / width + 1e-6) - shared
                miss = abs((shared + 1) * width / size - active)
                if miss <= NEAR and experts >= 2:
                    shapes.append(
                        (experts < FEWEST, round(miss / 0.01), shared, Plan(shared, 1, shared + experts, width))
                    )
        if shapes:
            yield "specialists", min(shapes, key=lambda shape: shape[:3])[3]


def disjoint_shapes(active: float, size: int) -> Iterator[tuple[str, Plan]]:
    """What `--active` gives, and groups of each width that divides the FFN."""
    yield "coactivation", disjoint_plan(active, size)
    for step in STEPS:
        if size % step == 0 and 4 <= size // step <= MOST:
            plan = disjoint_plan(active, size, step)
            if (
                abs(plan.ffn_active(size) - active) <= NEAR
                and plan.shared
                and plan.num_experts > plan.num_experts_per_tok
            ):
                yield "coactivation", plan


def choice(config: Any, dense: PreTrainedModel, partition: str, plan: Plan) -> dict[str, Any]:
    """One shape's row."""
    size, routed_bias = config.intermediate_size, partition == "coactivation"
    working = moesaic_config(config, plan, "linear")
    form, reason = choose_format("auto", working, routed_bias)
    converted = empty(working)
    _, copied_active = form.copied_parameters(working)
    try:
        gguf_format(working, routed_bias)
        widths = (plan.width, plan.shared_width)
        types = [kind for kind, block in BLOCKS.items() if not any(width % block for width in widths)]
        if config.hidden_size % K_BLOCK:  # of attention and experts' inputs llama-quantize makes other types
            types = [kind + " in part" if kind in K_TYPES else kind for kind in types]
    except InputError:
        types = []
    return {
        "partition": partition,
        "plan": str(plan),
        "expert_width": plan.width,
        "ffn_active": plan.ffn_active(size),
        **sizes(working, plan, form),
        "decode_limit": active_weights(dense) / (active_weights(converted) + copied_active),
        "prefill_limit": body_weights(dense) / (body_weights(converted) + copied_active),
        "format": form.name,
        "format_reason": reason,
        "engines": form.engines(working) or ["transformers with moesaic"],
        "gguf": types,
        "options": f"--partition {partition} --plan {plan} --expert-width {plan.width}",
    }


def sizes(working: Any, plan: Plan, form: Format) -> dict[str, Any]:
    """`memory_factor, total_parameters, active_parameters` of a converted model in the form that is written."""
    named = dict(empty(working).named_parameters())
    total = sum(p.numel() for p in named.values())
    routed = sum(p.numel() for name, p in named.items() if ".experts." in name)
    idle = routed * (1 - plan.num_experts_per_tok / plan.num_experts) if plan.num_experts else 0
    copied, copied_active = form.copied_parameters(working)
    dense_ffns = 3 * working.hidden_size * working.intermediate_size * working.num_hidden_layers
    return {
        "memory_factor": plan.memory_factor(working.intermediate_size) + copied / dense_ffns,
        "total_parameters": total + copied,
        "active_parameters": round(total - idle) + copied_active,
    }


def empty(config: Any) -> PreTrainedModel:
    """A model of that configuration without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
