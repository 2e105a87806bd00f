"""How a selection learns the number of experts: one method a file."""

from .base import Learner

__all__ = ["Learner"]
