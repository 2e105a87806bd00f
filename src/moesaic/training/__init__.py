"""Light training of a converted model: text, teacher, objective, balance, and the loop that keeps the best."""

from .config import FinetuneConfig

__all__ = ["FinetuneConfig"]
