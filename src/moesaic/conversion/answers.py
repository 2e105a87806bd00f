"""What a vision-language model says of held-out pictures, before and after its conversion.

Shapes: N sequences, L tokens in one, S tokens of answers, D hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..results import PictureResult
from ..results.evaluation import perplexity_of
from .prepare import Conversion


class Answers(NamedTuple):
    """What a model makes of the answers to questions about pictures, which it is given."""

    loss: float
    """Mean over the answers' tokens, nats."""
    first_S: Tensor
    """The token that it puts first in the place of each."""


def is_text(conversion: Conversion) -> Tensor:
    """Tell which held-out sequences are text alone, bool [N]."""
    tokens = conversion.tokens
    found = tokens.pictured.get("held_out")
    return torch.ones(len(tokens.held_out_NL), dtype=torch.bool) if found is None else ~found.has_pictures_N


@torch.no_grad()
def answers(conversion: Conversion, hidden_NLD: Tensor) -> Answers | None:
    """Find the loss and the first choices of a model, whose last hidden states on held-out data are given."""
    tokens, held_out = conversion.tokens, conversion.tokens.pictured.get("held_out")
    if held_out is None:
        return None
    losses, first = [], []
    for n in held_out.has_pictures_N.nonzero().flatten().tolist():
        scored_L = held_out.is_scored_NL[n, 1:]
        logits_SV = conversion.layerwise.logits(tokens.held_out_NL[n : n + 1], hidden_NLD[n : n + 1])[:-1][scored_L]
        target_S = tokens.held_out_NL[n, 1:][scored_L].to(logits_SV.device)
        losses.append(cross_entropy(logits_SV.float(), target_S, reduction="none"))
        first.append(logits_SV.argmax(-1))
    return Answers(torch.cat(losses).mean().item(), torch.cat(first)) if losses else None


def compare_answers(conversion: Conversion, dense: Answers, converted: Answers) -> PictureResult:
    """Say what the conversion does to the answers."""
    pictured = conversion.tokens.pictured["calibration"]
    return PictureResult(
        perplexity_dense=perplexity_of(dense.loss), perplexity=perplexity_of(converted.loss),
        agreement=(dense.first_S == converted.first_S).double().mean().item(), answer_tokens=len(dense.first_S),
        calibrated=bool(pictured.is_image_NL.any()), image_weight=conversion.config.image_weight,
        held_out=conversion.tokens.held_out_pictures,
    )  # fmt: skip
