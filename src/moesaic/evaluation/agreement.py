"""How far a model writes what another one, mostly its dense origin, writes greedily.

Both numbers come from one pass over the other's continuations (teacher forcing): up to the first token on which they
differ both models have read the same, so the tokens before it are those that free-running greedy texts have in common.

Shapes: C tokens of a continuation, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from .continuations import Scored, predictions
from .perplexity import check_losses

BATCH_TOKENS = 4_096
"""Of the sequences that are scored together, padding included."""


class Agreed(NamedTuple):
    """What a model makes of one continuation."""

    hits: int
    """Positions whose greatest logit is the continuation's token."""
    prefix: int
    """Of them, those before the first that is not."""
    tokens: int
    loss: float
    """Of all its tokens, nats."""


@torch.inference_mode()
def agreement(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    tick: Callable[[int], None] | None = None,
) -> list[Agreed]:
    """Compare a model's greatest logits with the tokens of continuations, each given the prompt and those before it.

    Args:
        model: the model that is measured.
        prompts: tokens of each.
        continuations: tokens that another model wrote, one or more for each prompt.
        tick: called with how many are finished.
    """
    sequences = [Scored([*p, *c], len(p)) for p, c in zip(prompts, continuations, strict=True)]
    order = sorted(range(len(sequences)), key=lambda row: -len(sequences[row].tokens))
    found = [Agreed(0, 0, 0, 0.0)] * len(sequences)
    done = 0
    while done < len(order):
        rows = order[done : done + max(1, BATCH_TOKENS // len(sequences[order[done]].tokens))]
        for row, (logits_CV, tokens_C) in zip(rows, predictions(model, [sequences[row] for row in rows]), strict=True):
            losses_C = cross_entropy(logits_CV, tokens_C, reduction="none")
            check_losses(losses_C, "a continuation", model.dtype)
            hits_C = logits_CV.argmax(-1) == tokens_C
            prefix = int(hits_C.long().cumprod(0).sum())
            found[row] = Agreed(int(hits_C.sum()), prefix, len(tokens_C), float(losses_C.double().sum()))
        done += len(rows)
        if tick:
            tick(done)
    return found


class Share(NamedTuple):
    """A share over items of different sizes."""

    mean: float
    stderr: float


def share(parts: Sequence[tuple[int, int]]) -> Share:
    """Compute sum of hits over sum of sizes of (hits, size) of items, with the error of drawing items.

    `stderr = sqrt(n / (n - 1) sum (hits - mean size)²) / sum size`, a ratio's (Cochran, Sampling Techniques, 2.11); for
    sizes of 1 it is that of a share of items, `sqrt(mean (1 - mean) / (n - 1))`.
    """
    n, size = len(parts), sum(size for _, size in parts)
    mean = sum(hits for hits, _ in parts) / size
    squares = sum((hits - mean * size) ** 2 for hits, size in parts)
    return Share(mean, math.sqrt(n / max(1, n - 1) * squares) / size)
