"""Replay which experts a model used, for any policy and any size of the fast tier.

A trace is a list of layer steps in the order in which they ran: a layer, and the experts that it needed for all tokens
of that step.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import InputError
from .policies.base import Cache, CacheSize, ExpertKey, Future, Policy


class LayerStep(NamedTuple):
    """One layer's run on some tokens."""

    layer: int
    experts: tuple[int, ...]
    """That its tokens use, ascending, each once."""
    tokens: int = 1
    """That run it."""


@dataclass
class Replay:
    """What a cache did with a trace."""

    hits: int = 0
    misses: int = 0

    @property
    def hit_ratio(self) -> float:
        """Hits among all uses of experts; 1 of an empty trace."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 1.0


class KnownSteps:
    """The next use of each expert within the next `depth` layer steps of a trace; None: within all that follow."""

    def __init__(self, trace: Sequence[LayerStep], depth: int | None) -> None:
        self.depth = math.inf if depth is None else depth
        self.uses: dict[ExpertKey, deque[int]] = defaultdict(deque)
        self.now = 0
        for number, step in enumerate(trace):
            for expert in step.experts:
                self.uses[ExpertKey(step.layer, expert)].append(number)

    def begin(self, number: int) -> None:
        """Move on to a layer step."""
        self.now = number

    def next_use(self, key: ExpertKey) -> float:
        """Say in how many steps an expert is used next; infinity where that is too far to be known."""
        uses = self.uses[key]
        while uses and uses[0] <= self.now:
            uses.popleft()
        ahead = uses[0] - self.now if uses else math.inf
        return ahead if ahead <= self.depth else math.inf


def run_step(cache: Cache, step: LayerStep, future: Future, in_flight: int | None = None) -> list[ExpertKey]:
    """Run one layer step through a cache as the store does.

    Experts that are resident are used first, and stay until they have been; each other one takes the place of a victim,
    or of the first of the step that is done with where all else is still needed.

    Args:
        cache: what is there.
        step: what is needed.
        future: as the policy may know it.
        in_flight: of the missing, how many load or wait to run at once. The next one loads when the first of them has
            run, so those of the step that are done may leave for it. None: all loads begin at once, and push out
            others.

    Returns:
        Those that were not there, in the order in which they come.
    """
    cache.begin(step.layer)
    keys = [ExpertKey(step.layer, expert) for expert in step.experts]
    there = [key for key in keys if key in cache.resident]
    missing = [key for key in keys if key not in cache.resident]
    busy = deque(there)
    for key in there:
        cache.use(key)
    for number, key in enumerate(missing):
        if in_flight and number >= in_flight:
            busy = deque(missing[number - in_flight + 1 : number])
        while cache.full(key):
            victim = cache.victim(key, busy, future)
            if victim is None:
                busy.popleft()
            else:
                cache.evict(victim)
        cache.admit(key)
        cache.use(key)
        busy.append(key)
    return missing


def replay(
    trace: Sequence[LayerStep], policy: Policy, size: CacheSize, look_ahead: int = 0, in_flight: int | None = None
) -> Replay:
    """Count the hits of a policy.

    Args:
        trace: what a model used.
        policy: what leaves.
        size: of the fast tier, and of the model.
        look_ahead: layer steps beyond the present one of which the policy knows what they need; a policy for the
            simulator only knows all.
        in_flight: as `run_step` has it.

    Raises:
        InputError: a fast tier that holds nothing, or a trace that does not fit the size.
    """
    check_trace(trace, size)
    cache, found = policy.cache(size), Replay()
    known = KnownSteps(trace, look_ahead if policy.online else None)
    for number, step in enumerate(trace):
        known.begin(number)
        missing = run_step(cache, step, known.next_use, in_flight)
        found.misses += len(missing)
        found.hits += len(step.experts) - len(missing)
    return found


def check_trace(trace: Iterable[LayerStep], size: CacheSize) -> None:
    """Check that a trace is one of a model of that size.

    Raises:
        InputError: it is not, or the fast tier holds nothing.
    """
    if size.capacity < 1:
        raise InputError(f"the fast tier holds {size.capacity} experts; give room for one at least")
    for step in trace:
        if not 0 <= step.layer < size.num_layers or not all(0 <= e < size.num_experts for e in step.experts):
            raise InputError(
                f"the trace uses layer {step.layer}, experts {list(step.experts)[:8]}; the model has {size.num_layers} "
                f"layers of {size.num_experts} experts"
            )
