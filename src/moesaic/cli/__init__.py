"""The command line: one file a verb. Parses, calls, prints; nothing else."""

from .app import app, main

__all__ = ["app", "main"]
