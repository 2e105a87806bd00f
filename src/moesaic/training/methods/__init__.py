"""What of a converted model learns, and by which loss beside the objective: one method a file."""

from .base import Method

__all__ = ["Method"]
