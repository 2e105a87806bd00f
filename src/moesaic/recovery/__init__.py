"""Winning quality back after the split: one method a file."""

from .base import Recovery

Base = Recovery

__all__ = ["Base", "Recovery"]
