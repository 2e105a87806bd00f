"""Which experts stay: one method a file."""

from .base import Kept, Pruner

__all__ = ["Kept", "Pruner"]
