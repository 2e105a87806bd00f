"""Results of `export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Result


@dataclass(frozen=True, kw_only=True)
class ExportResult(Result):
    """What was written, and how it was checked."""

    omitted_when_none: ClassVar[frozenset[str]] = frozenset(
        {"median_difference", "agreement", "tokens", "layers", "outtype", "architecture", "fallbacks"}
    )

    output: str
    target: str
    """A stock architecture, `moesaic`, or `gguf`."""
    bytes: int
    max_abs_logit_error: float | None
    """From moesaic's own logits; None of GGUF, on which no engine is run."""
    median_difference: float | None = None
    """Median difference of log-probabilities, nats."""
    agreement: float | None = None
    tokens: int | None = None
    layers: int | None = None
    outtype: str | None = None
    """GGUF's type of matrices."""
    architecture: str | None = None
    """llama.cpp's."""
    fallbacks: int | None = None
    """Matrices of another type, since their rows do not fit `outtype`."""


@dataclass(frozen=True, kw_only=True)
class EngineChoice(Result):
    """What a conversion for an engine is like, and why."""

    omitted_when_none: ClassVar[frozenset[str]] = frozenset({"outtype", "decode_share", "prefill_share"})

    engine: str
    outtype: str | None = None
    """llama.cpp's type of weights."""
    least_width: int | None
    """Neurons of a group, at least; None where the engine was not measured."""
    multiple: int
    """What a group's neurons are a multiple of: the type's block."""
    reason: str
    decode_share: float | None = None
    """Share of the speed-up that bytes allow, at `least_width`."""
    prefill_share: float | None = None
    """Share of the speed-up that FLOPs allow."""


@dataclass(frozen=True, kw_only=True)
class WrittenGGUF(Result):
    """The GGUF that a conversion for llama.cpp ends in."""

    output: str
    outtype: str
    architecture: str
    bytes: int
    fallbacks: int
    """Matrices of another type, since their rows do not fit `outtype`."""
    perplexity: float
    """Perplexity of the file's weights, read back, on the text of the conversion's own."""
