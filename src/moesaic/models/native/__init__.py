"""Stock transformers architectures that can say what a converted model says: one form a file, both directions."""

from .base import NativeForm

Base = NativeForm

__all__ = ["Base", "NativeForm"]
