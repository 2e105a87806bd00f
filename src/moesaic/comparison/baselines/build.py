"""Baselines by the names of the frontier's lines."""

from __future__ import annotations

from ..recipes import BASELINES
from .base import Baseline
from .cats import Cats
from .depth import DepthPruned
from .neurons import Neurons
from .teal import Teal
from .wina import Wina

CLASSES: dict[str, type[Baseline]] = {
    "depth": DepthPruned, "cats": Cats, "teal": Teal, "wina": Wina, "neurons": Neurons
}  # fmt: skip
"""By the name of the file."""


def build(name: str) -> Baseline:
    """Make the baseline that a line of the frontier stands for."""
    recipe = BASELINES[name]
    return CLASSES[recipe.file](**recipe.options)  # pyrefly: ignore[bad-argument-type]
