"""Results of `evaluate`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from .base import Result


def perplexity_of(loss: float) -> float:
    """Compute `exp(loss)`, loss in nats a token, at most e^700 (a float64 ends at e^709); NaN of NaN."""
    return math.exp(min(loss, 700.0))  # in the other order `min` would give 700 for NaN


@dataclass(frozen=True, kw_only=True)
class TaskScore(Result):
    """Zero-shot accuracy on one task, or the mean over tasks."""

    acc: float | None
    """Share of items whose right choice is the likeliest, or that were answered as the file says."""
    acc_norm: float | None
    """The same with likelihoods divided by the choice's characters; None where there are answers without choices."""
    stderr: float | None
    """Standard error of `acc`."""
    n: int
    """Items."""


@dataclass(frozen=True, kw_only=True)
class GenerationScore(Result):
    """What a model wrote for the exercises of one file, and how it agrees with the reference."""

    omitted_when_none: ClassVar[frozenset[str]] = frozenset({
        "pass_at_1", "exact_match", "stderr", "ended", "agreement", "agreement_stderr", "loss", "common_prefix",
        "reference_tokens",
    })  # fmt: skip

    kind: str
    """`code`, `mathematics` or `text`."""
    n: int
    """Exercises."""
    chat: bool
    """Whether the model was asked by its chat template."""
    max_new_tokens: int
    data_sha256: str
    """Hash of the file."""
    seconds: float
    """Seconds of writing, judging and comparing."""
    pass_at_1: float | None = None
    """Share of greedy completions that pass their tests."""
    exact_match: float | None = None
    """Share of greedy answers with the right number."""
    stderr: float | None = None
    """Standard error of that one."""
    ended: float | None = None
    """Share of completions that came to an end before `max_new_tokens`."""
    agreement: float | None = None
    """Share of the reference's tokens that are the model's likeliest, given those before them."""
    agreement_stderr: float | None = None
    loss: float | None = None
    """On the reference's tokens, nats."""
    common_prefix: float | None = None
    """Tokens until both greedy texts part, the mean over exercises."""
    reference_tokens: int | None = None
    """Tokens that the reference wrote, in all."""


@dataclass(frozen=True, kw_only=True)
class EvaluationResult(Result):
    """Perplexity under a named protocol, accuracies, and what the model writes."""

    omitted_when_none: ClassVar[frozenset[str]] = frozenset({"scored_tokens", "scored_bytes", "bits_per_byte"})

    perplexity: float
    tokens: int
    protocol: str
    window: int
    text: str
    data_sha256: str
    tasks: dict[str, TaskScore]
    """By name; `mean` over the tasks of a file."""
    generation: dict[str, GenerationScore] = field(default_factory=dict)
    """By the name of the file without its ending."""
    versions: dict[str, str]
    scored_tokens: int | None = None
    """The tokens whose loss is in the perplexity; None in files of versions that did not count them."""
    scored_bytes: int | None = None
    """Bytes of UTF-8 that the scored tokens stand for."""
    bits_per_byte: float | None = None
    """Their loss over those bytes, which compares models with different tokenizers."""
    dtype: str | None = None
    """The weights' dtype; None in files of versions that did not note it."""
    expert_store: dict[str, float] | None = None
    """What the expert store did, if there is one."""
