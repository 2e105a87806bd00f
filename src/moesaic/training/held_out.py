"""The loss on text that is not trained on, and how evenly the experts are used there.

Shapes: M sequences of a micro-batch, L tokens in one, S scored positions, T tokens, E routed experts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..moe.block import MoE
from . import balance
from . import losses as objective
from .data import Samples

MICRO_TOKENS = 2_048
"""Tokens that run forward and back at once; their logits take 10 bytes times the vocabulary each."""


@torch.no_grad()
def held_out_loss(
    module: nn.Module, blocks: list[MoE], samples: Samples, device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """(sum of next-token losses in nats, float64; each layer's load [E]) of a model in eval mode."""
    module.eval()
    loads = balance.no_loads(blocks, device)

    def watch(layer: int, block: MoE, x_TD: Tensor, index_TK: Tensor) -> None:
        loads[layer] += balance.load(index_TK, len(loads[layer]))

    total = torch.zeros((), dtype=torch.float64)  # on the CPU: not every device has float64
    with balance.watched(blocks, watch):
        for tokens_ML, scored_ML in micro_batches(samples):
            tokens_ML, scored_ML = tokens_ML.to(device), scored_ML[:, 1:].to(device)
            logits_SV = module(input_ids=tokens_ML, use_cache=False).logits[:, :-1][scored_ML]
            target_S = tokens_ML[:, 1:][scored_ML]
            for logits, target in zip(logits_SV.split(256), target_S.split(256), strict=True):
                total += objective.next_token(logits.float(), target).cpu().double()
    return total, loads


def micro_batches(samples: Samples) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens, which count) of a few sequences at a time."""
    size = max(1, MICRO_TOKENS // samples.tokens_NL.shape[1])
    yield from zip(samples.tokens_NL.split(size), samples.scored_NL.split(size), strict=True)
