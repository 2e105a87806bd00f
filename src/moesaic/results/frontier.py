"""Results of `frontier`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Json, Result
from .evaluation import EvaluationResult, TaskScore


@dataclass(frozen=True, kw_only=True)
class FrontierRow(Result):
    """One conversion, measured."""

    omitted_when_none: ClassVar[frozenset[str]] = frozenset(
        {"expert_width", "seconds", "peak_rss_bytes", "partition", "fingerprint", "memory", "tasks", "tasks_mean",
         "tasks_stderr", "dtype", "versions", "machine"}
    )  # fmt: skip

    method: str
    active: float
    """The ffn share that was asked for."""
    memory_factor: float
    seed: int
    plan: str | None
    """None for a bound, which is no conversion."""
    ffn_active: float
    """The ffn share that runs: the part of the dense FFN's neurons, for one token."""
    perplexity: float
    perplexity_ratio: float
    """Over the dense model's."""
    speedup: float | None = None
    """Of decoding, over the dense model."""
    machine: str | None = None
    versions: dict[str, str] | None = None
    expert_width: int | None = None
    seconds: float | None = None
    peak_rss_bytes: int | None = None
    partition: str | None = None
    fingerprint: dict[str, str] | None = None
    memory: float | None = None
    """Neurons that are kept, relative to the dense FFN's."""
    dtype: str | None = None
    tasks: dict[str, TaskScore] | None = None
    tasks_mean: float | None = None
    tasks_stderr: float | None = None


@dataclass(frozen=True, kw_only=True)
class ShapeSpeed(Result):
    """Decode speed of a shape on one machine, and how it was measured."""

    plan: str
    expert_width: int
    machine: str
    speedup: float
    details: Json
    """The row of `benchmark`, dtype, threads, prompt, versions."""

    def to_dict(self) -> Json:
        values = super().to_dict()
        del values["details"]
        return self.details | values


@dataclass(frozen=True, kw_only=True)
class FrontierSummary(Result):
    """Rows that differ by seed only, as one."""

    omitted_when_none: ClassVar[frozenset[str]] = frozenset({"tasks_mean", "tasks_stderr"})

    method: str
    active: float
    ffn_active: float
    memory_factor: float
    memory: float | None
    plan: str | None
    partition: str | None
    speedup: float | None
    perplexity_ratio: float
    """The mean."""
    perplexity_ratio_deviation: float
    """Of the sample of seeds."""
    seeds: int
    tasks_mean: float | None = None
    tasks_stderr: float | None = None


@dataclass(frozen=True, kw_only=True)
class FrontierResult(Result):
    """Methods x budgets x memory on one model; `frontier.json`."""

    omitted_when_none: ClassVar[frozenset[str]] = frozenset({"dense"})

    setting: Json
    """Model, text, calibration: rows of another setting are not mixed with these."""
    versions: dict[str, str]
    machine: str
    rows: list[FrontierRow]
    dense: EvaluationResult | None = None
    unfit: dict[str, str]
    """Why methods do not fit the model."""
    speeds: list[ShapeSpeed]
    summary: list[FrontierSummary]
