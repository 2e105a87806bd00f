"""A scheduler of transformers' continuous batching that keeps the distinct experts of a batch few."""

from __future__ import annotations

from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, Scheduler

from . import SCHEDULERS
from .order import Candidate, Room, by_expert
from .signatures import Signatures
from .telling import Scheduled, Telling, next_tokens

PATIENCE = 16
"""Batches that a request waits at most before it goes first."""
SAFETY_MARGIN = 0.15
"""Of the cache, as of transformers' `fifo`."""


class ByExpert(Scheduler):
    """Offers requests by expert (`order.by_expert`), prefill and decode alike.

    Nothing else of a batch is changed: budgets, cache and states are transformers' own, and a request's tokens stay in
    their order, as it is offered once a batch. Needs `use_async_batching=False`: otherwise transformers carries tokens
    over on the device that this has not seen.
    """

    signatures: Signatures | None = None
    """Set when the model is known; without them it is first come, first served."""
    patience = PATIENCE

    def __init__(self, cache: object, safety_margin: float | None, max_requests_per_batch: int) -> None:
        margin = SAFETY_MARGIN if safety_margin is None else safety_margin
        super().__init__(cache, margin, max_requests_per_batch)  # pyrefly: ignore[bad-argument-type]

    def reset(self) -> None:
        super().reset()
        self._waited: dict[str, int] = {}

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Scheduled:
        states = [*self.active_requests.values()]
        if not self.block_new_requests:
            states += self._get_waiting_candidates()
        order = by_expert([self._candidate(state, token_budget) for state in states], self._room(token_budget))
        offered = [states[i] for i in order.offered]
        found = self._offer(offered, token_budget, cache_budget)
        if not found.requests and order.kept_back:
            found = self._offer([states[i] for i in order.kept_back], token_budget, cache_budget)
        if found.requests is not None:
            self._remember(states, found.requests)
        return found

    def _offer(self, states: list[RequestState], token_budget: int, cache_budget: int) -> Scheduled:
        if self.cache.compute_free_capacity() < self.safety_margin:  # transformers stops at the first that is no decode
            states = sorted(states, key=lambda state: state.status != RequestStatus.DECODING)
        left: set[str] = set()
        scheduled, denied, fast, queries, reads = self._process_candidates(states, token_budget, cache_budget, left)
        self._cleanup_waiting_queue(left)
        return Scheduled(None, fast, 0, 0) if not scheduled and denied else Scheduled(scheduled, fast, queries, reads)

    def _room(self, token_budget: int) -> Room:
        if self.signatures is None:
            return Room(token_budget, self.patience)
        return Room(token_budget, self.patience, self.signatures.resident(), self.signatures.most())

    def _candidate(self, state: RequestState, token_budget: int) -> Candidate:
        tokens = min(next_tokens(state), token_budget)  # of a longer prompt only so many are in the batch
        experts = self.signatures.experts(state, tokens) if self.signatures else frozenset()
        return Candidate(experts, tokens, self._waited.get(state.request_id, 0))

    def _remember(self, offered: list[RequestState], scheduled: list[FutureRequestState]) -> None:
        """Count the batches that each request waits."""
        runs = {future.state.request_id for future in scheduled}
        names = (state.request_id for state in offered)
        self._waited = {name: 0 if name in runs else self._waited.get(name, 0) + 1 for name in names}

    def forget(self, request_id: str) -> None:
        """Drop what is known of a request."""
        self._waited.pop(request_id, None)


class ExpertAwareScheduler(Telling, ByExpert):
    """The order by expert, told to what knows the experts."""

    def forget(self, request_id: str) -> None:
        ByExpert.forget(self, request_id)
        Telling.forget(self, request_id)


SCHEDULER_MAPPING[SCHEDULERS["expert-aware"]] = ExpertAwareScheduler  # pyrefly: ignore[unsupported-operation]
