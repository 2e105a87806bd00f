"""Which experts or layers stay: one method a file."""

from .base import Kept, LayerPruner, Pruner, PruningMethod

__all__ = ["Kept", "LayerPruner", "Pruner", "PruningMethod"]
