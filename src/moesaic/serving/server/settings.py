"""What a server may be told, and the checks of it; nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass, field

from ... import given
from ...errors import InputError
from ...given import Limit
from ..schedulers import check_scheduler

DAY = 86_400
LIMITS = {
    "port": Limit(0, 65_535),
    "max_queue": Limit(1, 1_000_000),
    "max_request_bytes": Limit(1_024, 2**30),
    "timeout": Limit(0, DAY, whole=False, open=True, hint="seconds"),
    "grace": Limit(0, DAY, whole=False, hint="seconds"),
    "max_batch_tokens": Limit(1, 65_536),
    "cache_tokens": Limit(64, 2**30),
}


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of `serve`.

    Raises:
        InputError: a number outside its limits, an unknown scheduler, or a host or key that cannot be one.
    """

    host: str = "127.0.0.1"
    """Address to listen at; by default only this machine reaches it."""
    port: int = 8000
    """0 takes any that is free."""
    api_key: str | None = field(default=None, repr=False)
    """What clients must send as `Authorization: Bearer KEY`; None asks for none."""
    name: str = ""
    """The model's in requests and answers; empty: its folder's."""
    max_queue: int = 512
    """Requests that run or wait; more are answered with 429."""
    scheduler: str = "fifo"
    """`fifo`, `prefill-first` or `expert-aware`."""
    max_request_bytes: int = 1_048_576
    """Of one request's body; a larger one is answered with 413."""
    timeout: float = 600.0
    """Seconds from a request's arrival to its last token."""
    grace: float = 30.0
    """Seconds that running requests have when the server is told to stop."""
    max_batch_tokens: int | None = None
    """Tokens of a batch, prompts and answers alike; None: 512 on a CPU, 2,048 on a GPU."""
    cache_tokens: int | None = None
    """Tokens of all requests that the key-value cache holds; None: 16,384 on a CPU, on a GPU what memory allows."""

    def __post_init__(self) -> None:
        for name, limit in LIMITS.items():
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, given.number(name, value, limit))
        check_scheduler(self.scheduler)
        given.text(self.name, "the model's name")
        if not self.host or not given.text(self.host, "--host").isascii() or not self.host.isprintable():
            raise InputError(f"--host is {given.shown(self.host)}; give an address such as 127.0.0.1, or a host's name")
        key = self.api_key
        if key is not None and not (key.isascii() and key.isprintable() and key and " " not in key):
            raise InputError(
                "--api-key holds nothing, or what a header cannot; give letters, digits and signs of ASCII"
            )
