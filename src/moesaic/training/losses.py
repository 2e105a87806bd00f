"""What training makes small: the loss of the next token, the distance from the teacher, or both.

Shapes: S scored positions, V vocabulary, K logits that are kept of the teacher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

TINY = 1e-6
CHUNK = 32
"""Rows of logits that are in float32 at once."""


def next_token(logits_SV: Tensor, target_S: Tensor) -> Tensor:
    """Sum `-log q(target)` over positions, nats."""
    return cross_entropy(logits_SV, target_S, reduction="sum")


def distance(logits_SV: Tensor, log_probs_SK: Tensor, tokens_SK: Tensor) -> Tensor:
    """Sum `KL(teacher || student)` over positions, nats, all but the teacher's K largest taken as one class.

    Equals the full divergence for K = V, and is less than it otherwise.
    """
    student_SK = logits_SV.gather(-1, tokens_SK) - logits_SV.logsumexp(-1, keepdim=True)
    kept = (log_probs_SK.exp() * (log_probs_SK - student_SK)).sum()
    if logits_SV.shape[-1] == tokens_SK.shape[-1]:
        return kept
    rest_S = (1 - log_probs_SK.exp().sum(-1)).clamp(min=TINY)
    student_rest_S = (1 - student_SK.exp().sum(-1)).clamp(min=TINY)
    return kept + (rest_S * (rest_S.log() - student_rest_S.log())).sum()


class Objective(torch.autograd.Function):
    """`lm * next_token + distill * distance` over the scored rows, with the gradient made on the way.

    Equals the two naive functions above; those hold several float32 copies of all logits, this one of `CHUNK` rows, and
    the gradient in the logits' own dtype. With s the student's softmax, p the teacher's kept probabilities, r and s_r
    what either has left: d/dz is `s - target` for the next token, and for the distance `s - p` where kept and
    `s (1 - r / s_r)` elsewhere.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_SV: Tensor, target_S: Tensor, scored_S: Tensor, top: tuple[Tensor, Tensor] | None,
        lm: float, distill: float,
    ) -> Tensor:  # fmt: skip
        gradient_SV = torch.empty_like(logits_SV)
        total = logits_SV.new_zeros((), dtype=torch.float64)
        for start in range(0, len(logits_SV), CHUNK):
            rows = slice(start, start + CHUNK)
            part = None if top is None else (top[0][rows], top[1][rows])
            loss_C, gradient_CV = _rows(logits_SV[rows], target_S[rows], part, lm, distill)
            total += (loss_C * scored_S[rows]).sum()
            gradient_SV[rows] = gradient_CV.mul_(scored_S[rows, None])
        ctx.save_for_backward(gradient_SV)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_SV,) = ctx.saved_tensors
        return gradient_SV.mul_(grad_outputs[0]), None, None, None, None, None


def _rows(
    logits_CV: Tensor, target_C: Tensor, top: tuple[Tensor, Tensor] | None, lm: float, distill: float
) -> tuple[Tensor, Tensor]:
    """Compute (each row's loss [C], its gradient [C, V]), float32; `gradient` is the softmax's memory used again."""
    student_CV = logits_CV.softmax(-1, dtype=torch.float32)
    target_C1 = target_C[:, None]
    loss_C = -lm * student_CV.gather(-1, target_C1).clamp(min=1e-30).log()[:, 0]
    if top is None:
        return loss_C, student_CV.mul_(lm).scatter_add_(
            -1, target_C1, torch.full_like(target_C1, -lm, dtype=torch.float)
        )
    log_probs_CK, tokens_CK = top
    probs_CK, student_CK = log_probs_CK.exp(), student_CV.gather(-1, tokens_CK)
    rest_C, student_rest_C = (
        (1 - share_CK.sum(-1)).clamp(min=TINY) if student_CV.shape[-1] > share_CK.shape[-1] else None
        for share_CK in (probs_CK, student_CK)
    )
    loss_C += distill * (probs_CK * (log_probs_CK - student_CK.clamp(min=1e-30).log())).sum(-1)
    factor_C = torch.ones_like(loss_C)
    if rest_C is not None and student_rest_C is not None:
        loss_C += distill * rest_C * (rest_C.log() - student_rest_C.log())
        factor_C -= rest_C / student_rest_C
    gradient_CV = student_CV.mul_((lm + distill * factor_C)[:, None])
    gradient_CV.scatter_(-1, tokens_CK, (lm + distill) * student_CK - distill * probs_CK)
    return loss_C, gradient_CV.scatter_add_(-1, target_C1, torch.full_like(target_C1, -lm, dtype=torch.float))


def layer_distance(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> Tensor:
    """Average `‖ours - theirs‖² / ‖theirs‖²` of the outputs over layers, times the number of tokens."""
    pairs = [(a.float(), b.float()) for a, b in zip(ours, theirs, strict=True)]
    errors = torch.stack([(a - b).square().sum(-1) / b.square().sum(-1).clamp(min=TINY) for a, b in pairs])
    return errors.mean(0).sum()
