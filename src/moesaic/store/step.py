"""What a store keeps of each expert that has a slot, of each layer's visit, and of all that it did."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future as Task
from dataclasses import dataclass, field
from typing import NamedTuple

from .policies.base import ExpertKey, Future
from .source import ExpertWeights


@dataclass
class Counts:
    """What a store has done so far."""

    hits: int = 0
    """Uses of experts that were there, or on their way."""
    misses: int = 0
    """Uses of experts that had to be fetched then."""
    prefetched: int = 0
    """Experts that were fetched before a layer asked for them."""
    prefetched_in_vain: int = 0
    """Those of them that left without having been used."""
    cancelled: int = 0
    """Those of them that turned out not to be needed before their reading began."""
    bytes_read: int = 0
    """From the slow tier."""
    waited_seconds: float = 0.0
    """That layers spent waiting for experts."""

    @property
    def hit_ratio(self) -> float:
        """Hits among all uses; 1 before the first."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 1.0


class Expert(NamedTuple):
    """An expert that is there to be run."""

    number: int
    weights: ExpertWeights


@dataclass
class Entry:
    """An expert that has a slot."""

    slot: int
    task: Task[int]
    """Its reading; the bytes that came."""
    pins: int = 0
    """Layers that are about to use it, or using it."""
    early: bool = False
    """Whether it was fetched before a layer asked for it, and not used since."""

    @property
    def failed(self) -> bool:
        """Whether it could not be read."""
        return self.task.done() and (self.task.cancelled() or self.task.exception() is not None)


@dataclass
class Step:
    """One layer's visit: what it holds, and what it waits for.

    Only as many of the missing are read or wait to run at once as there are threads to read them: the first to have run
    may then leave for the next, and the rest of the fast tier is left in peace.
    """

    future: Future
    at_once: int
    there: int = 0
    """Of the held, how many were there from the start; they come first."""
    held: deque[ExpertKey] = field(default_factory=deque)
    waiting: deque[ExpertKey] = field(default_factory=deque)

    def may_fetch(self) -> bool:
        """Tell whether another one's turn to be read has come."""
        return bool(self.waiting) and len(self.held) - self.there < self.at_once

    def done(self) -> ExpertKey:
        """Take the first one, which has run."""
        self.there = max(0, self.there - 1)
        return self.held.popleft()
