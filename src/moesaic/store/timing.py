"""Predict how long a trace takes with a cache: a simple clock over layer steps and loads.

One link loads one expert after the other; one processor runs one expert after the other. A layer's router must have
run before its experts are known, unless they are foreseen: then their loads start up to `ahead` layer steps early, as
soon as the link is free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import InputError
from .policies.base import CacheSize, Policy
from .replay import KnownSteps, LayerStep, Replay, check_trace, run_step


class Link(NamedTuple):
    """Between the slow tier and the fast one."""

    bandwidth: float
    """Bytes a second."""
    latency: float = 0.0
    """Seconds before the first byte of each expert."""

    def seconds(self, size: int) -> float:
        """Say how long so many bytes take."""
        return self.latency + size / self.bandwidth


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds that parts of a layer step take, and how they overlap."""

    load: float
    """One expert through the link."""
    expert: float
    """Running one expert, whose weights are read once however many tokens it has."""
    layer: float = 0.0
    """What comes before a layer's experts: attention, norms, router."""
    token: float = 0.0
    """All of one layer's work that each token adds."""
    each_pass: float = 0.0
    """Beside the layers, each forward pass: embedding, head, sampling. A pass begins where layers start over."""
    pipelined: bool = True
    """Whether resident experts run while others load, and each as it comes; else all wait for the last load."""
    ahead: int = 0
    """Layer steps by which loads may start early; 0 is on demand."""
    foreseen: float = 1.0
    """Share of the missing experts that are known early, where `ahead` is more than 0."""
    in_flight: int | None = None
    """Of the missing experts, how many load or wait to run at once, as `run_step` has it; pipelined only."""

    def __post_init__(self) -> None:
        """Check that a clock can run with them.

        Raises:
            InputError: a time or a share that is none.
        """
        times = (self.load, self.expert, self.layer, self.token, self.each_pass)
        if not all(0 <= time < float("inf") for time in times) or self.ahead < 0 or not 0 <= self.foreseen <= 1:
            raise InputError(f"{self} has a negative time, or a share that is not from 0 to 1")
        if self.in_flight is not None and (self.in_flight < 1 or not self.pipelined):
            raise InputError(f"{self.in_flight} experts in flight; give 1 or more, and let them run as they come")


@dataclass(kw_only=True)
class Predicted(Replay):
    """What a cache does with a trace, and how long it takes."""

    seconds: float = 0.0
    waited: float = 0.0
    """Of them the processor waits for loads."""
    passes: int = 0
    """Forward passes."""

    @property
    def seconds_per_pass(self) -> float:
        """Of a forward pass, which is a token's time where one request decodes."""
        return self.seconds / max(1, self.passes)


def predict_time(
    trace: Sequence[LayerStep], policy: Policy, size: CacheSize, times: StepTimes, look_ahead: int = 0
) -> Predicted:
    """Predict hits and time of a trace with a cache.

    Args:
        trace: what a model used, in the order of its layer steps.
        policy: what leaves.
        size: of the fast tier, and of the model.
        times: of this machine.
        look_ahead: as `replay` has it.

    Raises:
        InputError: as `replay`.
    """
    return time_of(trace, misses_of(trace, policy, size, look_ahead, times.in_flight), times)


def misses_of(
    trace: Sequence[LayerStep], policy: Policy, size: CacheSize, look_ahead: int = 0, in_flight: int | None = None
) -> list[int]:
    """Count the experts that are missing in each layer step; arguments and errors as those of `predict_time`."""
    check_trace(trace, size)
    cache, known = policy.cache(size), KnownSteps(trace, look_ahead if policy.online else None)
    found = []
    for number, step in enumerate(trace):
        known.begin(number)
        found.append(len(run_step(cache, step, known.next_use, in_flight)))
    return found


def time_of(trace: Sequence[LayerStep], misses: Sequence[int], times: StepTimes) -> Predicted:
    """Predict how long layer steps take of which so many experts are missing."""
    clock, found, last = Clock(times), Predicted(), -1
    for number, (step, missing) in enumerate(zip(trace, misses, strict=True)):
        begins = not number or step.layer <= last
        clock.run(len(step.experts) - missing, missing, step.tokens, begins)
        found.misses += missing
        found.hits += len(step.experts) - missing
        found.passes += begins
        last = step.layer
    found.seconds, found.waited = clock.now, clock.waited
    return found


class Clock:
    """The time at which the processor and the link are done with what they were given."""

    def __init__(self, times: StepTimes) -> None:
        self.times = times
        self.now = self.link = self.waited = 0.0
        self.owed = 0.0
        """Part of an expert that is still to be foreseen, so that shares add up over steps."""
        self.began: deque[float] = deque([0.0] * (times.ahead + 1), times.ahead + 1)
        """When the last steps began, the oldest first."""

    def run(self, resident: int, missing: int, tokens: int = 1, begins: bool = False) -> None:
        """Run a layer step.

        Args:
            resident: experts that are there.
            missing: experts that are not.
            tokens: that run it.
            begins: whether a forward pass begins with it.
        """
        times = self.times
        self.now += times.each_pass * begins
        self.began.append(self.now)
        self.now += times.layer
        routed, early, count = self.now, self._foreseen(missing), resident + missing
        run = times.expert + times.token * tokens / max(1, count)
        busy = self.now + count * run
        if times.pipelined:
            self.now += resident * run
            ends: list[float] = []
            for number in range(missing):
                room = ends[-times.in_flight] if times.in_flight and number >= times.in_flight else 0.0
                self.now = max(self.now, self._load(number < early, routed, room)) + run
                ends.append(self.now)
        else:
            arrivals = [self._load(number < early, routed) for number in range(missing)]
            self.now = max([self.now, *arrivals]) + count * run
        self.waited += max(0.0, self.now - busy)

    def _foreseen(self, missing: int) -> int:
        """Say how many of those that miss are known early; parts of an expert add up over steps."""
        if not self.times.ahead:
            return 0
        self.owed += missing * self.times.foreseen
        early = min(missing, int(self.owed + 1e-9))
        self.owed -= early
        return early

    def _load(self, early: bool, routed: float, room: float = 0.0) -> float:
        """Load one expert when the link is free, it is known and has room; says when it is there."""
        known = self.began[0] if early else routed
        self.link = max(self.link, known, room) + self.times.load
        return self.link
