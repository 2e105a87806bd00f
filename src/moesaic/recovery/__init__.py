"""Winning quality back after the split: one method a file."""

from .base import Recovery

__all__ = ["Recovery"]
