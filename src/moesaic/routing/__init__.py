"""Which experts for which token: one router a file."""

from .base import RouterBuilder

Base = RouterBuilder

__all__ = ["Base", "RouterBuilder"]
