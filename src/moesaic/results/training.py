"""Results of `finetune`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Result


@dataclass(frozen=True, kw_only=True)
class ExpertLoad(Result):
    """How evenly experts are used, and how long."""

    omitted_when_none: ClassVar[frozenset[str]] = frozenset({"kept_experts"})

    coefficient_of_variation: float
    """Spread of the experts' shares of tokens, mean over layers."""
    dead_experts: int
    """Experts that no token runs, in all layers."""
    experts_per_token: float
    """Routed experts that a token runs, mean over layers."""
    kept_experts: float | None = None
    """Share of tokens that run the experts of the token before, mean over layers; None where it was not measured."""


@dataclass(frozen=True, kw_only=True)
class LoadChange(Result):
    """Load before and after a training."""

    before: ExpertLoad
    after: ExpertLoad


@dataclass(frozen=True, kw_only=True)
class StepRecord(Result):
    """One step of a training, a line of `metrics.jsonl`."""

    omitted_when_none: ClassVar[frozenset[str]] = frozenset({"held_out"})

    loss: float
    """The objective, nats a token."""
    layer_loss: float
    """The layers' own losses, mean over tokens and layers."""
    gradient_norm: float
    """Before it was clipped."""
    learning_rate: float
    """Factor of the learning rates, of 1."""
    tokens: int
    load: ExpertLoad
    """The step's, or that of held-out text where it was measured."""
    step: int = 0
    seconds: float = 0.0
    """Seconds of training so far."""
    step_seconds: float = 0.0
    held_out: float | None = None
    """Next-token loss on held-out text, nats a token, where it was measured."""


@dataclass(frozen=True, kw_only=True)
class FinetuneResult(Result):
    """What `finetune` did."""

    omitted_when_none: ClassVar[frozenset[str]] = frozenset(
        {"output", "format", "format_reason", "perplexity_dense", "perplexity_before", "perplexity", "peak_rss_bytes",
         "versions", "machine"}
    )  # fmt: skip

    method: str
    objective: str
    held_out_loss_before: float
    """Nats a token."""
    held_out_loss: float
    held_out_tokens: int
    steps: int
    best_step: int
    """The step after which the model that was written stood; 0: the model as it came."""
    tokens: int
    seconds: float
    processes: int
    load: LoadChange
    improved: bool
    """Whether what was written is better than what came."""
    trainable_parameters: dict[str, int]
    """By part of the model."""
    output: str | None = None
    """The folder; of several processes only the main one has it and what follows."""
    format: str | None = None
    format_reason: str | None = None
    perplexity_dense: float | None = None
    perplexity_before: float | None = None
    perplexity: float | None = None
    peak_rss_bytes: int | None = None
    versions: dict[str, str] | None = None
    machine: str | None = None
