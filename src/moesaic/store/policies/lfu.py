"""The expert that was used least often leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from .base import Cache, CacheSize, ExpertKey, Future, Policy, ScannedCache


class LFUCache(ScannedCache):
    """Counts uses, of experts that have left too; all counts are halved after every `half_life` uses."""

    def __init__(self, size: CacheSize, half_life: int) -> None:
        super().__init__(size)
        self.half_life, self.uses = half_life, 0
        self.counts: Counter[ExpertKey] = Counter()

    def use(self, key: ExpertKey) -> None:
        super().use(key)
        self.counts[key] += 1
        self.uses += 1
        if self.half_life and self.uses % self.half_life == 0:
            self.counts = Counter({key: count // 2 for key, count in self.counts.items() if count > 1})

    def choose(self, able: Iterator[ExpertKey], future: Future) -> ExpertKey:
        return min(able, key=self.counts.__getitem__)  # the first of equal ones was used longest ago


@dataclass(frozen=True, kw_only=True)
class LFU(Policy):
    """Least frequently used."""

    half_life: Annotated[int, Field(ge=0)] = 0
    """Uses of experts after which all counts are halved, so that a new topic can take over; 0: never."""

    def cache(self, size: CacheSize) -> Cache:
        return LFUCache(size, self.half_life)
