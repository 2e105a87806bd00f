"""Schedulers that say whose tokens make the next batch: a router ahead of the model decides for exactly these."""

from __future__ import annotations

from typing import NamedTuple

from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import (
    SCHEDULER_MAPPING,
    FIFOScheduler,
    PrefillFirstScheduler,
    Scheduler,
)

from . import SCHEDULERS
from .signatures import Part, Signatures

MOST_WAITING = 32
"""Requests whose next tokens are looked at ahead of their turn."""


class Scheduled(NamedTuple):
    """What makes the next batch, as transformers wants it."""

    requests: list[FutureRequestState] | None
    """None: the cache is full."""
    fast: bool
    """Whether all are decodes that a block table can hold."""
    queries: int
    reads: int


class Telling(Scheduler):
    """Tells what knows the requests' experts of each batch, and of those that wait."""

    signatures: Signatures | None = None
    """Set when the model is known."""

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Scheduled:
        found = Scheduled(*super().schedule_batch(token_budget, cache_budget))  # pyrefly: ignore[missing-attribute]
        scheduled = found.requests
        if self.signatures and scheduled:
            parts = [part_of(future.state, future.query_length) for future in scheduled]
            runs = {part.request_id for part in parts}
            others = [*self.active_requests.values(), *self.waiting_requests.values()]
            waiting = [state for state in others if state.request_id not in runs][:MOST_WAITING]
            # a request whose whole prompt is in the batch waits for the next one with a token that nobody knows yet
            self.signatures.scheduled(parts, [part_of(state, next_tokens(state)) for state in waiting])
        return found

    def finish_request(self, request_id: str) -> None:
        super().finish_request(request_id)
        self.forget(request_id)

    def clear_cancelled_requests(self) -> list[RequestState]:
        cancelled = super().clear_cancelled_requests()
        for state in cancelled:
            self.forget(state.request_id)
        return cancelled

    def forget(self, request_id: str) -> None:
        """Drop what is known of a request."""
        if self.signatures:
            self.signatures.forget(request_id)


def next_tokens(state: RequestState) -> int:
    """Count the tokens that a request has to run next."""
    decoding = state.status == RequestStatus.DECODING
    return len(state.tokens_to_process if decoding else state.remaining_prefill_tokens)


def part_of(state: RequestState, tokens: int) -> Part:
    """Say which of a request's tokens come next."""
    return Part(state.request_id, tokens, not state.generated_tokens, state)


class Fifo(Telling, FIFOScheduler):
    """transformers' own order, told."""


class PrefillFirst(Telling, PrefillFirstScheduler):
    """transformers' own order, told."""


SCHEDULER_MAPPING[SCHEDULERS["fifo"]] = Fifo  # pyrefly: ignore[unsupported-operation]
SCHEDULER_MAPPING[SCHEDULERS["prefill-first"]] = PrefillFirst  # pyrefly: ignore[unsupported-operation]
