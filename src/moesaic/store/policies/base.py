"""The contract of a cache policy: which expert leaves the fast tier when another one needs its place.

The store and the simulator call the same code in the same order, so that what one says holds for the other.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, NamedTuple


class ExpertKey(NamedTuple):
    """One routed expert of a model."""

    layer: int
    """Of the layers that have experts, from 0."""
    expert: int


class CacheSize(NamedTuple):
    """How much a cache holds of how much there is."""

    capacity: int
    """Experts that the fast tier holds."""
    num_layers: int
    """Layers that have experts."""
    num_experts: int
    """Routed experts of a layer."""


Future = Callable[[ExpertKey], float]
"""In how many layer steps an expert is used next, as far as that is known; infinity where it is not."""


def unknown(key: ExpertKey) -> float:
    """Know nothing of the future."""
    return math.inf


class Cache(ABC):
    """Which experts are in the fast tier, and which one leaves.

    `resident` holds them in the order of their last use, the oldest first.
    """

    def __init__(self, size: CacheSize) -> None:
        self.size = size
        self.resident: dict[ExpertKey, None] = {}
        self.layer = 0
        """That runs, or ran last."""

    def begin(self, layer: int) -> None:
        """Note that a layer is about to run."""
        self.layer = layer

    def use(self, key: ExpertKey) -> None:
        """Note that a resident expert is used."""
        del self.resident[key]
        self.resident[key] = None

    def admit(self, key: ExpertKey) -> None:
        """Note that an expert came in."""
        self.resident[key] = None

    def evict(self, key: ExpertKey) -> None:
        """Note that an expert left."""
        del self.resident[key]

    def full(self, incoming: ExpertKey) -> bool:
        """Tell whether one has to leave before `incoming` can come."""
        return len(self.resident) >= self.size.capacity

    @abstractmethod
    def victim(self, incoming: ExpertKey, busy: Collection[ExpertKey], future: Future = unknown) -> ExpertKey | None:
        """Choose which expert leaves for `incoming`; None if all that might are busy."""


class ScannedCache(Cache):
    """Goes through the experts that may leave, one by one: what most rules need."""

    def victim(self, incoming: ExpertKey, busy: Collection[ExpertKey], future: Future = unknown) -> ExpertKey | None:
        able = (key for key in self.candidates(incoming) if key not in busy)
        first = next(able, None)
        return None if first is None else self.choose(chain((first,), able), future)

    def candidates(self, incoming: ExpertKey) -> Iterable[ExpertKey]:
        """List the experts whose place `incoming` may take, the one that was used last being last."""
        return self.resident

    @abstractmethod
    def choose(self, able: Iterator[ExpertKey], future: Future) -> ExpertKey:
        """Choose among those that may leave, of which there is one at least, the one that was used last being last."""


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """A rule that says which expert leaves; hyper-parameters are its fields."""

    online: ClassVar[bool] = True
    """Whether it can run before all that follows is known; else it is for the simulator."""

    @abstractmethod
    def cache(self, size: CacheSize) -> Cache:
        """Make an empty cache.

        Raises:
            InputError: a size with which the policy cannot work.
        """
