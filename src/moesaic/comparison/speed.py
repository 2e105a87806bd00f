"""Decode speed of a shape without converting anything: weights decide quality, bytes decide speed."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..compat import parameters_on_meta, set_experts_implementation
from ..evaluation.benchmark import decode_speed
from ..evaluation.inspect import prompt_tokens
from ..machine import machine, versions
from ..moe.modeling import DEFAULT_EXPERTS, moe_blocks, moesaic_config
from ..plan import Plan
from ..results import ShapeSpeed

SPEED = {"prompt": 64, "new": 16, "rounds": 3}
"""Tokens before and while decoding, and timed rounds."""


@torch.no_grad()
def shaped(dense: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Make the dense model with random FFNs of that shape behind linear gates; everything else is shared with it.

    Random gates choose experts evenly, which is what a decoding step's bytes depend on.
    """
    config = moesaic_config(dense.config, plan)
    set_experts_implementation(config, DEFAULT_EXPERTS)
    with parameters_on_meta():  # rotary frequencies are buffers that no checkpoint holds
        model = AutoModelForCausalLM.from_config(config, dtype=dense.dtype)
    model.load_state_dict(dense.state_dict(), strict=False, assign=True)
    model.tie_weights()
    for block in moe_blocks(model):
        block.to_empty(device=dense.device)
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=dense.config.initializer_range)
    return model.to(dense.device).eval()


def shape_speed(dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan) -> ShapeSpeed:
    """Time decoding as any conversion of the dense model to that shape does it."""
    tokens_1L = prompt_tokens(tokenizer, SPEED["prompt"])
    found = decode_speed(shaped(dense, plan), dense, tokens_1L, new=SPEED["new"], rounds=SPEED["rounds"])
    details = {name: value for name, value in found.to_dict().items() if name != "speedup"}
    details |= {"threads": torch.get_num_threads(), "dtype": str(dense.dtype).removeprefix("torch.")}
    return ShapeSpeed(
        plan=str(plan), expert_width=plan.width, machine=machine(), speedup=found.speedup,
        details=details | SPEED | {"versions": versions()},
    )  # fmt: skip
