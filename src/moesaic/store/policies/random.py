"""Any expert leaves: what other policies have to beat."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random as Generator
from typing import Annotated

from pydantic import Field

from .base import Cache, CacheSize, ExpertKey, Future, Policy, ScannedCache


class RandomCache(ScannedCache):
    """Draws from its own generator."""

    def __init__(self, size: CacheSize, seed: int) -> None:
        super().__init__(size)
        self.generator = Generator(seed)

    def choose(self, able: Iterator[ExpertKey], future: Future) -> ExpertKey:
        return self.generator.choice(list(able))


@dataclass(frozen=True, kw_only=True)
class Random(Policy):
    """Uniform choice."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the draws of which expert leaves."""

    def cache(self, size: CacheSize) -> Cache:
        return RandomCache(size, self.seed)
