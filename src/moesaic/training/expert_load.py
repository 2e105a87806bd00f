"""How evenly the experts are used: measured, on held-out text beside its loss, and evened out.

Shapes: M sequences of a micro-batch, L tokens in one, S scored positions, T tokens, E routed experts, K slots for
experts in a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models.moe_block import count_load
from ..moe.block import MoE
from ..results import ExpertLoad
from .data import Samples
from .locality import kept_experts
from .losses import next_token
from .parameters import like

MICRO_TOKENS = 2_048
"""Tokens that run forward and back at once; their logits take 10 bytes times the vocabulary each."""
Watch = Callable[[int, MoE, Tensor, Tensor], None]
"""Called with a layer's number, its block, the tokens that enter it [T, D] and the experts they chose [T, K]."""


@contextmanager
def watched(blocks: Sequence[MoE], watch: Watch) -> Iterator[None]:
    """Call `watch` whenever a gate has chosen; on leaving, nothing is left of it."""

    def hook(number: int, block: MoE) -> Callable[..., None]:
        return lambda gate, inputs, output: watch(number, block, inputs[0], output.top_k_index)

    handles = [b.gate.register_forward_hook(hook(n, b)) for n, b in enumerate(blocks) if b.gate is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def no_loads(blocks: Sequence[MoE], device: torch.device) -> list[Tensor]:
    """Make each block's load before any token came, [E]; [0] for blocks without routed experts."""
    counts = [block.gate.e_score_correction_bias.numel() if block.gate is not None else 0 for block in blocks]
    return [torch.zeros(count, dtype=torch.int64, device=device) for count in counts]


def summary(loads: Sequence[Tensor], tokens: int, kept: float | None = None) -> ExpertLoad:
    """Sum up all layers' loads, [E] each, on so many tokens, of which a share `kept` the experts of the one before."""
    loads = [load_E for load_E in loads if len(load_E)]  # blocks without routed experts have none
    if not loads:
        return ExpertLoad(coefficient_of_variation=0.0, dead_experts=0, experts_per_token=0.0)
    shares = torch.stack([load_E.double() for load_E in loads])
    variation = shares.std(1, unbiased=False) / shares.mean(1).clamp(min=1e-12)
    return ExpertLoad(
        coefficient_of_variation=variation.mean().item(),
        dead_experts=int((shares == 0).sum()),
        experts_per_token=shares.sum(1).mean().item() / max(1, tokens),
        kept_experts=kept,
    )


def selection_loss(loss: float, load: ExpertLoad, locality: float) -> float:
    """Compute what the best state has the least of: held-out loss, and `locality` nats a token that changes experts."""
    return loss + locality * (1 - (load.kept_experts or 0.0)) if locality else loss


@torch.no_grad()
def move_bias(blocks: Sequence[MoE], loads: Sequence[Tensor], step: float) -> None:
    """Move the selection bias: `bias += step * sign(mean load - load)` (CMoE §3.4, DeepSeek-V3); no gradient."""
    for block, load_E in zip(blocks, loads, strict=True):
        if block.gate is None:
            continue
        bias_E = block.gate.e_score_correction_bias
        direction_E = (load_E.float().mean() - load_E.float()).sign().to(bias_E.dtype)
        bias_E += like(bias_E, step * direction_E)


def balance_loss(scores_TE: Tensor, index_TK: Tensor) -> Tensor:
    """Compute `E sum_e f_e P_e`, f an expert's share of choices, P its mean softmax; 1 when even (Switch, §2.2)."""
    count = scores_TE.shape[-1]
    share_E = count_load(index_TK, count).float()
    share_E = share_E / share_E.sum().clamp(min=1)
    return count * (share_E * scores_TE.softmax(-1).mean(0)).sum()


class HeldOut(NamedTuple):
    """What was measured on samples that are not trained on."""

    total: Tensor
    """Sum of next-token losses, nats, float64."""
    loads: list[Tensor]
    """Of each layer, [E]."""
    kept: float
    """Share of tokens that run the experts of the token before, mean over layers."""


@torch.no_grad()
def held_out_loss(
    module: nn.Module, blocks: list[MoE], samples: Samples, device: torch.device, dtype: torch.dtype
) -> HeldOut:
    """Measure loss, load and locality of a model in eval mode."""
    module.eval()
    loads, kept = no_loads(blocks, device), []
    length = 0  # of the sequences that run

    def watch(layer: int, block: MoE, x_TD: Tensor, index_TK: Tensor) -> None:
        loads[layer] += count_load(index_TK, len(loads[layer]))
        kept.append((len(x_TD), kept_experts(index_TK, length)))

    total = torch.zeros((), dtype=torch.float64)  # on the CPU: not every device has float64
    with watched(blocks, watch):
        for batch in micro_batches(samples):
            length = batch.tokens_NL.shape[1]
            tokens_ML, scored_ML = batch.tokens_NL.to(device), batch.scored_NL[:, 1:].to(device)
            output = module(input_ids=tokens_ML, **batch.inputs(device, dtype), use_cache=False)
            logits_SV = output.logits[:, :-1][scored_ML]
            target_S = tokens_ML[:, 1:][scored_ML]
            for logits, target in zip(logits_SV.split(256), target_S.split(256), strict=True):
                total += next_token(logits.float(), target).cpu().double()
    tokens = sum(count for count, _ in kept)
    return HeldOut(total, loads, sum(count * share for count, share in kept) / max(1, tokens))


def micro_batches(samples: Samples) -> Iterator[Samples]:
    """Cut samples into a few sequences at a time."""
    size = max(1, MICRO_TOKENS // samples.tokens_NL.shape[1])
    for index_M in torch.arange(len(samples)).split(size):
        yield from samples.alike(index_M)
