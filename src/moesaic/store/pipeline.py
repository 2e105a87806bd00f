"""Prefill of a Mixture-of-Experts in closed form, with and without a pipeline (EPS-MoE, arXiv 2410.12247).

EPS-MoE cuts a layer's experts into N groups so that what moves for one group overlaps what is computed for another.
On one machine what moves is weights: experts that load while others run.
"""

from __future__ import annotations

import math

from ..errors import InputError


def expected_active(num_experts: int, experts_per_token: float, tokens: int) -> float:
    """Expect how many experts run for so many tokens, were they routed evenly: `E (1 - (1 - k/E)^m)`."""
    return num_experts * (1 - (1 - experts_per_token / num_experts) ** tokens)


def all_reduce_volume(payload: float, devices: int) -> float:
    """Count what an all-reduce moves for each device, `2 (P/D) (D - 1)`: tensor parallel attention and experts."""
    return 2 * payload / devices * (devices - 1)


def prefill_time(move: float, compute: float, stages: int = 1, stage_cost: float = 0.0) -> float:
    """Predict a layer's time: `max + min / N + κ (N - 1)`, which for one stage is the sum of both.

    Args:
        move: seconds in which all that it needs has moved: weights through the link, or tokens between devices.
        compute: seconds of its experts alone.
        stages: N, groups of experts that follow each other.
        stage_cost: κ, seconds that each further stage costs.

    Raises:
        InputError: no stage.
    """
    if stages < 1:
        raise InputError(f"{stages} stages; give 1, which is no pipeline, or more")
    return max(move, compute) + min(move, compute) / stages + stage_cost * (stages - 1)


def best_stages(move: float, compute: float, stage_cost: float, most: int) -> int:
    """Choose the number of stages by the size of the load: the whole number nearest `N* = sqrt(C / κ)` in time.

    C is the lesser of both times, as the other cannot be hidden.

    Args:
        move: as `prefill_time`.
        compute: as `prefill_time`.
        stage_cost: as `prefill_time`.
        most: experts that run, each of which could be a stage.
    """
    best = math.sqrt(min(move, compute) / stage_cost) if stage_cost > 0 else math.inf
    near = {1, *(min(max(1, most), max(1, number)) for number in (_floor(best, most), _floor(best, most) + 1))}
    return min(sorted(near), key=lambda stages: prefill_time(move, compute, stages, stage_cost))


def _floor(number: float, most: int) -> int:
    return int(min(number, most))
