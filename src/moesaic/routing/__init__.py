"""Which experts for which token: one router a file, `fit` and forward together."""

from .base import Gate, Router, make_gate

__all__ = ["Gate", "Router", "make_gate"]
