"""The learning rate over a training."""

from __future__ import annotations

import math

FLOOR = 0.1
"""Of the learning rate, at the end."""


def schedule(progress: float, warmup: float) -> float:
    """Compute the learning rate's factor: up in a line, then down along a cosine to `FLOOR`."""
    if progress < warmup:
        return max(0.02, progress / warmup)
    falling = (progress - warmup) / max(1e-9, 1 - warmup)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, falling)))
