"""Traffic of several requests from their traces: who decodes together, and what a layer then needs for all."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from random import Random

from ..errors import InputError
from .replay import LayerStep
from .routes import MIXED, Pass


def poisson(requests: int, per_pass: float, seed: int = 0) -> list[float]:
    """Draw when requests arrive, counted in forward passes: `per_pass` of them in each on average.

    Raises:
        InputError: a rate that is not above zero.
    """
    if not 0 < per_pass < float("inf"):
        raise InputError(f"{per_pass} requests arrive in a forward pass; give a number above 0")
    generator, now, found = Random(seed), 0.0, []
    for _ in range(requests):
        now += generator.expovariate(per_pass)
        found.append(now)
    return found


def together(requests: Sequence[Sequence[Pass]], at_once: int, arrivals: Sequence[float] | None = None) -> list[Pass]:
    """Run requests in one batch, first come, first served: each forward pass has the next one of each that runs.

    A layer step of the batch needs the union of its requests' experts. A prompt joins those that decode.

    Args:
        requests: forward passes of each.
        at_once: places in the batch.
        arrivals: of each request, counted in forward passes, ascending; None: all are there from the start.

    Raises:
        InputError: no place, or arrivals that are not as many as requests.
    """
    if at_once < 1 or (arrivals is not None and len(arrivals) != len(requests)):
        raise InputError(f"{at_once} places for {len(requests)} requests; give one place, and an arrival each")
    waiting = deque(zip(arrivals or [0.0] * len(requests), map(deque, requests), strict=True))
    running: list[deque[Pass]] = []
    found: list[Pass] = []
    now = 0.0
    while waiting or running:
        if not running:
            now = max(now, waiting[0][0])  # nobody is there: time goes on to the next arrival
        while waiting and len(running) < at_once and waiting[0][0] <= now:
            running.append(waiting.popleft()[1])
        running = [request for request in running if request]
        if running:
            found.append(_union([request.popleft() for request in running]))
        running = [request for request in running if request]
        now += 1
    return found


def _union(passes: Sequence[Pass]) -> Pass:
    """Join forward passes into one: a layer needs what any of them needs there."""
    experts: dict[int, set[int]] = {}
    tokens: dict[int, int] = {}
    for step in (step for each in passes for step in each.steps):
        experts.setdefault(step.layer, set()).update(step.experts)
        tokens[step.layer] = tokens.get(step.layer, 0) + step.tokens
    steps = tuple(LayerStep(layer, tuple(sorted(experts[layer])), tokens[layer]) for layer in sorted(experts))
    phases = {each.phase for each in passes}
    return Pass(phases.pop() if len(phases) == 1 else MIXED, sum(each.tokens for each in passes), steps)
