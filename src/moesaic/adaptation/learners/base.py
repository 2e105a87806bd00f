"""The contract of a learner: one step of training how many experts run.

Shapes: N sequences, L tokens in one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...routing.selection.base import Learning
from ..policy import Policy


class Batch(NamedTuple):
    """Sequences of one step."""

    tokens_NL: Tensor
    scored_NL: Tensor
    """Whether a token counts, as one to be predicted."""
    generator: torch.Generator
    """Of what is drawn in the step."""


@dataclass(kw_only=True)
class Steering:
    """What holds a training to its budget; kept with the training's state."""

    mean: float
    """Experts wanted for a token."""
    price: float | None = None
    """Of one expert in the loss, λ; None before the first step."""
    scale: float = 1.0
    """Of the evidence, in units of which thresholds learn."""


class Outcome(NamedTuple):
    """What a step found."""

    loss: float
    experts_per_token: float
    gap: float
    """Next-token loss above that of the default number of experts, nats a token."""


Update = Callable[[], None]
"""Averages gradients over processes and takes one step of the optimizer."""


@dataclass(frozen=True, kw_only=True)
class Learner(ABC):
    """A way to train a selection; hyper-parameters are its fields."""

    learning_rate: ClassVar[float] = 1e-3
    weight_decay: ClassVar[float] = 0.0
    decays: ClassVar[bool] = True
    """Whether the learning rate falls as a cosine; else it is constant."""
    through_experts: ClassVar[bool] = False
    """Whether gradients go through the experts, so that their weights must stay where they are."""
    trains_on_budget: ClassVar[bool] = True
    """Whether the selection is at its budget while it learns, so that training begins with a calibration."""

    def check(self, selection: Learning) -> None:
        """Check that the learner can train a selection.

        Raises:
            InputError: it cannot.
        """
        return

    @property
    def warm_share(self) -> float:
        """Share of the training that is a warm start."""
        return 0.0

    def prepare(self, policy: Policy, steering: Steering, batch: Batch) -> None:
        """Set policy and steering to where training starts, by a batch that is the same in all processes."""
        return

    def warm_step(self, policy: Policy, steering: Steering, batch: Batch, update: Update) -> Outcome:
        """Take a step of the warm start."""
        raise AssertionError("a learner with a warm start defines its step")

    @abstractmethod
    def step(self, policy: Policy, steering: Steering, batch: Batch, update: Update) -> Outcome:
        """Take a step: compute gradients of the policy's parameters, call `update`, steer the budget."""


def likelihoods(logits_NLV: Tensor, tokens_NL: Tensor) -> Tensor:
    """Compute `log P(x_{i+1} | x_<=i)` in nats at each position i, float32 [N, L - 1]."""
    rows = zip(logits_NLV[:, :-1], tokens_NL[:, 1:], strict=True)
    return -torch.stack([cross_entropy(logits.float(), target, reduction="none") for logits, target in rows])
