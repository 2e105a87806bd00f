"""Results of `demo`."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Json, Result
from .conversion import ConversionResult
from .speed import BenchmarkResult, Rate


@dataclass(frozen=True, kw_only=True)
class Typed(Result):
    """What both models wrote after the same beginning."""

    prompt: str
    dense: str
    converted: str


@dataclass(frozen=True, kw_only=True)
class LlamaCppSpeed(Result):
    """What llama.cpp reached with both models in the same type."""

    version: str
    type: str
    """GGUF's."""
    threads: int
    prompt: int
    """Tokens."""
    new: int
    """Tokens decoded after the prompt."""
    rounds: int
    decode: Rate
    prefill: Rate


@dataclass(frozen=True, kw_only=True)
class DemoResult(Result):
    """What the demo found; `metrics.json` in its output has the keys of `convert` and `benchmark`, and these."""

    model: str
    name: str
    """What the model is, for readers."""
    active: float
    """Share of each FFN that was asked for."""
    conversion: ConversionResult
    speed: BenchmarkResult
    typed: list[Typed]
    llama_cpp: LlamaCppSpeed | None
    llama_cpp_missing: str | None
    """Why llama.cpp was not measured, and what to do; None where it was."""

    @property
    def ratio(self) -> float:
        """Perplexity over the dense model's."""
        return self.conversion.perplexity / self.conversion.perplexity_dense

    def to_dict(self) -> Json:
        values = super().to_dict()
        del values["conversion"], values["speed"]
        return self.conversion.to_dict() | self.speed.to_dict() | values
