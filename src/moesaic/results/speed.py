"""Results of `benchmark`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
    """Bytes of weights that a step reads."""
    dense_bytes: float
    flops: float
    """Floating-point operations of a step."""
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
class PictureSpeed(Result):
    """A question about pictures, converted against dense; medians over alternating rounds."""

    image_tokens: int
    """Tokens that pictures became."""
    text_tokens: int
    """The other tokens of the question, the chat template's too."""
    encode_ms: float
    """Vision tower and projector, and putting what they give among the text's embeddings."""
    dense_encode_ms: float
    """The same parts in the dense model: how far it is from `encode_ms` is noise."""
    prefill_ms: float
    """Milliseconds for all tokens through the language tower, after that."""
    dense_prefill_ms: float
    prefill_speedup: float
    decode_tokens_per_s: float
    """After the question."""
    dense_decode_tokens_per_s: float
    decode_speedup: float


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult(Result):
    """Speed against the dense model, by what was timed and its size."""

    omitted_when_none: ClassVar[frozenset[str]] = frozenset({"picture"})

    decode: dict[str, Speed]
    """By sequences decoded at once."""
    prefill: dict[str, Speed]
    """By tokens of the prompt."""
    block: dict[str, Speed]
    """Speed of the FFNs alone, by tokens."""
    roof: Roof
    machine: str
    threads: int
    dtype: str
    experts: str
    """How experts ran."""
    peak_rss_bytes: int
    protocol: str
    versions: dict[str, str]
    picture: PictureSpeed | None = None
    """Speed on pictures, of a vision-language model that was asked about some."""


@dataclass(frozen=True, kw_only=True)
class Rate(Result):
    """Tokens a second, medians over the rounds."""

    tokens_per_s: float
    dense_tokens_per_s: float
    speedup: float
    """The median of the ratios within a round."""


@dataclass(frozen=True, kw_only=True)
class QuantisedRow(Result):
    """One model in one of llama.cpp's types."""

    kind: str
    """`dense`, `sibling` or `converted`."""
    model: str
    plan: str | None
    ffn_active: float
    outtype: str
    bytes: int
    """Size of the file."""
    perplexity: float
    """Perplexity of the file's weights, read back."""
    perplexity_ratio: float
    """Over that of the dense model in the first type."""
    decode: Rate
    """Over the dense model in the same type."""
    prefill: Rate
    on_front: bool
    """Whether no other row is both as fast and as good."""


@dataclass(frozen=True, kw_only=True)
class QuantisedResult(Result):
    """Dense, siblings and ours in llama.cpp's types."""

    rows: list[QuantisedRow]
    protocol: str
    """Protocol of the perplexities."""
    window: int
    tokens: int
    text: str
    data_sha256: str
    prompt: int
    new: int
    rounds: int
    threads: int
    clock: str
    """`wall`, or `cpu`: tokens a second of CPU time."""
    engine: str
    machine: str
    versions: dict[str, str]
