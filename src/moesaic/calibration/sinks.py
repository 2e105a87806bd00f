"""Tokens that open a text: without a BOS whichever it is becomes the attention sink, and a window shows only one.

An opening token sees nothing but itself, so it is a sequence of its own, and many cost little.

Shapes: M opening tokens, N sequences, L tokens in one, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor, nn

from ..errors import InputError
from ..models.layerwise import LayerwiseModel
from .layers import OpeningTargets, replaced_ffn, tapped
from .windows import bos

SHARE = 8
"""One opening token for so many others."""
CHAT_SHARE = 8
"""One in so many is the token that opens a chat."""
NOISE = 0.01
"""Rounding of an FFN's factor: families have 1, or Granite's .2 and more."""


def opening_tokens(tokens_NL: Tensor, tokenizer: Any, count: int | None) -> Tensor:
    """List tokens that may open a text, int64 [M, 1]: evenly spaced ones, and every eighth that of the chat template.

    Without `count` an eighth of the tokens. None at all where the tokenizer puts a BOS first, which every window shows.

    Raises:
        InputError: some are asked for where a BOS is always first.
    """
    if bos(tokenizer):
        if count:
            raise InputError(
                f"--first-tokens {count} has no use: this tokenizer opens every text with a BOS, which all calibration "
                "windows show; leave it out"
            )
        return tokens_NL.new_zeros(0, 1)
    flat_T = tokens_NL.flatten()
    count = len(flat_T) // SHARE if count is None else min(count, len(flat_T))
    first_M = flat_T[torch.arange(count) * len(flat_T) // max(1, count)].clone()
    for token in chat_opening(tokenizer):
        first_M[::CHAT_SHARE] = token
    return first_M[:, None]


def chat_opening(tokenizer: Any) -> list[int]:
    """Find the token that opens a chat; empty without a template, or with one that does not take a question alone."""
    if not tokenizer.chat_template:
        return []
    try:
        opened = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateError:
        return []
    return tokenizer(opened, add_special_tokens=False)["input_ids"][:1]


def opening_targets(
    stream: LayerwiseModel, index: int, layer: nn.Module, hidden_M1D: Tensor, dense_M1D: Tensor
) -> OpeningTargets:
    """Make FFN inputs and targets [M, D] on the converted path, and what the dense layer makes of the dense one.

    The target takes the residual stream back to the dense one's: where the layer adds `c` times its FFN's output,
    `(dense - rest) / c` with the stream after the dense layer and that after the converted path's without any FFN;
    where a norm follows the FFN, the dense path's `y`.
    """
    _, dense_MD, after_M1D = tapped(stream, index, layer, dense_M1D)
    input_MD, _, rest_M1D = tapped(stream, index, layer, hidden_M1D, Constant(0))
    factor = ffn_factor(stream, index, layer, hidden_M1D[:1])
    target_MD = (after_M1D - rest_M1D)[:, 0] / factor if factor else dense_MD
    return OpeningTargets(input_MD, target_MD, after_M1D)


class Constant(nn.Module):
    """An FFN of one output, in every channel."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.full_like(hidden_states, self.value)


def ffn_factor(stream: LayerwiseModel, index: int, layer: nn.Module, like_11D: Tensor) -> float:
    """Measure `c` where a layer adds `c` times its FFN's output to the residual stream; 0 where a norm rescales it."""
    after = []
    for value in (1.0, 2.0):
        with replaced_ffn(layer, Constant(value)):
            after.append(stream.run(index, layer, torch.zeros_like(like_11D)).float())
    factor = (after[1] - after[0]).mean().item()
    return factor if abs(factor) > NOISE else 0.0
