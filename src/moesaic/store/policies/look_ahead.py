"""The expert that is needed last leaves: Belady's rule over all that is known, and an estimate beyond it.

Read-ME (arXiv 2410.19123, §4.3) evicts by the tokens that wait in its queue, whose routes are known; a model that
routes layer by layer knows nothing of the kind. What it does know is the order of its layers, and how often each expert
was used: one that a share p of the passes through its layer use is expected in every 1 / p of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from .base import Cache, CacheSize, ExpertKey, Future, Policy, unknown

LONGEST = 4_096
"""Passes after which nothing more fades."""
Integers, Numbers = NDArray[np.int64], NDArray[np.float64]


class RunningShare:
    """The share of passes in which each expert was used, where a pass counts `1 - rate` times as much as the next."""

    def __init__(self, size: CacheSize, rate: float) -> None:
        self.rate = rate
        self.fade = (1 - rate) ** np.arange(LONGEST)
        """What is left of a share after so many passes without a use."""
        self.then = np.zeros((size.num_layers, size.num_experts))
        """What it was at the expert's last use."""
        self.last = np.zeros((size.num_layers, size.num_experts), dtype=np.int64)
        """The pass of that use, from 1; 0: none."""

    def use(self, key: ExpertKey, now: int) -> None:
        """Note a use in pass `now`, from 1."""
        self.then[key] = self.then[key] * self.fade[min(now - self.last[key], LONGEST - 1)] + self.rate
        self.last[key] = now

    def shares(self, layer: Integers, expert: Integers, passes: Integers) -> Numbers:
        """Give experts' shares after so many passes of each layer; plain means where all passes count alike."""
        age = np.minimum(passes[layer] - self.last[layer, expert], LONGEST - 1)
        whole = 1 - self.fade[np.clip(passes, 1, LONGEST - 1)]
        return self.then[layer, expert] * self.fade[age] / whole[layer]


class LookAheadCache(Cache):
    """Remembers how often each expert was used lately, and over a longer time.

    What is resident is in arrays [layers, experts] too: one of thousands leaves in less time than it takes to read one.
    """

    def __init__(self, size: CacheSize, rates: tuple[float, ...]) -> None:
        super().__init__(size)
        self.passes = np.zeros(size.num_layers, dtype=np.int64)
        self.memories = [RunningShare(size, rate) for rate in rates]
        self.here = np.zeros((size.num_layers, size.num_experts), dtype=bool)
        self.used = np.zeros((size.num_layers, size.num_experts), dtype=np.int64)
        """When each came or was used last, as its place in the order of all that came or were used."""
        self.uses = 0

    def begin(self, layer: int) -> None:
        super().begin(layer)
        self.passes[layer] += 1

    def use(self, key: ExpertKey) -> None:
        super().use(key)
        self._note(key)
        for memory in self.memories:
            memory.use(key, int(self.passes[key.layer]))

    def admit(self, key: ExpertKey) -> None:
        super().admit(key)
        self._note(key)
        self.here[key] = True

    def evict(self, key: ExpertKey) -> None:
        super().evict(key)
        self.here[key] = False

    def _note(self, key: ExpertKey) -> None:
        self.uses += 1
        self.used[key] = self.uses

    def expected(self, layer: Integers, expert: Integers) -> Numbers:
        """Estimate in how many layer steps experts are used next: their layer's turn, and 1 / p - 1 rounds more."""
        layers = self.size.num_layers
        shares = [memory.shares(layer, expert, self.passes) for memory in self.memories]
        share: Numbers = sum(shares[1:], shares[0]) / len(shares)
        steps = (layer - self.layer - 1) % layers + 1
        with np.errstate(divide="ignore"):
            return steps + layers * (1 / share - 1)  # what came early was never used, and so is never expected

    def victim(self, incoming: ExpertKey, busy: Collection[ExpertKey], future: Future = unknown) -> ExpertKey | None:
        able = self.here.copy()
        for key in busy:
            able[key] = False
        layer, expert = np.nonzero(able)
        if not len(layer):
            return None
        sooner, used = -self.expected(layer, expert), self.used[layer, expert]
        known = {}
        for place in least_first(sooner, used):
            key = ExpertKey(int(layer[place]), int(expert[place]))
            known[key] = future(key)
            if known[key] == math.inf:  # of those that nothing is known of, the last one expected
                return key
        return max(known, key=known.__getitem__)


def least_first(one: Numbers, other: Integers) -> Iterator[int]:
    """Give places as `np.lexsort((other, one))` does, and sort only if more than the first is asked for."""
    tied = np.flatnonzero(one == one.min())
    yield int(tied[other[tied].argmin()])
    yield from np.lexsort((other, one))[1:].tolist()


@dataclass(frozen=True, kw_only=True)
class LookAhead(Policy):
    """Belady's rule as far as the future is known; beyond it the order of layers and how often experts are used.

    The share of passes that use an expert is the mean of a fast memory, which follows the topic, and of a slow one,
    which knows the experts that are always popular.
    """

    lately: Annotated[float, Field(gt=0, le=1)] = 0.2
    """What each pass counts in the fast memory."""
    longer: Annotated[float, Field(gt=0, le=1)] = 0.02
    """What each pass counts in the slow one."""

    def cache(self, size: CacheSize) -> Cache:
        return LookAheadCache(size, (self.lately, self.longer))
