"""The command line: verbs in pipeline order. Parses, calls, prints; nothing else."""

from . import make, measure  # noqa: F401  their verbs join the application
from .app import app, main

__all__ = ["app", "main"]
