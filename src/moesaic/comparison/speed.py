"""Decode speed of a shape without converting anything: weights decide quality, bytes decide speed."""

from __future__ import annotations

import copy
import re

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..compat import parameters_on_meta, set_experts_implementation
from ..evaluation.benchmark import decode_speed
from ..evaluation.inspect import prompt_tokens
from ..machine import machine, versions
from ..models.devices import dtype_name
from ..models.families import auto_class, embedding_rows
from ..moe.modeling import DEFAULT_EXPERTS, moe_blocks, moesaic_config
from ..plan import Plan
from ..pruning.depth.source import BY_LAYER
from ..results import Json, ShapeSpeed, SiblingSpeed, Speed
from ..serving.loading import lay_out
from .rows import Shape

SPEED = {"prompt": 64, "new": 16, "rounds": 3}
"""Tokens before and while decoding, and timed rounds."""
LAYERS = re.compile(r"(\d+) of \d+ layers")
"""The plan of a model with fewer layers."""


@torch.no_grad()
def shaped(dense: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Make the dense model with random FFNs of that shape behind linear gates; everything else is shared with it.

    Random gates choose experts evenly, which is what a decoding step's bytes depend on.
    """
    config = moesaic_config(dense.config, plan)
    set_experts_implementation(config, DEFAULT_EXPERTS)
    with parameters_on_meta():  # rotary frequencies are buffers that no checkpoint holds
        model = auto_class(config).from_config(config, dtype=dense.dtype)
    model.load_state_dict(dense.state_dict(), strict=False, assign=True)
    model.tie_weights()
    for block in moe_blocks(model):
        block.to_empty(device=dense.device)
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=dense.config.get_text_config().initializer_range)
    made: PreTrainedModel = model.to(dense.device).eval()  # pyrefly: ignore[bad-argument-type]
    lay_out(made)
    return made


def is_depth(shape: Shape) -> bool:
    """Tell whether a shape is the dense model with fewer layers."""
    return LAYERS.fullmatch(shape.plan) is not None


@torch.no_grad()
def shallow(dense: PreTrainedModel, layers: int) -> PreTrainedModel:
    """Make the dense model with its first `layers` layers only, weights shared; which layers they are costs no byte."""
    config = copy.deepcopy(dense.config)
    config.num_hidden_layers = layers
    for name in BY_LAYER:
        if isinstance(value := getattr(config, name, None), list):
            setattr(config, name, value[:layers])
    with parameters_on_meta():
        model = auto_class(config).from_config(config, dtype=dense.dtype)
    kept = {name for name, _ in model.named_parameters()}
    tensors = {name: tensor for name, tensor in dense.state_dict().items() if name in kept}
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    return model.to(dense.device).eval()  # pyrefly: ignore[bad-argument-type]


def shape_speed(dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan) -> ShapeSpeed:
    """Time decoding as any conversion of the dense model to that shape does it."""
    return _timed(dense, tokenizer, shaped(dense, plan), Shape(str(plan), plan.width))


def depth_speed(dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shape: Shape) -> ShapeSpeed:
    """Time decoding as the dense model with fewer layers does it."""
    found = LAYERS.fullmatch(shape.plan)
    assert found is not None
    return _timed(dense, tokenizer, shallow(dense, int(found[1])), shape)


def _timed(
    dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, shape: Shape
) -> ShapeSpeed:
    tokens_1L = prompt_tokens(tokenizer, SPEED["prompt"])
    found = decode_speed(model, dense, tokens_1L, new=SPEED["new"], rounds=SPEED["rounds"])
    return ShapeSpeed(
        plan=shape.plan, expert_width=shape.expert_width, machine=machine(), speedup=found.speedup,
        details=_details(found, dense),
    )  # fmt: skip


def sibling_speed(
    sibling: PreTrainedModel, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, fingerprint: str
) -> SiblingSpeed:
    """Time decoding of a smaller dense model in turn with the dense one, as that of a shape.

    Args:
        sibling: in the dense model's dtype and on its device.
        dense: what its speed is relative to.
        tokenizer: the dense model's; which tokens a dense model decodes changes nothing that it reads.
        fingerprint: by which the sibling is known.
    """
    rows = min(embedding_rows(sibling), embedding_rows(dense))
    tokens_1L = prompt_tokens(tokenizer, SPEED["prompt"]) % rows
    found = decode_speed(sibling, dense, tokens_1L, new=SPEED["new"], rounds=SPEED["rounds"])
    return SiblingSpeed(
        fingerprint=fingerprint, machine=machine(), speedup=found.speedup, details=_details(found, dense)
    )


def _details(found: Speed, dense: PreTrainedModel) -> Json:
    """Say how a speed was measured, and its numbers but for the speed-up."""
    details = {name: value for name, value in found.to_dict().items() if name != "speedup"}
    details |= {"threads": torch.get_num_threads(), "dtype": dtype_name(dense.dtype)}
    return details | SPEED | {"versions": versions()}
