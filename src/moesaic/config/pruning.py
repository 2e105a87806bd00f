"""What is asked of leaving experts or layers out."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..results import Json
from .settings import PrunerField, Settings


class PruneConfig(Settings):
    """Everything that decides what a pruned model is; saved in `moesaic.yaml` with the output."""

    section: ClassVar[str] = "pruning"

    experts: int | None = None
    """Routed experts that each layer keeps; or give `ratio`."""
    ratio: float | None = None
    """Share of the routed experts that goes, with method `depth` of the decoder layers; or give their number."""
    layers: int | None = None
    """Decoder layers that stay, method `depth`; or give `ratio`."""
    method: PrunerField = "reap"
    """Which experts stay; or `depth`, of any model, which layers."""
    recovery: Literal["closed-form", "none"] = "closed-form"
    """Whether down-projections of what stays are fitted to what the source said."""
    calibration: tuple[str, ...] = ()
    """Text files, .jsonl files or `datasets` names; none: the bundled text, and `answers` for a model that chats."""
    tokens: int = 16_384
    """Calibration tokens."""
    window: int = 256
    """Tokens in one calibration sequence."""
    held_out_tokens: int = 4_096
    """Tokens of bundled held-out text for the perplexity before and after."""
    device: str = "auto"
    """`auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    seed: int = 0
    """Seed of every random draw: the same one gives the same result on the same machine."""
    collapse_ratio: float = 100.0
    """Perplexity above this many times the source's is a collapse."""

    @classmethod
    def combine(cls, recipe: Json, settings: Json) -> Json:
        """Override the settings of a recipe; one that is given of how much stays takes the place of the others."""
        sizes = ("experts", "ratio", "layers")
        if any(settings.get(name) is not None for name in sizes):
            recipe = {name: value for name, value in recipe.items() if name not in sizes}
        return recipe | settings
