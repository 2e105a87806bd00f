"""The expert that is needed last leaves: Belady's rule over all that is known, and an estimate beyond it.

Read-ME (arXiv 2410.19123, §4.3) evicts by the tokens that wait in its queue, whose routes are known; a model that
routes layer by layer knows nothing of the kind. What it does know is the order of its layers, and how often each expert
was used: one that a share p of the passes through its layer use is expected in every 1 / p of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from .base import Cache, CacheSize, ExpertKey, Future, Policy

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
    """Remembers how often each expert was used lately, and over a longer time."""

    def __init__(self, size: CacheSize, rates: tuple[float, ...]) -> None:
        super().__init__(size)
        self.passes = np.zeros(size.num_layers, dtype=np.int64)
        self.memories = [RunningShare(size, rate) for rate in rates]

    def begin(self, layer: int) -> None:
        super().begin(layer)
        self.passes[layer] += 1

    def use(self, key: ExpertKey) -> None:
        super().use(key)
        for memory in self.memories:
            memory.use(key, int(self.passes[key.layer]))

    def expected(self, keys: Sequence[ExpertKey]) -> Numbers:
        """Estimate in how many layer steps experts are used next: their layer's turn, and 1 / p - 1 rounds more."""
        layers = self.size.num_layers
        layer, expert = np.fromiter(itertools.chain.from_iterable(keys), np.int64, 2 * len(keys)).reshape(-1, 2).T
        shares = [memory.shares(layer, expert, self.passes) for memory in self.memories]
        share: Numbers = sum(shares[1:], shares[0]) / len(shares)
        steps = (layer - self.layer - 1) % layers + 1
        with np.errstate(divide="ignore"):
            return steps + layers * (1 / share - 1)  # what came early was never used, and so is never expected

    def choose(self, able: list[ExpertKey], future: Future) -> ExpertKey:
        known = {}
        for place in np.argsort(-self.expected(able), kind="stable").tolist():
            known[place] = future(able[place])
            if known[place] == math.inf:  # of those that nothing is known of, the last one expected
                return able[place]
        return able[max(known, key=known.__getitem__)]


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
