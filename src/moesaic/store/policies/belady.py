"""The expert that is used last in all that follows leaves: the most hits that any policy can have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from .base import Cache, CacheSize, ExpertKey, Future, Policy, ScannedCache


class BeladyCache(ScannedCache):
    """Asks the future only."""

    def choose(self, able: Iterator[ExpertKey], future: Future) -> ExpertKey:
        return max(able, key=future)


@dataclass(frozen=True, kw_only=True)
class Belady(Policy):
    """The optimum (Belady 1966), for simulations of a whole trace."""

    online: ClassVar[bool] = False

    def cache(self, size: CacheSize) -> Cache:
        return BeladyCache(size)
