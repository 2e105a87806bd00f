"""What `moesaic serve` says when it is ready."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Result


@dataclass(frozen=True, kw_only=True)
class ServeResult(Result):
    """Where a server is, and what it holds."""

    url: str
    """Without `/v1`."""
    model: str
    """Its name in requests."""
    pid: int
    scheduler: str
    context: int
    """Tokens that a prompt and its answer may have together."""
    cache_tokens: int
    """Tokens of all requests that the key-value cache holds."""
    max_batch_tokens: int
