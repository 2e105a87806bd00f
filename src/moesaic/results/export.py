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
    """Of log-probabilities, nats."""
    agreement: float | None = None
    tokens: int | None = None
    layers: int | None = None
    outtype: str | None = None
    """GGUF's type of matrices."""
    architecture: str | None = None
    """llama.cpp's."""
    fallbacks: int | None = None
    """Matrices of another type, since their rows do not fit `outtype`."""
