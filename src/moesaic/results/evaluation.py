"""Results of `evaluate`."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Result


@dataclass(frozen=True, kw_only=True)
class TaskScore(Result):
    """Zero-shot accuracy on one task, or the mean over tasks."""

    acc: float | None
    """Share of items whose right choice is the likeliest."""
    acc_norm: float | None
    """The same with likelihoods divided by the choice's characters."""
    stderr: float | None
    """Standard error of `acc`."""
    n: int
    """Items."""


@dataclass(frozen=True, kw_only=True)
class EvaluationResult(Result):
    """Perplexity under a named protocol, and accuracies."""

    perplexity: float
    tokens: int
    protocol: str
    window: int
    text: str
    data_sha256: str
    tasks: dict[str, TaskScore]
    """By name; `mean` over the tasks of a file."""
    versions: dict[str, str]
    dtype: str | None = None
    """Of the weights; None in files of versions that did not note it."""
