"""Which and how many experts run, by their scores: one rule a file."""

from .base import Selection

__all__ = ["Selection"]
