"""Schedulers of continuous batching: which requests' tokens make the next batch. Two are transformers', one is ours."""

from __future__ import annotations

from ...errors import InputError
from ...registry import nearest

SCHEDULERS = {
    "fifo": "moesaic_fifo", "prefill-first": "moesaic_prefill_first", "expert-aware": "moesaic_expert_aware",
}  # fmt: skip
"""Names of `--scheduler` and what transformers' `SCHEDULER_MAPPING` calls them; it takes `fifo` for any other name."""


def check_scheduler(name: str) -> str:
    """Check a scheduler's name, and return it as transformers writes it.

    Raises:
        InputError: there is none of that name.
    """
    found = SCHEDULERS.get(name.replace("_", "-"))
    if found is None:
        raise InputError(f"unknown scheduler '{name}'.{nearest(name, SCHEDULERS)} Choose from: {', '.join(SCHEDULERS)}")
    return found
