"""Results of `adapt`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Result


@dataclass(frozen=True, kw_only=True)
class AdaptStep(Result):
    """One step of a training, a line of `metrics.jsonl`."""

    step: int
    seconds: float
    """Seconds of training so far."""
    loss: float
    """The learner's objective."""
    experts_per_token: float
    """Mean over the step's tokens and layers."""
    price: float
    """What one expert costs in the loss: λ, steered to the budget."""
    gap: float
    """Next-token loss above that of the default number of experts, nats a token."""
    learning_rate: float
    """Its factor, of 1."""
    tokens: int


@dataclass(frozen=True, kw_only=True)
class AdaptResult(Result):
    """What `adapt` found."""

    omitted_when_none: ClassVar[frozenset[str]] = frozenset(
        {"output", "peak_rss_bytes", "versions", "machine", "experts_by_modality", "calibrated_experts_per_token"}
    )

    method: str
    """The selection with its options, as `--select` takes it where it has no parameters."""
    learner: str | None
    model: str
    target_active: float
    """Share of the model's own number of experts that was asked for."""
    active: float
    """Share that runs on held-out text."""
    experts_per_token: float
    """Routed experts that a token runs on held-out text, mean over layers."""
    calibrated_experts_per_token: float | None = None
    """The same on the calibration tokens, by which the rule was brought to the budget."""
    default_experts_per_token: int
    num_experts: int
    experts_by_layer: list[float]
    experts_by_modality: dict[str, float] | None = None
    """Experts a token of `text` and of a picture (`image`), mean over layers; None for models that take text only."""
    held_out_loss_default: float
    """With the model's own number of experts; nats a token."""
    held_out_loss_start: float
    """Before training, at the same number of experts; the same as `held_out_loss` where nothing learns."""
    held_out_loss: float
    held_out_tokens: int
    improved: bool
    """Whether training made it better; if not, the rule as it started is what was written."""
    steps: int
    tokens: int
    seconds: float
    parameters: int
    """In the adapter."""
    processes: int
    inside: bool
    """Whether the output is a model with the selection in it, or an adapter."""
    output: str | None = None
    """The folder; of several processes only the main one has it and what follows."""
    peak_rss_bytes: int | None = None
    versions: dict[str, str] | None = None
    machine: str | None = None
