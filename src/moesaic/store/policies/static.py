"""The most used experts stay for good; the others come and go through what is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from .base import Cache, CacheSize, ExpertKey, Policy
from .lfu import LFUCache


class StaticCache(LFUCache):
    """Counts uses for a while and then no more."""

    def __init__(self, size: CacheSize, learn: int) -> None:
        super().__init__(size, half_life=0)
        self.learn = learn

    def use(self, key: ExpertKey) -> None:
        if self.uses < self.learn:
            super().use(key)
        else:
            Cache.use(self, key)


@dataclass(frozen=True, kw_only=True)
class Static(Policy):
    """Experts pinned by their frequency, as engines do that split experts between two kinds of memory once."""

    learn: Annotated[int, Field(gt=0)] = 4_096
    """Uses of experts from which frequencies are counted."""

    def cache(self, size: CacheSize) -> Cache:
        return StaticCache(size, self.learn)
