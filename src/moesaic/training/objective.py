"""What training makes small: the loss of the next token, the distance from the teacher, or both.

Shapes: S scored positions, V vocabulary, K logits that are kept of the teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

TINY = 1e-6


def next_token(logits_SV: Tensor, target_S: Tensor) -> Tensor:
    """The sum over positions of `-log q(target)`, nats."""
    return cross_entropy(logits_SV, target_S, reduction="sum")


def distance(logits_SV: Tensor, log_probs_SK: Tensor, tokens_SK: Tensor) -> Tensor:
    """The sum over positions of `KL(teacher || student)`, nats, all but the teacher's K largest taken as one class.

    Equals the full divergence for K = V, and is less than it otherwise.
    """
    student_SK = logits_SV.gather(-1, tokens_SK) - logits_SV.logsumexp(-1, keepdim=True)
    kept = (log_probs_SK.exp() * (log_probs_SK - student_SK)).sum()
    if logits_SV.shape[-1] == tokens_SK.shape[-1]:
        return kept
    rest_S = (1 - log_probs_SK.exp().sum(-1)).clamp(min=TINY)
    student_rest_S = (1 - student_SK.exp().sum(-1)).clamp(min=TINY)
    return kept + (rest_S * (rest_S.log() - student_rest_S.log())).sum()


def layer_distance(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> Tensor:
    """The mean over layers of `‖ours - theirs‖² / ‖theirs‖²` of their outputs, times the number of tokens."""
    pairs = [(a.float(), b.float()) for a, b in zip(ours, theirs, strict=True)]
    errors = torch.stack([(a - b).square().sum(-1) / b.square().sum(-1).clamp(min=TINY) for a, b in pairs])
    return errors.mean(0).sum()
