"""Results of `frontier`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .base import Json, Result
from .evaluation import EvaluationResult, TaskScore

PLACE = (
    "active_parameters", "active_ratio", "line", "over_line", "line_by", "extrapolated", "line_by_speed",
    "line_by_parameters",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Placed(Result):
    """Where a conversion lies beside the line of its smaller dense siblings."""

    active_parameters: int | None = None
    """Weights that one decoding step reads; embeddings are looked up and not counted."""
    active_ratio: float | None = None
    """They over the dense model's."""
    line: float | None = None
    """Perplexity that the siblings' line has at the same cost."""
    over_line: float | None = None
    """Our perplexity over it: below 1 it beats the siblings."""
    line_by: str | None = None
    """What the cost is: `speed`, of decoding, or `parameters`, those active."""
    extrapolated: bool | None = None
    """Whether `line` is that of a model smaller than the smallest sibling."""
    line_by_speed: float | None = None
    line_by_parameters: float | None = None

    def to_dict(self) -> Json:
        values = super().to_dict()
        return {k: v for k, v in values.items() if k not in PLACE} | {k: values[k] for k in PLACE if k in values}


@dataclass(frozen=True, kw_only=True)
class FrontierRow(Placed):
    """One conversion, measured."""

    omitted_when_none: ClassVar[frozenset[str]] = frozenset(PLACE) | frozenset(
        {"expert_width", "seconds", "peak_rss_bytes", "partition", "fingerprint", "memory", "tasks", "tasks_mean",
         "tasks_stderr", "dtype", "versions", "machine", "speed_is", "bound"}
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
    """Decoding speed over the dense model's."""
    speed_is: str | None = None
    """`measured`, or `limit`: what the bytes allow, of methods that have no runtime here."""
    bound: str | None = None
    """Under what conditions a baseline's numbers hold."""
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
class DecodeSpeed(Result):
    """Decode speed over the dense model's on one machine, and how it was measured."""

    machine: str
    speedup: float
    details: Json
    """The row of `benchmark`, dtype, threads, prompt, versions."""

    def to_dict(self) -> Json:
        values = super().to_dict()
        del values["details"]
        return self.details | values


@dataclass(frozen=True, kw_only=True)
class ShapeSpeed(DecodeSpeed):
    """Decode speed of a shape."""

    plan: str
    expert_width: int


@dataclass(frozen=True, kw_only=True)
class SiblingSpeed(DecodeSpeed):
    """Decode speed of a smaller dense model, timed in turn with the dense one."""

    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class FrontierSibling(Result):
    """A smaller dense model of the same family, measured as the conversions are."""

    omitted_when_none: ClassVar[frozenset[str]] = frozenset({"tasks_mean", "tasks_stderr"})

    model: str
    """As the user called it."""
    fingerprint: str
    """Hash of its weights, by which it is known again."""
    active_parameters: int
    active_ratio: float
    """They over the dense model's."""
    bytes_per_token: float
    """That a decoding step reads, in the dense model's dtype."""
    perplexity: float
    """`exp(nats a byte x bytes that a token of the dense model stands for)`; its own where both tokenizers agree."""
    perplexity_ratio: float
    """Over the dense model's."""
    speedup: float | None = None
    """Decoding speed over the dense model's."""
    evaluation: EvaluationResult
    """Its own perplexity, bits per byte and accuracies."""
    tasks_mean: float | None = None
    tasks_stderr: float | None = None
    machine: str

    @property
    def label(self) -> str:
        """What a reader knows it as: the last part of its name."""
        return self.model.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class FrontierSummary(Placed):
    """Rows that differ by seed only, as one."""

    omitted_when_none: ClassVar[frozenset[str]] = frozenset(PLACE) | {"tasks_mean", "tasks_stderr", "speed_is"}

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
    """Standard deviation over the seeds."""
    seeds: int
    tasks_mean: float | None = None
    tasks_stderr: float | None = None
    speed_is: str | None = None


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
    siblings: list[FrontierSibling] = field(default_factory=list)
    """Smaller dense models of the family, if asked for."""
    sibling_speeds: list[SiblingSpeed] = field(default_factory=list)
    verdict: list[str] = field(default_factory=list)
    """Whether the best of our conversions beats their line: a sentence for each budget."""
