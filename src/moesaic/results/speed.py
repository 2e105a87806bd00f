"""Results of `benchmark`."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Result


@dataclass(frozen=True, kw_only=True)
class Speed(Result):
    """One thing that was timed, converted against dense; medians over alternating rounds."""

    tokens_per_s: float
    tokens_per_s_range: list[float]
    """The least and the greatest."""
    dense_tokens_per_s: float
    dense_tokens_per_s_range: list[float]
    speedup: float
    """Median of the rounds' own ratios."""
    speedup_range: list[float]
    limit: float
    """The speed-up that bytes (decode) or FLOPs (prefill) allow."""
    share_of_limit: float
    bytes: float
    """Of weights, that a step reads."""
    dense_bytes: float
    flops: float
    """Of a step."""
    dense_flops: float
    experts_touched: float | None
    """Different experts that a step runs, a layer on average."""


@dataclass(frozen=True, kw_only=True)
class Roof(Result):
    """What the machine does in one large product."""

    bytes_per_s: float
    """With one token."""
    flops_per_s: float
    """With many."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult(Result):
    """Speed against the dense model, by what was timed and its size."""

    decode: dict[str, Speed]
    """By sequences decoded at once."""
    prefill: dict[str, Speed]
    """By tokens of the prompt."""
    block: dict[str, Speed]
    """Of the FFNs alone, by tokens."""
    roof: Roof
    machine: str
    threads: int
    dtype: str
    experts: str
    """How experts ran."""
    peak_rss_bytes: int
    protocol: str
    versions: dict[str, str]
