"""How the router ahead of a model learns: from what each layer's experts hold of a token's top neurons (Read-ME, §4.1).

Shapes: T tokens, C tokens of a chunk, N sequences, B of them in a step, L tokens in one, F neurons, E routed experts,
I neurons of one, G groups of layers.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..calibration.activations import LayerActivations
from ._network import PregateNetwork

SHARPNESS, HARD, SMOOTHING = 10.0, 0.75, 0.5
"""Of Read-ME's code: dist is 10 times the overlap, three quarters of the loss are for its arg-max, smoothed by half."""
GRADES = 5
HELD_OUT, LOOKS, PATIENCE = 8, 12, 3
"""One sequence in so many judges; how often; how many times in a row without gain end the training."""


class Lesson(NamedTuple):
    """How well the router learnt: on held-out calibration tokens, nats a token."""

    loss: float
    least: float
    """The entropy of what was to be learnt, below which no loss can be."""
    agreement: float
    """Share of decisions that are the teacher's best expert."""


def graded(value_TF: Tensor, count: int) -> Tensor:
    """Grade each token's `count` top neurons by rank: 1 / (3 count) for each of five thresholds passed, float32 [T, F].

    The thresholds are the values of rank count, 4/5, 3/5, 2/5 and 1/5 of it, so the strongest fifth has 5 / (3 count).
    """
    ranks = sorted({max(1, count * g // GRADES) for g in range(1, GRADES + 1)})
    top_TC = value_TF.topk(min(count, value_TF.shape[1]), dim=1).values
    grade_TF = torch.zeros_like(value_TF, dtype=torch.float32)
    for rank in ranks:
        repeats = sum(max(1, count * g // GRADES) == rank for g in range(1, GRADES + 1))
        grade_TF += repeats * (value_TF >= top_TC[:, min(rank, top_TC.shape[1]) - 1, None])
    return grade_TF / (3 * count)


def overlap(value_TF: Tensor, experts_EI: Tensor, count: int) -> Tensor:
    """Sum the grades of each expert's neurons, float32 [T, E]."""
    grade_TF = graded(value_TF, count)
    return torch.stack([grade_TF[:, neurons].sum(1) for neurons in experts_EI], dim=1)


def graded_target(overlap_TE: Tensor, active: int) -> Tensor:
    """Turn overlaps into a distribution over experts as Read-ME's code does, [T, E].

    With dist = 10 (overlap - its mean), its loss `0.75 CE(logits, arg-max dist; smoothed by 0.5) + 0.25 CE(logits,
    softmax dist)` is one cross-entropy to this mean of both targets. For `active` experts a token they share arg-max.
    """
    dist_TE = SHARPNESS * (overlap_TE - overlap_TE.mean())
    hard_TE = torch.zeros_like(dist_TE).scatter_(1, dist_TE.topk(active, dim=1).indices, 1 / active)
    smooth_TE = (1 - SMOOTHING) * hard_TE + SMOOTHING / dist_TE.shape[1]
    return HARD * smooth_TE + (1 - HARD) * dist_TE.softmax(1)


def layer_target(
    sample: LayerActivations, experts_EI: Tensor, active: int, *, importance: bool, signed: bool
) -> Tensor:
    """Say which experts the tokens of one layer need, a distribution for each token, float32 [T, E]."""
    norm_F = sample.ffn.down_DF.float().norm(dim=0)
    held = []
    for _, h_CF in sample.chunks():
        value_CF = h_CF.float() if signed else h_CF.float().abs() * norm_F
        held.append(held_by_experts(value_CF, experts_EI, active, importance=importance))
    held_TE = torch.cat(held)
    return held_TE if importance else graded_target(held_TE, active)


def held_by_experts(value_TF: Tensor, experts_EI: Tensor, active: int, *, importance: bool) -> Tensor:
    """Measure what each expert holds of a token: a share of the squared values, or grades of top neurons, [T, E]."""
    if not importance:
        return overlap(value_TF, experts_EI, active * experts_EI.shape[1])
    share_TE = torch.stack([value_TF[:, e].square().sum(1) for e in experts_EI], dim=1)
    return share_TE / share_TE.sum(1, keepdim=True).clamp(min=1e-30)


def expert_target(value_TF: Tensor, experts_EI: Tensor, active: int, *, importance: bool) -> Tensor:
    """Say which experts tokens need by what their neurons are worth, a distribution for each token, float32 [T, E]."""
    held_TE = held_by_experts(value_TF, experts_EI, active, importance=importance)
    return held_TE if importance else graded_target(held_TE, active)


def distillation_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Sum the cross-entropy to the targets over tokens and groups, [..., E] both, nats."""
    return -(target * logits.log_softmax(-1)).sum()


def teach(
    network: PregateNetwork, tokens_NL: Tensor, target_NLGE: Tensor, seed: int, *, steps: int, learning_rate: float,
    batch: int,
) -> Lesson:  # fmt: skip
    """Train a network by AdamW, a cosine of rates, and keep the state of least loss on every eighth sequence.

    Of the embedding only rows of tokens that occur take part, so that a large vocabulary costs nothing.
    """
    device = network.embed.device
    seen_U, local_NL = tokens_NL.to(device).unique(return_inverse=True)
    pupil = copy.deepcopy(network).float().requires_grad_(True)
    pupil.embed = torch.nn.Parameter(network.embed.detach()[seen_U].float())
    spare_N = torch.arange(len(tokens_NL)) % HELD_OUT == HELD_OUT - 1
    if not spare_N.any():
        spare_N[-1:] = True
    held = local_NL[spare_N], target_NLGE[spare_N].to(device)
    own = (~spare_N).nonzero().squeeze(1) if (~spare_N).any() else spare_N.nonzero().squeeze(1)
    optimizer = torch.optim.AdamW(pupil.parameters(), learning_rate, weight_decay=0.01)
    place_1L = torch.arange(tokens_NL.shape[1], device=device)[None]
    generator = torch.Generator().manual_seed(seed)
    best = judge(pupil, *held)
    state, stale, every = copy.deepcopy(pupil.state_dict()), 0, max(1, steps // LOOKS)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        pick = own[torch.randperm(len(own), generator=generator)[:batch]]
        with torch.enable_grad():
            logits = pupil(local_NL[pick], place_1L)
            loss = distillation_loss(logits, target_NLGE[pick].to(device)) / logits[..., 0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % every == 0:
            found = judge(pupil, *held)
            stale = 0 if found.loss < best.loss else stale + 1
            if not stale:
                best, state = found, copy.deepcopy(pupil.state_dict())
            if stale >= PATIENCE:
                break
    with torch.no_grad():
        network.embed[seen_U] = state.pop("embed").to(network.embed.dtype)
        network.load_state_dict(state, strict=False)
    return best


@torch.no_grad()
def judge(network: PregateNetwork, tokens_NL: Tensor, target_NLGE: Tensor) -> Lesson:
    """Measure a network on sequences and what it should say of them."""
    place_1L = torch.arange(tokens_NL.shape[1], device=tokens_NL.device)[None]
    total = least = agree = 0.0
    for tokens_BL, target_BLGE in zip(tokens_NL.split(8), target_NLGE.split(8), strict=True):
        logits = network(tokens_BL, place_1L)
        total += distillation_loss(logits, target_BLGE).item()
        least += -(target_BLGE * target_BLGE.clamp(min=1e-30).log()).sum().item()
        agree += (logits.argmax(-1) == target_BLGE.argmax(-1)).sum().item()
    count = target_NLGE[..., 0].numel()
    return Lesson(total / count, least / count, agree / count)
