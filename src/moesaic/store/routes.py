"""Routes of tokens, and the forward passes and layer steps that they make."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from .replay import LayerStep

PREFILL, DECODE, MIXED = "prefill", "decode", "mixed"


class Route(NamedTuple):
    """The experts of one token in one layer."""

    request: int
    step: int
    """Forward pass of the request, from 0."""
    phase: str
    token: int
    """Position in the sequence, from 0."""
    layer: int
    """Of those that have experts, from 0."""
    experts: tuple[int, ...]
    """In the router's order."""
    weights: tuple[float, ...]


class Pass(NamedTuple):
    """One forward pass through all layers."""

    phase: str
    """`prefill`, `decode`, or `mixed` of several requests."""
    tokens: int
    steps: tuple[LayerStep, ...]


@dataclass(frozen=True, kw_only=True)
class RouteTrace:
    """What was routed, of one model."""

    routes: Sequence[Route]
    """By request, step, layer and token."""
    num_layers: int
    """That have experts."""
    num_experts: int
    model: str = ""
    expert_bytes: int | None = None
    """Of one expert's weights."""

    def passes(self) -> list[list[Pass]]:
        """Give the forward passes of each request."""
        found = []
        for _, of_request in groupby(self.routes, lambda route: route.request):
            found.append([_pass(list(rows)) for _, rows in groupby(of_request, lambda route: route.step)])
        return found

    def steps(self, phase: str | None = None) -> list[LayerStep]:
        """Give the layer steps of all requests, one after the other.

        Args:
            phase: `prefill` or `decode`; None is both.
        """
        return layer_steps(p for request in self.passes() for p in request if phase in (None, p.phase))


def _pass(rows: list[Route]) -> Pass:
    steps = []
    for layer, of_layer in groupby(rows, lambda route: route.layer):
        tokens = list(of_layer)
        steps.append(LayerStep(layer, tuple(sorted({e for route in tokens for e in route.experts})), len(tokens)))
    return Pass(rows[0].phase, max(step.tokens for step in steps), tuple(steps))


def layer_steps(passes: Iterable[Pass]) -> list[LayerStep]:
    """Join the layer steps of forward passes; layers of which no token uses an expert are left out."""
    return [step for each in passes for step in each.steps if step.experts]
